"""Packing a source into WebDataset shards with a manifest."""

import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import webdataset
from tqdm import tqdm

from glowscale.data.errors import DataError, UnreadableError
from glowscale.data.images import encode_png
from glowscale.data.journal import Journal, Part
from glowscale.data.manifest import MANIFEST, Fingerprint, Manifest, Shard, load_manifest
from glowscale.data.sources import Sample, Split
from glowscale.data.tar import read_samples
from glowscale.files import (
    TEMPORARY,
    alone_in,
    claim_folder,
    naming,
    remove_partials,
    sha256_of,
    sync,
)
from glowscale.randomness import generator

NOTE = "packing.json"
WINDOW = 256
"""Images that are held in memory at once."""
Item = TypeVar("Item")
Read = TypeVar("Read")


class Packed(NamedTuple):
    """A split that is packed or indexed."""

    manifest: Manifest
    skipped: int
    """Images that could not be read; named on stderr and in the folder's journal."""
    already: bool
    """Whether there was nothing left to do."""


def pack(
    splits: Iterable[Split], folder: Path, shard_size: int, seed: int = 0, workers: int = 1
) -> dict[str, Packed]:
    """Pack every split into its folder below `folder`; what is already packed is left alone."""
    return {
        split.name: pack_split(split, folder / split.name, shard_size, seed, workers)
        for split in splits
    }


def pack_split(
    split: Split, folder: Path, shard_size: int, seed: int = 0, workers: int = 1
) -> Packed:
    """Pack a split into `folder/shard-000000.tar ...`; the manifest comes last.

    A packing that was killed continues after its last whole shard. The training split is packed
    in a seeded random order, for shards sorted by class would defeat the stream's block
    shuffling. Others keep the source's order.

    Args:
        split: what to pack.
        folder: where; made if need be. One that is complete already is left alone.
        shard_size: samples a shard.
        seed: seed of the order.
        workers: threads that read images.

    Raises:
        ClaimError: if the folder holds something else.
        DataError: for no images, or a pixel that is not below the number of grey levels.
    """
    if not split.size:
        raise DataError(f"The split {split.name!r} of {split.origin} has no images.")
    job = {
        "origin": split.origin,
        "files": split.identity,
        "size": split.size,
        "shard_size": shard_size,
        "seed": seed,
    }
    with alone_in(folder):
        journal = Journal(folder)
        claim_folder(folder, NOTE, job, begun=bool(journal.parts))
        if (folder / MANIFEST).exists():
            return Packed(load_manifest(folder), journal.skipped, already=True)
        _pack_shards(split, folder, shard_size, seed, workers, journal)
        if not any(part.offsets for part in journal.parts):
            raise DataError(f"No image of the split {split.name!r} of {split.origin} can be read.")
        facts = Manifest(split.image_shape, split.grey_levels, split.classes)
        return Packed(journal.write_manifest(facts), journal.skipped, already=False)


def _pack_shards(
    split: Split, folder: Path, shard_size: int, seed: int, workers: int, journal: Journal
) -> None:
    """Write the shards that the journal lacks."""
    order: Sequence[int] = range(split.size)
    if split.name == "train":
        order = generator(seed, "pack", split.name).permutation(split.size).tolist()
    done = min(len(journal.parts) * shard_size, split.size)
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=split.size, initial=done, desc=f"packing {split.name}", unit="img") as progress,
    ):
        for start in range(done, split.size, shard_size):
            path = folder / f"shard-{start // shard_size:06d}.tar"
            indices = order[start : start + shard_size]
            journal.add(_pack_shard(path, split, indices, pool, progress))


