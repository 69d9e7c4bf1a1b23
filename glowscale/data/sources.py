"""Where images come from before they are packed: each source gives named splits of samples."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from glowscale.data.errors import DataError


class Sample(NamedTuple):
    """An image before it is packed."""

    key: str
    """Its name in the set; no dots."""
    image: np.ndarray
    """uint8 (C, H, W)."""
    label: int | None


@dataclass(frozen=True)
class Split:
    """A named part of a source; samples are made one at a time, when asked for."""

    name: str
    origin: str
    """What it is a split of, in words; a folder is only ever packed from one origin."""
    image_shape: tuple[int, int, int]
    grey_levels: int
    classes: tuple[str, ...]
    size: int
    sample: Callable[[int], Sample]
    """The i-th sample, 0 ≤ i < size; raises UnreadableError where it cannot be read."""


def hold_out(keys: Sequence[str], count: int) -> tuple[list[int], list[int]]:
    """Part a set by key: the indices kept, in order, and the `count` held out, in hash order.

    A key's hash decides, so the choice does not depend on the order of the set.

    >>> hold_out(["a", "b", "c"], 1)
    ([0, 1], [2])
    """
    if not 0 <= count < len(keys):
        raise DataError(f"{count} of {len(keys)} images cannot be held out.")
    ranked = sorted(range(len(keys)), key=lambda i: hashlib.sha256(keys[i].encode()).digest())
    return sorted(ranked[count:]), ranked[:count]


def is_held_out(key: str, part: float) -> bool:
    """Whether a key is among a part of all keys, without knowing the others."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") < part * 2**64


def part_keys(keys: Sequence[str], split: str | None, held_out: float) -> dict[str, list[int]]:
    """Indices of the splits: all of them `split` if it is named, else `train` and `test`.

    Args:
        keys: the set's keys.
        split: name of the only split.
        held_out: part of the images that `test` gets, chosen by key; 0 leaves it out.

    >>> part_keys(["a", "b", "c"], None, 0.34)
    {'train': [0, 1], 'test': [2]}
    """
    if split is not None:
        return {split: list(range(len(keys)))}
    kept, held = hold_out(keys, round(held_out * len(keys)))
    return {"train": kept, "test": held} if held else {"train": kept}
