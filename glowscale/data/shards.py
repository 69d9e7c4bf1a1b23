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
from glowscale.data.opening import Retry, Source
from glowscale.data.tar import RawSample, read_samples
from glowscale.files import is_url, join


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
        retry: what is done about transfers that break.
    """

    def __init__(
        self, folder: str | Path, cache: ShardCache | None = None, retry: Retry | None = None
    ) -> None:
        self.folder = str(folder)
        self.cache = cache
        self.retry = retry
        self.manifest: Manifest = load_manifest(folder, retry)
        self.class_numbers = {name: i for i, name in enumerate(self.manifest.classes)}
        self.offsets = Offsets(self.folder, self.manifest.samples, retry)

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
            location = str(self.cache.fetch(location, entry, self.retry))
        with Source(location, offsets[0], entry.bytes, self.retry) as source:
            samples = _read_at(offsets, read_samples(source, location, offsets[0]))
        if len(samples) < len(offsets):
            raise ShardError(
                f"{location} holds {start + len(samples)} samples; the manifest says "
                f"{entry.samples}."
            )
        return samples

    def decode_sample(self, sample: RawSample) -> tuple[Tensor, int]:
        """The image of a sample, uint8 (C, H, W), and its class, -1 if it has none.

        Raises:
            DataError: without a readable image of the manifest's shape and range.
        """
        return self._image(sample), self._label(sample)

    def batch(self, images: list[Tensor], labels: list[int], rows: list[tuple[int, int]]) -> Batch:
        """Images, their labels and their (id, epoch) as a batch, which may be empty."""
        none = torch.empty(0, *self.manifest.image_shape, dtype=torch.uint8)
        return Batch(
            images=torch.stack(images) if images else none,
            labels=torch.tensor(labels, dtype=torch.int64),
            ids=torch.tensor([identity for identity, _ in rows], dtype=torch.int64),
            epochs=torch.tensor([epoch for _, epoch in rows], dtype=torch.int64),
        )

    def shard_of(self, identity: int) -> int:
        """The shard that holds the sample with this id."""
        return int(np.searchsorted(self.manifest.starts, identity, side="right")) - 1

    def read_batch(self, start: int, stop: int) -> Batch:
        """The samples with ids start to stop (not included), in order."""
        starts = self.manifest.starts
        samples: list[RawSample] = []
        for shard in range(self.shard_of(start), len(self.manifest.shards)):
            low, high = int(starts[shard]), int(starts[shard + 1])
            if low >= stop:
                break
            samples += self.read(shard, max(start, low) - low, min(stop, high) - low)
        decoded = [self.decode_sample(sample) for sample in samples]
        images, labels = [image for image, _ in decoded], [label for _, label in decoded]
        return self.batch(images, labels, [(identity, 0) for identity in range(start, stop)])

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
