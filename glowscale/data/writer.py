"""Packing a source into WebDataset shards with a manifest."""

import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import webdataset
from tqdm import tqdm

from glowscale.data.images import encode_png
from glowscale.data.manifest import (
    MANIFEST,
    DataError,
    Fingerprint,
    Manifest,
    Shard,
    load_manifest,
    save_offsets,
)
from glowscale.data.sources import Sample, Split, UnreadableError
from glowscale.data.tar import read_samples
from glowscale.files import TEMPORARY, claim_folder, sha256_of, sync
from glowscale.randomness import generator

NOTE = "packing.json"


def pack(
    splits: Iterable[Split], folder: Path, shard_size: int, seed: int = 0, workers: int = 1
) -> list[Manifest]:
    """Pack every split into its folder below `folder`; what is already packed is left alone."""
    return [pack_split(split, folder / split.name, shard_size, seed, workers) for split in splits]


def pack_split(
    split: Split, folder: Path, shard_size: int, seed: int = 0, workers: int = 1
) -> Manifest:
    """Pack a split into `folder/shard-000000.tar ...`; the manifest comes last.

    The training split is packed in a seeded random order, for shards sorted by class would
    defeat the stream's block shuffling. Others keep the source's order.

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
    job = {"origin": split.origin, "shard_size": shard_size, "seed": seed}
    claim_folder(folder, NOTE, job)
    if (folder / MANIFEST).exists():
        return load_manifest(folder)
    order: Sequence[int] = range(split.size)
    if split.name == "train":
        order = generator(seed, "pack", split.name).permutation(split.size).tolist()
    fingerprint, offsets, shards = Fingerprint(), list[int](), list[Shard]()
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=split.size, desc=f"packing {split.name}", unit="img") as progress,
    ):
        for start in range(0, split.size, shard_size):
            samples = read_samples_of(split, order[start : start + shard_size], pool, progress)
            if not samples:
                continue
            for sample in samples:
                _check_pixels(sample, split)
                fingerprint.add(sample.key, sample.label, sample.image)
            path = folder / f"shard-{len(shards):06d}.tar"
            shard, shard_offsets = write_shard(path, samples)
            shards.append(shard)
            offsets += shard_offsets
    if not shards:
        raise DataError(f"No image of the split {split.name!r} of {split.origin} can be read.")
    manifest = Manifest(
        image_shape=split.image_shape,
        grey_levels=split.grey_levels,
        classes=split.classes,
        fingerprint=fingerprint.hexdigest(),
        offsets_sha256=save_offsets(folder, offsets),
        shards=tuple(shards),
    )
    manifest.save(folder)
    return manifest


def read_samples_of(
    split: Split, indices: Sequence[int], pool: ThreadPoolExecutor, progress: "tqdm[Any]"
) -> list[Sample]:
    """Samples of a split, in order; those that cannot be read are named on stderr and left out."""

    def read(index: int) -> Sample | UnreadableError:
        try:
            return split.sample(index)
        except UnreadableError as error:
            return error

    samples = []
    for result in pool.map(read, indices):
        if isinstance(result, UnreadableError):
            progress.write(f"skipped {result}", file=sys.stderr)
        else:
            samples.append(result)
        progress.update()
    return samples


def write_shard(path: Path, samples: Iterable[Sample]) -> tuple[Shard, list[int]]:
    """Write a shard of PNGs and labels; return its entry and where each sample starts.

    The bytes depend on the samples alone, and the file appears whole or not at all.
    """
    partial = path.with_name(path.name + TEMPORARY)
    with partial.open("wb") as file:
        writer = webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="")
        for sample in samples:
            label = {} if sample.label is None else {"cls": str(sample.label).encode()}
            writer.write({"__key__": sample.key, "png": encode_png(sample.image), **label})
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    with partial.open("rb") as written:
        offsets = [sample.offset for sample in read_samples(written, path.name)]
    shard = Shard(path.name, len(offsets), partial.stat().st_size, sha256_of(partial))
    os.replace(partial, path)
    sync(path.parent)
    return shard, offsets


def _check_pixels(sample: Sample, split: Split) -> None:
    if sample.image.shape != split.image_shape or sample.image.max() >= split.grey_levels:
        raise DataError(
            f"Image {sample.key!r} of shape {sample.image.shape} with values up to "
            f"{sample.image.max()} does not fit {split.image_shape} with {split.grey_levels} "
            f"grey levels."
        )
