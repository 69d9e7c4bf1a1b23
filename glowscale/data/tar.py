"""A reader of WebDataset tars: large sequential reads, and the offset of every sample.

It understands what tar writers produce for regular files: ustar, GNU long names and sizes, and
pax paths and sizes. Everything else in the archive is passed over.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from glowscale.data.errors import ShardError

BLOCK = 512


class Readable(Protocol):
    """What a tar is read from."""

    def read(self, size: int, /) -> bytes:
        """So many bytes, fewer only at the end."""


class RawSample(NamedTuple):
    """A sample as it lies in a tar: consecutive members whose names agree up to the first dot."""

    key: str
    files: dict[str, bytes]
    """Contents by extension, without the leading dot."""
    offset: int
    """Where the sample's first header starts, in bytes."""


class Member(NamedTuple):
    """A regular file of a tar."""

    name: str
    data: bytes
    offset: int


def read_samples(file: Readable, name: str, offset: int = 0) -> Iterator[RawSample]:
    """Read samples from `file`, which stands at byte `offset` of the shard `name`.

    Raises:
        ShardError: if the archive ends early, is no tar, or repeats a member within a sample.
    """
    key, files, start = "", dict[str, bytes](), offset
    for member in read_members(file, name, offset):
        member_key, extension = split_name(member.name)
        if not extension or member_key.endswith("/") or not member_key:
            continue  # as in WebDataset: hidden files, and such as have no extension
        if member_key != key and files:
            yield RawSample(key, files, start)
            files = {}
        if not files:
            key, start = member_key, member.offset
        extension = extension.lower()  # as WebDataset does
        if extension in files:
            raise ShardError(f"{name} holds {member.name!r} twice.")
        files[extension] = member.data
    if files:
        yield RawSample(key, files, start)


def read_members(file: Readable, name: str, offset: int = 0) -> Iterator[Member]:
    """Read the regular files of a tar, in order; arguments and errors as `read_samples`."""
    start, extended = offset, dict[str, str]()
    while True:
        header = _read(file, BLOCK, name, offset)
        if header[0] == 0:  # two empty blocks end a tar
            return
        size = int(extended["size"]) if "size" in extended else _number(header[124:136], name)
        padded = -(-size // BLOCK) * BLOCK
        data = _read(file, padded, name, offset + BLOCK)[:size]
        kind = header[156:157]
        if header[257:262] != b"ustar":
            raise ShardError(f"{name} is no tar at byte {offset}: its header is damaged.")
        offset += BLOCK + padded
        if kind == b"L":
            extended["path"] = data.rstrip(b"\0").decode(errors="surrogateescape")
        elif kind == b"x":
            extended |= _pax_records(data, name)
        else:
            if kind in (b"0", b"\0"):
                yield Member(extended.get("path") or _header_name(header), data, start)
            start, extended = offset, {}


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member, split at its base name's first dot.

    >>> split_name("train/0001.seg.png")
    ('train/0001', 'seg.png')
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def _read(file: Readable, size: int, name: str, offset: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise ShardError(f"{name} is truncated: it ends at byte {offset + len(data)}.")
    return data


def _number(field: bytes, name: str) -> int:
    if field[0] & 0x80:  # GNU: base 256 for sizes of 8 GiB and more
        return int.from_bytes(field, "big") & ((1 << 88) - 1)
    try:
        return int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        raise ShardError(f"{name} is no tar: the size {field!r} is no number.") from None


def _header_name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0].decode(errors="surrogateescape")
    prefix = header[345:500].partition(b"\0")[0].decode(errors="surrogateescape")
    # GNU tars end their magic with a blank and use the prefix field for other things.
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _pax_records(data: bytes, name: str) -> dict[str, str]:
    """Records of the form `length key=value`, each with a line end."""
    records = {}
    while data:
        digits = data.partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        if not 0 < length <= len(data):
            raise ShardError(f"{name} is no tar: a record of its extended header is damaged.")
        keyword, _, value = data[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        records[keyword.decode(errors="surrogateescape")] = value.decode(errors="surrogateescape")
        data = data[length:]
    return records