def _pack_shard(
    path: Path,
    split: Split,
    indices: Sequence[int],
    pool: ThreadPoolExecutor,
    progress: "tqdm[Any]",
) -> Part:
    """Write a shard of those of the images that can be read; return what the journal notes."""
    skipped: list[str] = []
    fingerprints: list[str] = []

    def read(index: int) -> Encoded:
        sample = split.sample(index)
        _check(sample, split)
        return encode(sample, split.classes)

    def samples() -> Iterator[Encoded]:
        for start in range(0, len(indices), WINDOW):
            found, unread = read_all(indices[start : start + WINDOW], read, pool, progress)
            skipped.extend(unread)
            fingerprints.extend(sample.fingerprint for sample in found)
            yield from found

    shard, offsets = write_shard(path, samples())
    return Part(shard, offsets, Fingerprint.total(fingerprints), [], skipped)


class Encoded(NamedTuple):
    """A sample as it is written."""

    key: str
    png: bytes
    label: int | None
    fingerprint: str
    notes: bytes | None = None
    """JSON that is written beside the image."""


def encode(sample: Sample, classes: Sequence[str] = ()) -> Encoded:
    """Encode a sample and hash it, the costly part of packing; its class by name if there are."""
    fingerprint = Fingerprint()
    name = classes[sample.label] if classes and sample.label is not None else None
    fingerprint.add(sample.key, name, sample.image)
    return Encoded(sample.key, encode_png(sample.image), sample.label, fingerprint.hexdigest())


def read_all(
    items: Sequence[Item],
    read: Callable[[Item], Read],
    pool: ThreadPoolExecutor,
    progress: "tqdm[Any]",
    weight: Callable[[Item], int] = lambda item: 1,
) -> tuple[list[Read], list[str]]:
    """What `read` makes of every item, in order, and what is wrong with those it cannot read.

    They are named on stderr and left out; `read` raises UnreadableError for them. Each item
    moves the progress bar by its weight.
    """

    def attempt(item: Item) -> Read | UnreadableError:
        try:
            return read(item)
        except UnreadableError as error:
            return error

    results: list[Read] = []
    skipped: list[str] = []
    for item, result in zip(items, pool.map(attempt, items), strict=True):
        if isinstance(result, UnreadableError):
            progress.write(f"skipped {result}", file=sys.stderr)
            skipped.append(str(result))
        else:
            results.append(result)
        progress.update(weight(item))
    return results, skipped


def write_shard(path: Path, samples: Iterable[Encoded]) -> tuple[Shard, list[int]]:
    """Write a shard of PNGs and labels; return its entry and where each sample starts.

    The bytes depend on the samples alone, and the file appears whole or not at all; where there
    are no samples there is no file.
    """
    remove_partials(path)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    count = 0
    try:
        with naming(path), partial.open("wb") as file:
            with webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as writer:
                for sample in samples:
                    label = {} if sample.label is None else {"cls": str(sample.label).encode()}
                    notes = {} if sample.notes is None else {"json": sample.notes}
                    writer.write({"__key__": sample.key, "png": sample.png, **label, **notes})
                    count += 1
            file.flush()
            os.fsync(file.fileno())
        with partial.open("rb") as written:
            offsets = [sample.offset for sample in read_samples(written, path.name)]
        if len(offsets) != count:
            raise DataError(
                f"{path} would hold {len(offsets)} of {count} samples: two keys agree."
            )
        shard = Shard(path.name, count, partial.stat().st_size, sha256_of(partial))
        if count:
            os.replace(partial, path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
    return shard, offsets


def _check(sample: Sample, split: Split) -> None:
    if split.classes and not 0 <= (sample.label or 0) < len(split.classes):
        raise DataError(
            f"Image {sample.key!r} has the label {sample.label}; it must be from 0 to "
            f"{len(split.classes) - 1}."
        )
    if sample.image.shape != split.image_shape or sample.image.max() >= split.grey_levels:
        raise DataError(
            f"Image {sample.key!r} of shape {sample.image.shape} with values up to "
            f"{sample.image.max()} does not fit {split.image_shape} with {split.grey_levels} "
            f"grey levels; where sizes differ, give a resolution that all are resized to."
        )
