"""The journal of a split in the making: a line a shard, from which a re-run continues."""

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from glowscale.data.errors import DataError
from glowscale.data.manifest import Fingerprint, Manifest, Shard, save_offsets
from glowscale.files import append_durably, write_atomically

MOST_NUMBERS = 100_000
"""Labels of this size are identities, not numbers of classes."""


class Part(NamedTuple):
    """What one shard adds to a split."""

    shard: Shard
    offsets: list[int]
    """Where its samples start, in bytes; those of other splits or unreadable ones are left out."""
    fingerprint: str
    """Of these samples."""
    classes: list[str]
    """Names of the classes that occur, where the split's are not known beforehand."""
    skipped: list[str]
    """What is wrong with each of the images that were left out."""


class Journal:
    """The parts that are done, in the file `shards.jsonl` of a split's folder.

    It stays there when the split is finished, as the record of what was skipped.

    Args:
        folder: the split's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "shards.jsonl"
        self.parts: list[Part] = []
        if self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]  # a kill may cut the last
            if len(whole) < len(lines):
                write_atomically(self.path, b"".join(whole))
            try:
                self.parts = [_part(json.loads(line)) for line in whole]
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{self.path} is damaged ({error!r}); pack again.") from error

    def add(self, part: Part) -> None:
        """Note a finished shard; it counts from here on."""
        record = {**part._asdict(), "shard": asdict(part.shard)}
        append_durably(self.path, json.dumps(record).encode() + b"\n")
        self.parts.append(part)

    @property
    def skipped(self) -> int:
        """Number of images that were left out."""
        return sum(len(part.skipped) for part in self.parts)

    def write_manifest(self, facts: Manifest) -> Manifest:
        """Save the manifest of all parts that have samples, and the offsets; last of all.

        Args:
            facts: what else the manifest says; its shards and hashes are filled in.
        """
        parts = [part for part in self.parts if part.offsets]
        offsets = [offset for part in parts for offset in part.offsets]
        manifest = replace(
            facts,
            fingerprint=Fingerprint.total(part.fingerprint for part in parts),
            offsets_sha256=save_offsets(self.path.parent, offsets),
            shards=tuple(part.shard for part in parts),
        )
        manifest.save(self.path.parent)
        return manifest


def classes_of(parts: Iterable[Part]) -> tuple[str, ...]:
    """The classes that occur: 0 to the largest where all are small numbers, else their names."""
    names = {name for part in parts for name in part.classes}
    numbers = [int(name) for name in names if name.isdecimal() and name == str(int(name))]
    if numbers and len(numbers) == len(names) and max(numbers) < MOST_NUMBERS:
        return tuple(str(number) for number in range(max(numbers) + 1))
    return tuple(sorted(names))


def _part(record: dict[str, Any]) -> Part:
    return Part(**{**record, "shard": Shard(**record["shard"])})
