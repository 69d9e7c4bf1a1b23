"""Where images come from before they are packed: each source gives named splits of samples."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    identity: str = ""
    """Hash of what tells this set of files from another, where there are files."""


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

    A key's hash decides, so an image stays where it is when others are added.

    Args:
        keys: the set's keys.
        split: name of the only split.
        held_out: part of the images that `test` gets, about but at least one; 0 leaves it out.

    Raises:
        DataError: if there are too few images for two splits.

    >>> part_keys(["a", "b", "c"], None, 0.2)
    {'train': [0, 1], 'test': [2]}
    """
    if split is not None:
        return {split: list(range(len(keys)))}
    if not held_out:
        return {"train": list(range(len(keys)))}
    held = {i for i, key in enumerate(keys) if is_held_out(key, held_out)}
    held = held or set(hold_out(keys, 1)[1])
    kept = [i for i in range(len(keys)) if i not in held]
    if not kept:
        raise DataError(f"{len(keys)} images are too few to hold {held_out:g} of them out.")
    return {"train": kept, "test": sorted(held)}


def identity_of(rows: Iterable[object]) -> str:
    """A short hash of whatever tells one set of files from another, such as names and sizes."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode() + b"\0")
    return digest.hexdigest()[:16]


def files_below(folder: Path) -> Iterator[Path]:
    """The files of a tree that are not hidden, in order; links are followed, never in circles."""
    seen: set[str] = set()
    for name, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(name)
        folders[:] = sorted(x for x in folders if not x.startswith("."))
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(name, x) for x in sorted(files) if not x.startswith("."))
