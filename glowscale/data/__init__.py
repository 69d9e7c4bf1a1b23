"""Images on disk: sources, WebDataset shards with a manifest, and the resumable stream."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glowscale.data.augmentation import Augmentation
from glowscale.data.cache import ShardCache
from glowscale.data.digits import digits
from glowscale.data.errors import DataError, ShardError
from glowscale.data.existing import index_shards
from glowscale.data.folder import folder
from glowscale.data.idx import idx
from glowscale.data.manifest import Manifest, load_manifest
from glowscale.data.opening import Retry
from glowscale.data.shards import Batch, ShardSet
from glowscale.data.sources import Split
from glowscale.data.stream import Failure, Slice, check_lanes, training_stream
from glowscale.data.torchvision_sets import torchvision
from glowscale.data.writer import Packed, pack

SOURCES: dict[str, Callable[..., list[Split]]] = {
    "digits": digits,
    "folder": folder,
    "idx": idx,
    "torchvision": torchvision,
}
"""Sources that are packed, by the name that a config or make_shards.py gives them."""

__all__ = [
    "SOURCES",
    "Augmentation",
    "Batch",
    "DataError",
    "Failure",
    "Manifest",
    "Packed",
    "Retry",
    "ShardError",
    "ShardSet",
    "Slice",
    "check_lanes",
    "load_manifest",
    "make_shards",
    "open_cache",
    "open_source",
    "training_stream",
]


def open_cache(dir: Path | None, gigabytes: float) -> ShardCache | None:
    """The cache that a config asks for, if it does."""
    return ShardCache(dir, int(gigabytes * 1e9)) if dir else None


def open_source(kind: str, arguments: Mapping[str, Any]) -> list[Split]:
    """The splits of a source that is packed; raises DataError where it cannot be read."""
    if kind == "shards":
        raise DataError("Shards are known when they are indexed; run make_shards.py shards first.")
    return SOURCES[kind](**arguments)


def make_shards(
    kind: str,
    arguments: Mapping[str, Any],
    out: Path,
    shard_size: int = 10_000,
    seed: int = 0,
    workers: int = 1,
) -> dict[str, Packed]:
    """Pack a source, or index shards that there are already; by the splits' names.

    Args:
        kind: a key of `SOURCES`, or `shards`.
        arguments: the source's own.
        out: folder of the splits.
        shard_size: images a shard.
        seed: seed of the packing order.
        workers: threads that read images.

    Raises:
        DataError: where the source cannot be read.
        ClaimError: where `out` holds something else.
    """
    if kind == "shards":
        return index_shards(out, workers=workers, **arguments)
    return pack(open_source(kind, arguments), out, shard_size, seed, workers)
