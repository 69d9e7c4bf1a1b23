"""From YAML and `dotted.key=value` overrides to a validated config, or to one clear sentence."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from glowscale.config.schema import Config, Source
from glowscale.config.section import Section, tag_of
from glowscale.errors import UserError


class ConfigError(UserError):
    """A config that cannot be; the message names the key, the value and what is allowed."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `dotted.key=value` overrides, whose values are YAML.

    Raises:
        ConfigError: if the file is missing or is no YAML mapping, an override has no `=`, or
            the result is not a valid config.
    """
    if not path.is_file():
        raise ConfigError(f"There is no config {path}.")
    try:
        content = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8 ({error}).") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of sections, not {type(content).__name__}.")
    content = _unshared(content)
    for override in overrides:
        _apply_override(content, override)
    return parse_config(content)


def parse_config(content: Mapping[str, Any]) -> Config:
    """Validate a config given as nested mappings; raises ConfigError."""
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(e, content) for e in error.errors())) from None


def complete_model(section: Mapping[str, Any], path: Path, prefix: str) -> dict[str, Any]:
    """The `model` section of a config, as JSON has it, with the defaults of keys newer than it.

    Args:
        section: as it was written to a file, by whichever version.
        path: the file.
        prefix: how the file calls the section's keys.

    Raises:
        ConfigError: if this version does not know such a model.
    """
    families = sections_by_tag(Config.model_fields["model"].annotation)
    family = section["family"]
    if family not in families:
        raise ConfigError(f"{path}: there is no family {family!r}, only {', '.join(families)}.")
    try:
        return families[family].model_validate(section).model_dump(mode="json")
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_finding(error, prefix)}") from None


def first_finding(error: ValidationError, prefix: str = "") -> str:
    """The first finding of pydantic in a file, as the end of a sentence.

    Args:
        error: pydantic's.
        prefix: what stands before a key in the file.
    """
    first = error.errors()[0]
    key = prefix + ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"the key {key!r} is missing."
    return f"the key {key!r} {_complaint(first)}"


def _complaint(error: ErrorDetails) -> str:
    """What pydantic found of a value, as the end of a sentence about it."""
    message = error["msg"].replace("Input should", "it must")
    return f"is {error['input']!r}; {message}."


def parse_source(kind: str, values: Mapping[str, str]) -> dict[str, Any]:
    """A source's arguments from options of a command line, `null` for None; ConfigError.

    >>> parse_source("digits", {"held_out": "100"})
    {'held_out': 100}
    """
    content = {name: None if text == "null" else text for name, text in values.items()}
    try:
        source: Section = TypeAdapter(Source).validate_python(
            {"kind": kind, **content}, strict=False
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"The option {first['loc'][-1]!r} {_complaint(first)}") from None
    return source.model_dump(exclude={"kind"})


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:  # noqa: ANN401
    """Dotted keys at which two nested mappings differ, with both values.

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
    {'a.c': (2, 3)}
    """
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix: (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        dotted = f"{prefix}.{key}" if prefix else key
        found |= differences(old.get(key), new.get(key), dotted)
    return found


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: 1e-3 is a number, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"the key {key!r} stands twice in the mapping at line {line}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse_yaml(text: str, where: str) -> Any:  # noqa: ANN401
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is no valid YAML: {' '.join(str(error).split())}.") from None


def _unshared(content: Any) -> Any:  # noqa: ANN401
    """A copy in which what an anchor names twice is there twice, so each can be overridden."""
    if isinstance(content, dict):
        return {key: _unshared(value) for key, value in content.items()}
    return [_unshared(value) for value in content] if isinstance(content, list) else content


def _apply_override(content: dict[str, Any], override: str) -> None:
    dotted, equals, value = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"The override {override!r} must have the form dotted.key=value.")
    *parents, last = dotted.split(".")
    inner: Any = content
    for parent in parents:
        if isinstance(inner, list):
            inner = inner[_index(inner, parent, override)]
        else:
            inner = inner.setdefault(parent, {})
        if not isinstance(inner, dict | list):
            raise ConfigError(f"The override {override!r} goes below {parent!r}, a plain value.")
    key = _index(inner, last, override) if isinstance(inner, list) else last
    inner[key] = _parse_yaml(value, f"The override {override!r}")


def _index(entries: Sequence[Any], text: str, override: str) -> int:
    """The place in a list that part of an override's key names."""
    if text.isdecimal() and int(text) < len(entries):
        return int(text)
    if not entries:
        raise ConfigError(f"The override {override!r} names place {text!r} of an empty list.")
    last = len(entries) - 1
    raise ConfigError(f"The override {override!r} needs a place from 0 to {last}, not {text!r}.")


def _sentence(error: ErrorDetails, content: Mapping[str, Any]) -> str:
    """One sentence for one finding of pydantic."""
    path = _path_without_tags(error["loc"], content)
    dotted = ".".join(path)
    if error["type"] == "extra_forbidden":
        allowed = _allowed_keys(path, content)
        close = difflib.get_close_matches(path[-1], allowed, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"Unknown config key {dotted!r}: {hint}Allowed are {', '.join(allowed)}."
    if error["type"] == "missing":
        return f"The config key {dotted!r} is missing."
    if error["type"] == "union_tag_invalid":
        key, tag, expected = (error["ctx"][x] for x in ("discriminator", "tag", "expected_tags"))
        return f"The config key '{dotted}.{key[1:-1]}' is {tag!r}; it must be one of {expected}."
    if error["type"] == "union_tag_not_found":
        return f"The config key '{dotted}.{error['ctx']['discriminator'][1:-1]}' is missing."
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"The config key {dotted!r} is {error['input']!r}; it must be a mapping of keys."
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "it must")
    message = message.replace("a valid tuple", "a list")
    if error["type"] == "value_error" and isinstance(error["input"], Mapping | list):
        return f"The config cannot be: {message}."  # the message names the keys within
    return f"The config key {dotted!r} is {error['input']!r}; {message}."


def _path_without_tags(loc: Sequence[int | str], content: Any) -> list[str]:  # noqa: ANN401
    """Pydantic puts a union's tag into the path; keep only the keys that a user wrote."""
    path = []
    for index, part in enumerate(loc):
        present = part in (content if isinstance(content, Mapping) else _places(content))
        if present or index == len(loc) - 1:
            path.append(str(part))
        if present:
            content = content[part]
    return path


def _places(content: Any) -> range:  # noqa: ANN401
    """The indices of a list; none of anything else."""
    return range(len(content)) if isinstance(content, list | tuple) else range(0)


def _allowed_keys(path: Sequence[str], content: Any) -> list[str]:  # noqa: ANN401
    section: type[Section] = Config
    sections = [section]
    for part in path[:-1]:
        if isinstance(content, Mapping):
            content = content[part]
            sections = sections_of(section.model_fields[part].annotation)
        else:
            content = content[int(part)]
        if isinstance(content, Mapping):
            section = next((s for s in sections if _matches(s, content)), sections[0])
    return list(section.model_fields)


def _matches(section: type[Section], content: Mapping[str, Any]) -> bool:
    tag = tag_of(section)
    return tag is None or content.get(tag[0]) == tag[1]


def sections_of(annotation: Any) -> list[type[Section]]:  # noqa: ANN401
    """The sections that a field's type allows."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    return [section for part in get_args(annotation) for section in sections_of(part)]


def sections_by_tag(annotation: Any) -> dict[str, type[Section]]:  # noqa: ANN401
    """The sections that a field's type allows, by the kind or family that each is."""
    return {tag[1]: section for section in sections_of(annotation) if (tag := tag_of(section))}
