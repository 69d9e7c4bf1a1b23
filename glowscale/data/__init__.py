"""Images on disk: sources, WebDataset shards with a manifest, and the resumable stream."""

from glowscale.data.manifest import DataError, Manifest, load_manifest
from glowscale.data.shards import Batch, ShardSet
from glowscale.data.stream import check_lanes, training_stream
from glowscale.data.tar import ShardError

__all__ = [
    "Batch",
    "DataError",
    "Manifest",
    "ShardError",
    "ShardSet",
    "check_lanes",
    "load_manifest",
    "training_stream",
]
