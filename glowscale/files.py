"""Where files lie, and writing them so that a kill or a full disk never leaves half of one."""

import fcntl
import hashlib
import json
import os
import re
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glowscale.errors import UserError

TEMPORARY = ".partial"
"""Suffix of what is not finished; nothing ever reads it."""


def is_url(location: str) -> bool:
    """Whether a location is no path of a local file.

    >>> [is_url(x) for x in ("data/train", "https://host/train", "pipe:cat train.tar")]
    [False, True, True]
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", location) is not None


def join(folder: str, name: str) -> str:
    """The location of a file in a folder; a name that is a location itself stays as it is."""
    if is_url(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it, whatever the file system refuses names the file, also a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside its place, sync it, then rename it there."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")  # ranks may collide
    try:
        with naming(path), partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_partials(path: Path) -> None:
    """Remove what killed jobs left of a file; for whoever alone makes it."""
    for partial in path.parent.glob(f"{path.name}.*{TEMPORARY}"):
        partial.unlink(missing_ok=True)


def append_durably(path: Path, line: bytes) -> None:
    """Append a line to a file and sync it; a kill may leave half of it, without its line end."""
    with naming(path), path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines, but for a last one that a kill has cut short; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(x) for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")]


def sync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ClaimError(UserError):
    """A folder that belongs to other work; the message names it."""


def claim_folder(folder: Path, note: str, job: dict[str, Any], begun: bool = True) -> None:
    """Note in a folder what is made there, so that only the same work is ever continued in it.

    Args:
        folder: made if need be.
        note: name of the JSON file that says what is made.
        job: what is made; plain values.
        begun: whether anything has been made; if not, another claim gives way.

    Raises:
        ClaimError: if the folder holds other work's results, or tars that nobody claimed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / note
    if any(folder.glob("*.tar")) and not path.exists():  # asked in this order: others may begin
        raise ClaimError(f"{folder} holds shards but no {note}; choose an empty folder.")
    if not path.exists() or not begun:
        write_atomically(path, json.dumps(job, indent=1).encode())
    try:
        found = dict(json.loads(path.read_bytes()))
    except ValueError as error:
        raise ClaimError(f"{path} is damaged ({error}); choose another folder.") from error
    for key in {**found, **job}:
        if found.get(key) != job.get(key):
            raise ClaimError(
                f"{folder} holds other work: its {key} is {found.get(key)!r}, not "
                f"{job.get(key)!r}; choose another folder."
            )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within it, no other process works in a folder; waits for one that does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "work.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that works in {folder}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
