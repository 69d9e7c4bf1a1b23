"""Which of a sample's files hold its image and its label; other tools have other layouts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from glowscale.data.errors import DataError, UnreadableError
from glowscale.data.images import decode_png
from glowscale.data.view import View

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "npy")
"""Extensions that are taken for the image where none is named."""

SHOWN = 10
"""Classes that a message names at most."""


@dataclass(frozen=True)
class Layout:
    """How a sample's files (contents by extension) are to be understood.

    Args:
        image: extensions that may hold the image; a sample must have one of them.
        label: the extension of the label's file, such as `cls` or `txt`, or `json.FIELD` (more
            dots go deeper), or None.
        by_name: whether labels are names of classes; else they are their numbers.
        view: how images become those of the set; None for PNGs that are stored as they are used.
    """

    image: tuple[str, ...] = ("png",)
    label: str | None = "cls"
    by_name: bool = False
    view: View | None = None

    def read_image(self, files: Mapping[str, bytes]) -> np.ndarray:
        """The image, uint8 (C, H, W).

        Raises:
            UnreadableError: if there is none, or it cannot be read.
            DataError: if there are several.
        """
        found = [extension for extension in self.image if extension in files]
        if not found:
            raise UnreadableError(f"no {' or '.join(self.image)}, only {sorted(files)}")
        if len(found) > 1:
            raise DataError(f"several images, {' and '.join(found)}; name the one to use (image)")
        data = files[found[0]]
        if self.view is None:
            return decode_png(data)
        is_array = found[0].rpartition(".")[2] == "npy"
        return self.view.read_array(data) if is_array else self.view.read(data)

    def read_label(self, files: Mapping[str, bytes]) -> str | None:
        """The label as text, None where there is none; raises UnreadableError for broken JSON."""
        extension, field = split_label(self.label or "")
        if extension not in files:
            return None
        text = files[extension].decode(errors="replace").strip()
        if not field:
            return text or None
        try:
            value: Any = json.loads(text)
            for name in field.split("."):
                value = value.get(name) if isinstance(value, dict) else None
        except json.JSONDecodeError as error:
            raise UnreadableError(f"its json is broken ({error})") from None
        return None if value is None else str(value)

    def class_of(self, files: Mapping[str, bytes], numbers: Mapping[str, int]) -> int:
        """The number of the sample's class, -1 where there is none.

        Args:
            files: of the sample.
            numbers: of the classes, by their names.

        Raises:
            DataError: if the label is no class.
        """
        text = self.read_label(files)
        if text is None:
            return -1
        if self.by_name and text in numbers:
            return numbers[text]
        if not self.by_name and text.isdecimal() and int(text) < len(numbers):
            return int(text)
        names = ", ".join(list(numbers)[:SHOWN]) + (" ..." if len(numbers) > SHOWN else "")
        allowed = f"one of {names}" if self.by_name else f"a number below {len(numbers)}"
        raise DataError(f"the label {text!r}; it must be {allowed}")


def split_label(label: str) -> tuple[str, str]:
    """The extension of the file that holds a label, and the field within it.

    >>> split_label("cls"), split_label("meta.json.what.kind")
    (('cls', ''), ('meta.json', 'what.kind'))
    """
    before, json_, field = f".{label}".partition(".json.")
    return (f"{before}.json"[1:], field) if json_ else (label, "")


PACKED = Layout()
"""The layout of the shards that are written here."""
