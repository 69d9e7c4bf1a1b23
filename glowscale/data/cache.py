"""A local folder of shards that lie far away, bounded in size, shared by a node's processes."""

import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from glowscale.data.errors import DataError, ShardError
from glowscale.data.manifest import Shard
from glowscale.data.opening import READ_BYTES, Retry, Source
from glowscale.files import TEMPORARY


@dataclass(frozen=True)
class ShardCache:
    """Keeps copies of shards by their hash, the least recently used going first.

    A copy appears whole and verified or not at all. Processes that want the same shard wait for
    the one that fetches it. A file that is removed while another process reads it stays readable
    for that process.

    Args:
        folder: on a local disk; made if need be. Other runs may share it.
        most_bytes: all copies together take no more.
    """

    folder: Path
    most_bytes: int

    def fetch(self, location: str, shard: Shard, retry: Retry | None = None) -> Path:
        """The local copy of a shard.

        Raises:
            DataError: if the shard alone is larger than the cache.
            ShardError: if it cannot be read, or its hash is not the manifest's.
        """
        if shard.bytes > self.most_bytes:
            raise DataError(
                f"{location} has {shard.bytes:,} bytes, more than the whole cache of "
                f"{self.most_bytes:,}; raise data.cache.gigabytes."
            )
        copy = self.folder / f"{shard.sha256}.tar"
        if not self._touch(copy):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(f"{shard.sha256}.lock"):
                if not self._touch(copy):  # another process may have been faster
                    self._fill(copy, location, shard, retry)
        return copy

    def _fill(self, copy: Path, location: str, shard: Shard, retry: Retry | None) -> None:
        partial = copy.with_name(f"{copy.name}.{uuid.uuid4().hex}{TEMPORARY}")
        digest = hashlib.sha256()
        try:
            with (
                self._reserve(partial, shard.bytes) as file,
                Source(location, size=shard.bytes, retry=retry) as source,
            ):
                while data := source.read(READ_BYTES):
                    digest.update(data)
                    file.write(data)
            if digest.hexdigest() != shard.sha256:
                raise ShardError(f"{location} is damaged: its hash is not the manifest's.")
            os.replace(partial, copy)
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, partial: Path, size: int) -> BinaryIO:
        """A file that takes its room from the start, held by a lock as long as it is filled."""
        with self._locked("room.lock"):
            self._make_room(size)
            file = partial.open("wb")
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(size)
        return file

    def _make_room(self, size: int) -> None:
        """Remove what killed processes left, then the least recently used copies."""
        for path in self.folder.glob(f"*{TEMPORARY}"):
            if _is_abandoned(path):
                path.unlink(missing_ok=True)
        copies = [(path, path.stat()) for path in self.folder.glob("*.tar")]
        copies.sort(key=lambda found: found[1].st_mtime_ns)
        used = sum(path.stat().st_size for path in self.folder.glob("*.tar*"))
        for path, status in copies:
            if used + size <= self.most_bytes:
                return
            path.unlink(missing_ok=True)
            used -= status.st_size

    def _touch(self, copy: Path) -> bool:
        """Note a use; False where there is no copy."""
        try:
            os.utime(copy)
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.folder / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _is_abandoned(partial: Path) -> bool:
    """Whether nobody fills a file any more: its lock went with its process."""
    try:
        with partial.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return False
    return True
