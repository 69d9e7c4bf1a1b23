"""Writing files so that a kill or a full disk never leaves half of one under its name."""

import hashlib
import os
from pathlib import Path

TEMPORARY = ".partial"
"""Suffix of what is not finished; nothing ever reads it."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside its place, sync it, then rename it there."""
    partial = path.with_name(path.name + TEMPORARY)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


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
