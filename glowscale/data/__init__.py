"""Images on disk: sources, WebDataset shards with a manifest, and the resumable stream."""

from collections.abc import Callable, Mapping
from typing import Any

from glowscale.data.folder import folder
from glowscale.data.manifest import DataError, Manifest, load_manifest
from glowscale.data.shards import Batch, ShardSet
from glowscale.data.sources import Split, digits, idx
from glowscale.data.stream import check_lanes, training_stream
from glowscale.data.tar import ShardError

SOURCES: dict[str, Callable[..., list[Split]]] = {"digits": digits, "folder": folder, "idx": idx}
"""Sources by the name that a config or make_shards.py gives them."""

__all__ = [
    "SOURCES",
    "Batch",
    "DataError",
    "Manifest",
    "ShardError",
    "ShardSet",
    "check_lanes",
    "load_manifest",
    "open_source",
    "training_stream",
]


def open_source(kind: str, arguments: Mapping[str, Any]) -> list[Split]:
    """The splits of a source; raises DataError where it cannot be read."""
    return SOURCES[kind](**arguments)
