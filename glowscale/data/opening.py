"""Opening what lies on a disk, behind HTTP, in an object store or behind a pipe, from any byte.

A transfer that breaks is taken up again where it broke, after a pause that grows. Where a source
knows ranges only what is asked for is sent; elsewhere what lies before is read and dropped.
"""

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self
from urllib.parse import urlsplit

import fsspec
import webdataset

from glowscale.data.errors import DataError, ShardError
from glowscale.files import is_url

READ_BYTES = 1 << 20
TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as broken."""
FOREVER = {400, 401, 403, 404, 405, 410}
"""HTTP's answers that another attempt will not change."""
BROKEN = (OSError, EOFError, http.client.HTTPException)
"""What a transfer that breaks may raise; urllib's and fsspec's errors are among them."""


@dataclass(frozen=True)
class Retry:
    """How often and after which pauses a transfer is tried again.

    Args:
        attempts: without a single new byte, before it is given up.
        pause: seconds before the second attempt; each further pause is twice as long.
    """

    attempts: int = 6
    pause: float = 0.5


class Source:
    """A file that can be read from any byte on, wherever it lies.

    Args:
        location: a path or URL.
        start: the first byte to be read.
        size: bytes that it must have; None where that is not known.
        retry: what is done about transfers that break.

    Raises:
        DataError: if it is not there, or has another size.
        ShardError: if it cannot be read even after all attempts.
    """

    def __init__(
        self, location: str, start: int = 0, size: int | None = None, retry: Retry | None = None
    ) -> None:
        self.location = location
        self.size = size
        self.retry = retry or Retry()
        self.position = start
        self._file: BinaryIO | None = None
        self._failures = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(self, size: int = -1) -> bytes:
        """So many bytes (all that are left if negative), fewer only at the end."""
        parts: list[bytes] = []
        wanted = size if size >= 0 else 1 << 62
        while wanted:
            data = self._attempt(min(wanted, READ_BYTES))
            if not data:
                break
            parts.append(data)
            wanted -= len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _attempt(self, size: int) -> bytes:
        """Up to so many bytes, none only at the end; tries again where the transfer breaks."""
        while True:
            try:
                if self._file is None:
                    self._file = self._open()
                data = self._file.read(size)
                if data or self.size is None or self.position >= self.size:
                    self.position += len(data)
                    self._failures = 0 if data else self._failures
                    return data
                reason: object = f"it ends at byte {self.position} of {self.size}"
            except BROKEN as error:
                reason = error
            self._fail(reason)

    def _fail(self, reason: object) -> None:
        """Count a failure and wait, or give up."""
        self._close()
        self._failures += 1
        forever = isinstance(reason, urllib.error.HTTPError) and reason.code in FOREVER
        if forever or not is_url(self.location) or self._failures >= self.retry.attempts:
            attempts = f" after {self._failures} attempts" if self._failures > 1 else ""
            raise ShardError(
                f"{self.location} cannot be read from byte {self.position}{attempts}: {reason}."
            ) from (reason if isinstance(reason, BaseException) else None)
        time.sleep(self.retry.pause * 2 ** (self._failures - 1))

    def _open(self) -> BinaryIO:
        """The file from `position` on, its size checked."""
        file, size = _opener(self.location)(self.location, self.position)
        if None not in (size, self.size) and size != self.size:
            file.close()
            raise DataError(f"{self.location} has {size} bytes; the manifest says {self.size}.")
        if self.size is None:
            self.size = size  # so that an answer that ends early is known as such
        return file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


Opened = tuple[BinaryIO, int | None]
"""A file from the byte on that was asked for, and its whole size where that is known."""


def _opener(location: str) -> Callable[[str, int], Opened]:
    if not is_url(location):
        return _open_local
    scheme = urlsplit(location).scheme
    if scheme in ("http", "https"):
        return _open_http
    return _open_pipe if scheme == "pipe" else _open_store


def _open_local(path: str, start: int) -> Opened:
    try:
        file = Path(path).open("rb", buffering=READ_BYTES)  # noqa: SIM115
    except FileNotFoundError:
        raise DataError(f"{path} is missing.") from None
    file.seek(start)
    return file, os.fstat(file.fileno()).st_size


def _open_http(url: str, start: int) -> Opened:
    headers = {"Range": f"bytes={start}-"} if start else {}
    answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    if answer.status == http.client.PARTIAL_CONTENT:
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        return answer, int(total) if total.isdecimal() else None
    length = answer.headers.get("Content-Length")
    _drop(answer, start)  # this server does not know ranges
    return answer, int(length) if length else None


def _open_pipe(url: str, start: int) -> Opened:
    file = webdataset.gopen(url, "rb")
    _drop(file, start)
    return file, None


def _open_store(url: str, start: int) -> Opened:
    """An object store, by fsspec where it has the scheme's package, else by webdataset."""
    scheme = urlsplit(url).scheme
    try:
        file = fsspec.open(url, "rb").open()
    except (ImportError, ValueError) as error:
        if scheme not in webdataset.gopen_schemes:
            raise DataError(f"{url} cannot be opened: {error}.") from error
        return _open_pipe(url, start)
    file.seek(start)
    return file, getattr(file, "size", None)


def _drop(file: BinaryIO, size: int) -> None:
    """Read and forget so many bytes."""
    while size:
        data = file.read(min(size, READ_BYTES))
        if not data:
            raise EOFError(f"it ends {size} bytes too early")
        size -= len(data)
