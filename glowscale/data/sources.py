"""Where images come from before they are packed: each source gives named splits of samples."""

import gzip
import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glowscale.data.manifest import DataError

IDX_UNSIGNED_BYTE = 8


class UnreadableError(DataError):
    """An image that cannot be read; packing counts it, names it and goes on without it."""


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


def digits(held_out: int = 297) -> list[Split]:
    """The handwritten digits that ship inside scikit-learn: 1,797 images of 8×8, 17 grey levels.

    Args:
        held_out: how many of them the split `test` gets, chosen by key.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            'The digits are part of scikit-learn; install it with pip install "glowscale[demo]".'
        ) from None
    data = load_digits()
    images = data.images.astype(np.uint8)[:, None]
    keys = [f"digit-{index:04d}" for index in range(len(images))]
    train, test = hold_out(keys, held_out)

    def split(name: str, indices: list[int]) -> Split:
        def sample(i: int) -> Sample:
            index = indices[i]
            return Sample(keys[index], images[index], int(data.target[index]))

        origin = f"scikit-learn's digits, {held_out} held out"
        return Split(name, origin, (1, 8, 8), 17, tuple("0123456789"), len(indices), sample)

    return [split("train", train), split("test", test)]


def idx(path: Path) -> list[Split]:
    """The MNIST family's IDX files in a folder, gzipped or not, as splits `train` and `test`.

    Args:
        path: folder of `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the two that
            begin with `t10k`, each with or without `.gz`.

    Raises:
        DataError: if a file is missing or is no IDX file of unsigned bytes.
    """
    return [_idx_split(path, "train", "train"), _idx_split(path, "t10k", "test")]


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


def _idx_split(path: Path, prefix: str, name: str) -> Split:
    images = _read_idx(path, f"{prefix}-images-idx3-ubyte", 3)
    labels = _read_idx(path, f"{prefix}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise DataError(f"{path} has {len(images)} {prefix} images but {len(labels)} labels.")
    classes = tuple(str(label) for label in range(max(labels.tolist(), default=-1) + 1))

    def sample(i: int) -> Sample:
        return Sample(f"{name}-{i:05d}", images[i][None], int(labels[i]))

    shape = (1, images.shape[1], images.shape[2])
    return Split(name, f"IDX files {prefix}", shape, 256, classes, len(images), sample)


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """An IDX file (magic number, sizes, bytes) as a uint8 array of so many dimensions."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    path = plain if plain.is_file() else zipped
    if not path.is_file():
        raise DataError(f"{folder} has neither {name} nor {name}.gz.")
    try:
        data = path.read_bytes() if path == plain else gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}.") from error
    head = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, IDX_UNSIGNED_BYTE, dimensions]):
        raise DataError(f"{path} is no IDX file of {dimensions}-d unsigned bytes.")
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, head, 4)]
    if len(data) != head + int(np.prod(shape)):
        raise DataError(f"{path} is truncated: {len(data)} bytes for the shape {shape}.")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)
