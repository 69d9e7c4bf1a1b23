"""Reading samples out of a split's shards, by shard or by id."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from glowscale.data.cache import ShardCache
from glowscale.data.errors import DataError, ShardError, UnreadableError
from glowscale.data.manifest import Manifest, Offsets, load_manifest
from glowscale.data.opening import Source, is_url, join
from glowscale.data.tar import RawSample, read_samples


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
        folder: the split's folder, a path or URL.
        cache: where shards that lie behind a URL are kept.
    """

    def __init__(self, folder: str | Path, cache: ShardCache | None = None) -> None:
        self.folder = str(folder)
        self.cache = cache
        self.manifest: Manifest = load_manifest(folder)
        self.class_numbers = {name: i for i, name in enumerate(self.manifest.classes)}
        self.offsets = Offsets(self.folder, self.manifest.samples)

    def read(self, shard: int, start: int, stop: int) -> list[RawSample]:
        """Samples start to stop (not included) of a shard, encoded; seeks to the first.

        What lies between them and is not in the index is passed over.

        Raises:
            DataError: if the shard is missing, cannot be read, or is not the manifest's.
        """
        entry = self.manifest.shards[shard]
        location = join(self.manifest.root or self.folder, entry.name)
        first = int(self.manifest.starts[shard])
        offsets = self.offsets.read(first + start, first + stop)
        if self.cache and is_url(location):
            location = str(self.cache.fetch(location, entry))
        with Source(location, offsets[0], entry.bytes) as source:
            samples = _read_at(offsets, read_samples(source, location, offsets[0]))
        if len(samples) < len(offsets):
            raise ShardError(
                f"{location} holds {start + len(samples)} samples; the manifest says "
                f"{entry.samples}."
            )
        return samples

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
        try:
            return self.manifest.layout.class_of(sample.files, self.class_numbers)
        except DataError as error:
            raise DataError(f"{self._name(sample)} has {error}.") from None

    def _image(self, sample: RawSample) -> Tensor:
        manifest = self.manifest
        try:
            image = torch.from_numpy(manifest.layout.read_image(sample.files))
        except UnreadableError as error:
            raise DataError(f"{self._name(sample)}: {error}.") from error
        if tuple(image.shape) != manifest.image_shape:
            raise DataError(
                f"{self._name(sample)} has the shape {tuple(image.shape)}, not "
                f"{manifest.image_shape}."
            )
        if manifest.grey_levels < 256 and int(image.max()) >= manifest.grey_levels:
            raise DataError(
                f"{self._name(sample)} has the value {int(image.max())}; it must be below "
                f"{manifest.grey_levels}."
            )
        return image

    def _name(self, sample: RawSample) -> str:
        return f"sample {sample.key!r} in {self.folder}"


def _read_at(offsets: list[int], samples: Iterator[RawSample]) -> list[RawSample]:
    """Those of the samples that start at the given, ascending offsets."""
    found: list[RawSample] = []
    for sample in samples:
        if sample.offset == offsets[len(found)]:
            found.append(sample)
            if len(found) == len(offsets):
                break
    return found
