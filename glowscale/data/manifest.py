"""The manifest: what a folder of shards holds, known before a byte of them is read.

A split is a folder of `shard-000000.tar ...` with `manifest.json` (the set's facts, each
shard's sample count, bytes and hash) and `offsets.safetensors` (where every sample starts;
apart, so that a manifest of many shards stays small).
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from glowscale.data.errors import DataError
from glowscale.data.layout import PACKED, Layout
from glowscale.data.opening import Retry, Source
from glowscale.data.view import View
from glowscale.files import is_url, join, write_atomically

FORMAT = "glowscale shards 1"
MANIFEST = "manifest.json"
OFFSETS = "offsets.safetensors"
WORD = 8
"""Bytes of an offset."""
MOST_HEADER = 10_000
"""Bytes that the header of the offsets has at most."""


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
    fingerprint: str = ""
    """Identifies the set of samples (keys, labels, pixels), however it is packed or ordered."""
    offsets_sha256: str = ""
    shards: tuple[Shard, ...] = ()
    root: str | None = None
    """Folder of the shards where it is not the manifest's own."""
    layout: Layout = PACKED
    """How the shards' samples are to be understood."""

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


def load_manifest(folder: str | Path, retry: Retry | None = None) -> Manifest:
    """Read the manifest of a split, from its folder's path or URL.

    Raises:
        DataError: if there is none, or it is damaged or of another format.
    """
    path = join(str(folder), MANIFEST)
    if not is_url(path) and not Path(path).is_file():
        raise DataError(f"{folder} has no {MANIFEST}; pack images with pipelines/make_shards.py.")
    try:
        with Source(path, retry=retry) as source:
            content = json.loads(source.read())
        if content["format"] != FORMAT:
            raise DataError(f"{path} has the format {content['format']!r}, not {FORMAT!r}.")
        return Manifest(
            image_shape=tuple(content["image_shape"]),
            grey_levels=content["grey_levels"],
            classes=tuple(content["classes"]),
            fingerprint=content["fingerprint"],
            offsets_sha256=content["offsets_sha256"],
            shards=tuple(Shard(**shard) for shard in content["shards"]),
            root=content.get("root"),
            layout=_layout(content["layout"]) if "layout" in content else PACKED,
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); pack the data again.") from error


def save_offsets(folder: Path, offsets: list[int]) -> str:
    """Write where every sample starts in its shard; return the file's hash."""
    data = save({"offsets": np.array(offsets, dtype=np.int64)})
    write_atomically(folder / OFFSETS, data)
    return hashlib.sha256(data).hexdigest()


class Offsets:
    """Where the samples of a split start in their shards, read by ranges of ids.

    Args:
        folder: the split's, a path or URL.
        samples: of the split.
        retry: what is done about transfers that break.
    """

    def __init__(self, folder: str, samples: int, retry: Retry | None = None) -> None:
        self.location = join(folder, OFFSETS)
        self.samples = samples
        self.retry = retry
        self._start: int | None = None

    def read(self, start: int, stop: int) -> list[int]:
        """Bytes at which the samples with ids start to stop (not included) begin.

        Raises:
            DataError: if the file is missing, damaged, or of another number of samples.
        """
        if self._start is None:
            self._start = self._read_header()
        size = self._start + WORD * self.samples
        with Source(self.location, self._start + WORD * start, size, self.retry) as source:
            data = source.read(WORD * (stop - start))
        return np.frombuffer(data, "<i8").tolist()

    def _read_header(self) -> int:
        """Where the numbers start: safetensors begins with the length of its JSON header."""
        with Source(self.location, retry=self.retry) as source:
            length = int.from_bytes(source.read(WORD), "little")
            content = source.read(min(length, MOST_HEADER))
        try:
            if json.loads(content)["offsets"]["shape"] == [self.samples]:
                return WORD + length
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.location} is damaged ({error!r}); pack again.") from error
        raise DataError(f"{self.location} is not of the manifest's samples; pack again.")


class Fingerprint:
    """Hashes a set of samples: equal for equal sets, whatever their order and packing.

    The sum of the samples' SHA-256 modulo 2²⁵⁶, so parts can be hashed apart and added.
    """

    def __init__(self) -> None:
        self._sum = 0

    def add(self, key: str, class_name: str | None, image: np.ndarray) -> None:
        """Take in a sample: its key, its class and its uint8 image (C, H, W)."""
        head = json.dumps([key, class_name, image.shape]).encode()
        digest = hashlib.sha256(head + b"\0" + image.tobytes()).digest()
        self._sum = (self._sum + int.from_bytes(digest, "big")) % 2**256

    def hexdigest(self) -> str:
        """The hash as 64 hexadecimal digits."""
        return f"{self._sum:064x}"

    @staticmethod
    def total(parts: Iterable[str]) -> str:
        """The hash of a set from those of its parts."""
        return f"{sum(int(part, 16) for part in parts) % 2**256:064x}"


def _layout(content: dict[str, Any]) -> Layout:
    view = content.pop("view")
    return Layout(**content | {"image": tuple(content["image"])}, view=view and View(**view))
