"""Reading samples out of a split's shards, by shard or by id."""

from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from glowscale.data.images import decode_image
from glowscale.data.manifest import DataError, Manifest, load_manifest, load_offset
from glowscale.data.tar import RawSample, read_samples

READ_BYTES = 1 << 20


class Batch(NamedTuple):
    """Samples with where they come from."""

    images: Tensor
    """uint8 (B, C, H, W)."""
    labels: Tensor
    """int64 (B,); -1 where a sample has no label."""
    ids: Tensor
    """int64 (B,); places in the manifest's order."""
    epochs: Tensor
    """int64 (B,); the epoch that each sample belongs to, 0 outside training."""


def cat_batches(parts: list[Batch]) -> Batch:
    """Join batches in order."""
    return Batch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class ShardSet:
    """A split's shards and manifest.

    Args:
        folder: the split's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = load_manifest(folder)

    def read(self, shard: int, start: int, stop: int) -> list[RawSample]:
        """Samples start to stop (not included) of a shard, encoded; seeks to the first.

        Raises:
            ShardError: if the shard is damaged.
            DataError: if it is missing or holds fewer samples than the manifest says.
        """
        entry = self.manifest.shards[shard]
        path = self.folder / entry.name
        offset = load_offset(self.folder, int(self.manifest.starts[shard]) + start) if start else 0
        try:
            file = path.open("rb", buffering=READ_BYTES)
        except FileNotFoundError:
            raise DataError(f"{path} is missing, but {self.folder}'s manifest lists it.") from None
        with file:
            file.seek(offset)
            samples = read_samples(file, str(path), offset)
            result = list(islice(samples, stop - start))
        if len(result) < stop - start:
            raise DataError(
                f"{path} holds {start + len(result)} samples; the manifest says {entry.samples}."
            )
        return result

    def decode(self, samples: list[RawSample], ids: list[int], epochs: list[int]) -> Batch:
        """Decode samples into a batch.

        Raises:
            DataError: for a sample without a readable image of the manifest's shape and range.
        """
        shape = self.manifest.image_shape
        images = torch.empty((len(samples), *shape), dtype=torch.uint8)
        for image, sample in zip(images, samples, strict=True):
            image.copy_(self._image(sample))
        return Batch(
            images=images,
            labels=torch.tensor([self._label(sample) for sample in samples]),
            ids=torch.tensor(ids),
            epochs=torch.tensor(epochs),
        )

    def read_batch(self, start: int, stop: int) -> Batch:
        """The samples with ids start to stop (not included), in order."""
        starts = self.manifest.starts
        samples: list[RawSample] = []
        first = int(np.searchsorted(starts, start, side="right")) - 1
        for shard in range(first, len(self.manifest.shards)):
            low, high = int(starts[shard]), int(starts[shard + 1])
            if low >= stop:
                break
            samples += self.read(shard, max(start, low) - low, min(stop, high) - low)
        return self.decode(samples, list(range(start, stop)), [0] * len(samples))

    def _label(self, sample: RawSample) -> int:
        """The sample's class, -1 if it has none."""
        if "cls" not in sample.files:
            return -1
        text, classes = sample.files["cls"].decode(errors="replace"), len(self.manifest.classes)
        if not text.isdecimal() or int(text) >= classes:
            raise DataError(
                f"sample {sample.key!r} in {self.folder} has the label {text!r}; it must be a "
                f"number below {classes}."
            )
        return int(text)

    def _image(self, sample: RawSample) -> Tensor:
        where = f"sample {sample.key!r} in {self.folder}"
        if "png" not in sample.files:
            raise DataError(f"{where} has no png, only {sorted(sample.files)}.")
        try:
            image = decode_image(sample.files["png"])
        except ValueError as error:
            raise DataError(f"{where}: {error}.") from error
        if tuple(image.shape) != self.manifest.image_shape:
            expected = self.manifest.image_shape
            raise DataError(f"{where} has the shape {tuple(image.shape)}, not {expected}.")
        if self.manifest.grey_levels < 256 and int(image.max()) >= self.manifest.grey_levels:
            levels = self.manifest.grey_levels
            raise DataError(
                f"{where} has the value {int(image.max())}; it must be below {levels}."
            )
        return image
