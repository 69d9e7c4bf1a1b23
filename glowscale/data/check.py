"""Whether a split is what its manifest says, byte by byte."""

import hashlib
from collections.abc import Iterator

from tqdm import tqdm

from glowscale.data.errors import DataError
from glowscale.data.manifest import OFFSETS, load_manifest
from glowscale.data.opening import READ_BYTES, Source
from glowscale.files import join


def damage_of(folder: str) -> Iterator[str]:
    """Read all files of a split, given by its path or URL; yield a sentence for each that is bad.

    Raises:
        DataError: if the manifest itself cannot be read.
    """
    manifest = load_manifest(folder)
    root = manifest.root or folder
    wanted: list[tuple[str, int | None, str]] = [
        (join(root, shard.name), shard.bytes, shard.sha256) for shard in manifest.shards
    ]
    wanted.append((join(folder, OFFSETS), None, manifest.offsets_sha256))
    for location, size, sha256 in tqdm(wanted, desc="checking", unit="file"):
        try:
            if _hash(location, size) != sha256:
                yield f"{location} is damaged: its hash is not the manifest's."
        except DataError as error:
            yield str(error)


def _hash(location: str, size: int | None) -> str:
    digest = hashlib.sha256()
    with Source(location, size=size) as source:
        while data := source.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
