"""The help text of the config: every key with its type, default and meaning."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from glowscale.config.load import sections_by_tag, sections_of
from glowscale.config.schema import Config, Data, Optimizer
from glowscale.config.section import TAGS, Section, tag_of


def describe() -> str:
    """Every key with its type, default and meaning, one a line."""
    rows = list(_describe(Config, ""))
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"  {key:<{width}}  {text}" for key, text in rows)


def sources() -> dict[str, tuple[str, dict[str, tuple[str, bool]]]]:
    """What each kind of source is, and its keys: their meaning and whether they are required."""
    return {
        kind: (
            (section.__doc__ or "").rstrip("."),
            {
                name: (
                    f"{_type_name(field)}{_default_text(field)}: {field.description}",
                    field.is_required(),
                )
                for name, field in section.model_fields.items()
                if name != "kind"
            },
        )
        for kind, section in sections_by_tag(Data.model_fields["source"].annotation).items()
    }


def _describe(section: type[Section], prefix: str) -> Iterator[tuple[str, str]]:
    fields = section.model_fields
    for name, field in sorted(fields.items(), key=lambda item: item[0] not in TAGS):
        key = prefix + name
        sections = sections_of(field.annotation)
        if not sections or field.description:
            yield key, f"{_type_name(field)}{_default_text(field)}: {field.description}"
        for inner in sections:
            tag = tag_of(inner) if len(sections) > 1 else None
            infix = f"[{tag[1]}]" if tag else ""
            yield from _describe(inner, f"{key}{infix}.")


def _type_name(field: FieldInfo) -> str:
    def name(annotation: Any) -> str:  # noqa: ANN401
        if get_origin(annotation) is Literal:
            return " | ".join(map(str, get_args(annotation)))
        if get_origin(annotation) is Annotated:
            return name(get_args(annotation)[0])
        if get_origin(annotation) is tuple:
            return f"list of {name(get_args(annotation)[0])}"
        if args := get_args(annotation):
            return " | ".join(dict.fromkeys(name(arg) for arg in args))
        if annotation is type(None):
            return "null"
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return "section"
        return str(annotation.__name__).lower()

    return name(field.annotation)


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return ", required"
    if isinstance(field.default, Section):
        kind = getattr(field.default, "kind", None)
        return f", default {kind}" if kind and not isinstance(field.default, Optimizer) else ""
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return f", default {'null' if default is None else default}"
