"""The manifest: what a folder of shards holds, known before a byte of them is read.

A split is a folder of `shard-000000.tar ...` with `manifest.json` (the set's facts, each
shard's sample count, bytes and hash) and `offsets.safetensors` (where every sample starts;
apart, so that a manifest of many shards stays small).
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from glowscale.errors import UserError
from glowscale.files import write_atomically

FORMAT = "glowscale shards 1"
MANIFEST = "manifest.json"
OFFSETS = "offsets.safetensors"


class DataError(UserError):
    """A data set that is missing, damaged or of another kind; the message names it."""


@dataclass(frozen=True)
class Shard:
    """A tar file of a split."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a split holds."""

    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    grey_levels: int
    """Number of values that a pixel takes; pixels are below it."""
    classes: tuple[str, ...]
    """Names of the classes, empty where images have no label."""
    fingerprint: str
    """Identifies the set of samples (keys, labels, pixels), however it is packed or ordered."""
    offsets_sha256: str
    shards: tuple[Shard, ...]

    @cached_property
    def starts(self) -> np.ndarray:
        """Id of each shard's first sample, and the number of samples as its last entry, (S + 1,).

        A sample's id is its place in the manifest's order.
        """
        counts = [0, *(shard.samples for shard in self.shards)]
        return np.cumsum(counts, dtype=np.int64)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(self.starts[-1])

    def save(self, folder: Path) -> None:
        """Write `manifest.json`; last of all, for it says that the rest is there."""
        content = {"format": FORMAT, "samples": self.samples, **asdict(self)}
        write_atomically(folder / MANIFEST, json.dumps(content, indent=1).encode())


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a split.

    Raises:
        DataError: if there is none, or it is damaged or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST}; pack images with pipelines/make_shards.py.")
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise DataError(f"{path} has the format {content['format']!r}, not {FORMAT!r}.")
        return Manifest(
            image_shape=tuple(content["image_shape"]),
            grey_levels=content["grey_levels"],
            classes=tuple(content["classes"]),
            fingerprint=content["fingerprint"],
            offsets_sha256=content["offsets_sha256"],
            shards=tuple(Shard(**shard) for shard in content["shards"]),
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); pack the data again.") from error


def save_offsets(folder: Path, offsets: list[int]) -> str:
    """Write where every sample starts in its shard; return the file's hash."""
    data = save({"offsets": np.array(offsets, dtype=np.int64)})
    write_atomically(folder / OFFSETS, data)
    return hashlib.sha256(data).hexdigest()


def load_offset(folder: Path, sample: int) -> int:
    """Byte at which the sample with this id starts in its shard; reads no other offset.

    Raises:
        DataError: if the file of offsets is missing or damaged.
    """
    try:
        with safe_open(folder / OFFSETS, "numpy") as file:
            return int(file.get_slice("offsets")[sample : sample + 1][0])
    except (OSError, SafetensorError, IndexError) as error:
        raise DataError(f"{folder / OFFSETS} cannot be read ({error}); pack again.") from error


class Fingerprint:
    """Hashes a set of samples: equal for equal sets, whatever their order and packing.

    The sum of the samples' SHA-256 modulo 2²⁵⁶, so parts can be hashed apart and added.
    """

    def __init__(self) -> None:
        self._sum = 0

    def add(self, key: str, label: int | None, image: np.ndarray) -> None:
        """Take in a sample: its key, label and uint8 image (C, H, W)."""
        head = json.dumps([key, label, image.shape]).encode()
        digest = hashlib.sha256(head + b"\0" + image.tobytes()).digest()
        self._sum = (self._sum + int.from_bytes(digest, "big")) % 2**256

    def hexdigest(self) -> str:
        """The hash as 64 hexadecimal digits."""
        return f"{self._sum:064x}"
