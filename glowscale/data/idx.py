"""The IDX files of the MNIST family."""

import gzip
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from glowscale.data.errors import DataError
from glowscale.data.sources import Sample, Split, hold_out

IDX_UNSIGNED_BYTE = 8


def idx(path: Path, validation: int = 0) -> list[Split]:
    """The MNIST family's IDX files in a folder, gzipped or not, as splits `train` and `test`.

    Args:
        path: folder of `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the two that
            begin with `t10k`, each with or without `.gz`.
        validation: so many training images, chosen by key, are a split `validation` instead.

    Raises:
        DataError: if a file is missing or is no IDX file of unsigned bytes, or if there are too
            few images to choose from.
    """
    train, test = _idx_split(path, "train", "train"), _idx_split(path, "t10k", "test")
    if not validation:
        return [train, test]
    kept, chosen = hold_out([f"train-{i:05d}" for i in range(train.size)], validation)
    parts = {"train": kept, "validation": chosen}
    return [*(_part_of(train, name, indices) for name, indices in parts.items()), test]


def _part_of(split: Split, name: str, indices: list[int]) -> Split:
    """Some of a split's samples as a split of their own."""
    return replace(
        split,
        name=name,
        origin=f"{split.origin}, the {len(indices):,} of {split.size:,} that are {name}",
        size=len(indices),
        sample=lambda i: split.sample(indices[i]),
    )


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
