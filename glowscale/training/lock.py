"""The lock of a run folder: one trainer at a time, and a dead one's lock is recognised."""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from accelerate.utils import gather_object

from glowscale.distributed import LaunchError
from glowscale.errors import UserError

LOCK = "lock.json"
BEAT_SECONDS = 5.0
STALE_SECONDS = 30.0
START_TOLERANCE = 2.0
SHARE_SECONDS = 30.0


class LockedError(UserError):
    """A run folder in which another trainer works; the message names both."""


class RunLock:
    """Holds a run folder's lock from construction to `release`, or to the process's end.

    The lock names host, process and the process's start. On the holder's own host a dead
    process is recognised at once; elsewhere by its heartbeat, the lock's modification time,
    which the holder renews every few seconds.

    Args:
        folder: the run folder; made if need be.
        stale_seconds: for so long a lock of another host must stand still to be taken over.

    Raises:
        LockedError: if another trainer holds it.
    """

    def __init__(self, folder: Path, stale_seconds: float = STALE_SECONDS) -> None:
        self.path = folder / LOCK
        self.identity = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": _start_of(os.getpid()),
            "token": uuid.uuid4().hex,
        }
        folder.mkdir(parents=True, exist_ok=True)
        while not self._take():
            self._remove_if_dead(stale_seconds)
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Give the lock back."""
        self._released.set()
        if _read(self.path).get("token") == self.identity["token"]:
            self.path.unlink(missing_ok=True)

    def _take(self) -> bool:
        """Create the lock whole, or fail because there is one."""
        partial = self.path.with_name(f"{LOCK}.{self.identity['token']}")
        partial.write_text(json.dumps(self.identity))
        try:
            os.link(partial, self.path)  # fails where the name exists, also over NFS
        except FileExistsError:
            return False
        finally:
            partial.unlink()
        return True

    def _remove_if_dead(self, stale_seconds: float) -> None:
        holder = _read(self.path)
        if holder and not self._is_dead(holder, stale_seconds):
            raise LockedError(
                f"{self.path.parent} is being trained in by process {holder['process']} on "
                f"{holder['host']}; wait for it, end it, or choose another run.dir."
            )
        # Of several that saw the same dead lock one removes it; a live one's is never removed.
        with self.path.with_name(f"{LOCK}.takeover").open("w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            if holder and _read(self.path).get("token") == holder["token"]:
                self.path.unlink()

    def _is_dead(self, holder: dict[str, Any], stale_seconds: float) -> bool:
        if holder["host"] == self.identity["host"]:
            # The clock's corrections may move a start by a little, as seen by another process.
            return abs(_start_of(holder["process"]) - holder["started"]) > START_TOLERANCE
        before, deadline = _modified(self.path), time.monotonic() + stale_seconds
        while time.monotonic() < deadline:
            if _modified(self.path) != before:
                return False
            time.sleep(min(1.0, stale_seconds / 10))
        return True

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self.path)


def refuse_unshared(folder: Path, seconds: float = SHARE_SECONDS) -> None:
    """Refuse processes that do not see the lock that the main one holds; all must call it.

    Args:
        folder: the run folder.
        seconds: so long a network's file system may take to show the lock.

    Raises:
        LaunchError: if a process sees no lock, or another.
    """
    token = gather_object([_read(folder / LOCK).get("token")])[0]
    deadline = time.monotonic() + seconds
    while _read(folder / LOCK).get("token") != token and time.monotonic() < deadline:
        time.sleep(0.2)
    shared = _read(folder / LOCK).get("token") == token
    hosts: list[str] = gather_object(["" if shared else socket.gethostname()])
    if apart := sorted({host for host in hosts if host}):
        raise LaunchError(
            f"The run folder {folder.resolve()} of the main process is not that of all others "
            f"(on {', '.join(apart)}); run.dir must be on a file system that all share."
        )


def _read(path: Path) -> dict[str, Any]:
    """A lock's content; empty where there is none."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}


def _modified(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return 0


def _start_of(process: int) -> float:
    """When a process of this host started, in seconds; 0 if it is dead. Tells reused ids apart."""
    try:
        found = psutil.Process(process)
        return 0.0 if found.status() == psutil.STATUS_ZOMBIE else float(found.create_time())
    except psutil.NoSuchProcess:
        return 0.0
