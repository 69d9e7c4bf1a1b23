"""Shards that other tools have written: indexed where they are, read but never changed."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from braceexpand import braceexpand
from tqdm import tqdm

from glowscale.data.errors import DataError, ShardError, UnreadableError
from glowscale.data.journal import Journal, Part, classes_of
from glowscale.data.layout import IMAGE_EXTENSIONS, Layout, split_label
from glowscale.data.manifest import MANIFEST, Fingerprint, Manifest, Shard, load_manifest
from glowscale.data.opening import Source
from glowscale.data.sources import files_below, identity_of, is_held_out
from glowscale.data.tar import RawSample, read_samples
from glowscale.data.view import View
from glowscale.data.writer import WINDOW, Packed, read_all
from glowscale.files import alone_in, claim_folder, is_url

NOTE = "index.json"


class Tar(NamedTuple):
    """A shard to be indexed."""

    name: str
    """As the manifest calls it."""
    location: str
    size: int | None
    """In bytes, where that is known beforehand."""


Shape = tuple[int, int, int]


class Facts(NamedTuple):
    """What the index needs to know of a sample."""

    offset: int
    class_name: str | None
    fingerprint: str


def index_shards(
    out: Path,
    path: str | Path,
    *,
    split: str | None = None,
    held_out: float = 0.1,
    resolution: int | None = None,
    channels: int = 3,
    grey_levels: int = 256,
    image: str | None = None,
    label: str | None = "cls",
    workers: int = 1,
) -> dict[str, Packed]:
    """Index the tars below a folder: which samples they hold, where, and what they are.

    Every image is read once, so that one that cannot be is known, named and left out.

    Args:
        out: folder of the splits' manifests.
        path: the shards' folder, whose sub-folders count, or URLs in braces: x/{000..127}.tar.
        split: name of the split that all samples are of; else they are parted by key.
        held_out: part of the samples that the split `test` gets, about; the rest is `train`.
        resolution: side of the images, see `View`; if not given, all must have one size.
        channels: 3 for colour, 1 for grey.
        grey_levels: so many values of a pixel are told apart.
        image: extension of the image, where samples have several.
        label: `cls`, `txt`, `json.FIELD`, or None; samples may lack it.
        workers: threads that read images.

    Raises:
        DataError: if there are no shards, or images differ in size and no resolution is given.
        ShardError: if a shard is damaged, or holds a key twice.
        ClaimError: if `out` holds something else.
    """
    root, tars = _find(str(path))
    if label is not None and split_label(label) == ("json", ""):
        raise DataError("The label 'json' names no field; give json.FIELD.")
    names = (image.lower().lstrip("."),) if image else IMAGE_EXTENSIONS
    layout = Layout(names, label, by_name=True, view=View(resolution, channels, grey_levels))
    splits = [split] if split else ["train", "test"] if held_out else ["train"]
    task = _Task(root, tars, layout, splits, held_out)
    with ExitStack() as held:
        for name in splits:
            held.enter_context(alone_in(out / name))
        journals = {name: Journal(out / name) for name in splits}
        task.claim(out, journals)
        already = all((out / name / MANIFEST).exists() for name in journals)
        if not already:
            task.run(list(journals.values()), workers)
        return {
            name: Packed(load_manifest(out / name), journal.skipped, already)
            for name, journal in journals.items()
        }


def _find(path: str) -> tuple[str | None, list[Tar]]:
    """The folder of the shards, if they lie in one, and the shards."""
    if is_url(path):
        return None, [Tar(url, url, None) for url in braceexpand(path)]
    root = Path(path).resolve()
    files = sorted(file for file in files_below(root) if file.suffix == ".tar")
    if not files:
        raise DataError(f"{path} is no folder with WebDataset shards (*.tar) in it.")
    return str(root), [
        Tar(file.relative_to(root).as_posix(), str(file), file.stat().st_size) for file in files
    ]


@dataclass(frozen=True)
class _Task:
    """What is indexed, and how."""

    root: str | None
    tars: list[Tar]
    layout: Layout
    splits: list[str]
    held_out: float

    def claim(self, out: Path, journals: Mapping[str, Journal]) -> None:
        """Claim the splits' folders for these shards."""
        job = {
            "path": self.root,
            "files": identity_of((tar.name, tar.size) for tar in self.tars),
            "splits": self.splits,
            "held_out": self.held_out,
            **json.loads(json.dumps(asdict(self.layout))),
        }
        begun = any(journal.parts for journal in journals.values())
        for name in self.splits:
            claim_folder(out / name, NOTE, job, begun)

    def run(self, journals: list[Journal], workers: int) -> None:
        """Index the shards that a journal lacks, then write the manifests."""
        shape = self._first_shape()
        ends = list(accumulate(tar.size or 0 for tar in self.tars))
        with (
            ThreadPoolExecutor(workers) as pool,
            tqdm(total=ends[-1] or None, desc="indexing", unit="B", unit_scale=True) as progress,
        ):
            for number, tar in enumerate(self.tars):
                if any(len(journal.parts) == number for journal in journals):
                    parts = self._index(tar, shape, pool, progress)
                    for journal, part in zip(journals, parts, strict=True):
                        if len(journal.parts) == number:  # a kill may fall between two
                            journal.add(part)
                progress.update(max(0, ends[number] - progress.n))
        classes = classes_of(part for journal in journals for part in journal.parts)
        if not classes and self.layout.label not in (None, "cls"):
            raise DataError(f"No sample of the shards has a label {self.layout.label!r}.")
        view = self.layout.view or View()
        for name, journal in zip(self.splits, journals, strict=True):
            if not any(part.offsets for part in journal.parts):
                raise DataError(f"No readable image of the shards is of the split {name!r}.")
            journal.write_manifest(
                Manifest(shape, view.grey_levels, classes, root=self.root, layout=self.layout)
            )

    def _index(
        self, tar: Tar, shape: Shape, pool: ThreadPoolExecutor, progress: "tqdm[Any]"
    ) -> list[Part]:
        """What a shard adds to each split."""
        facts: dict[str, list[Facts]] = {split: [] for split in self.splits}
        skipped: dict[str, list[str]] = {split: [] for split in self.splits}

        def read(sample: RawSample) -> Facts:
            return self._read(sample, shape, f"{tar.location}, sample {sample.key!r}")

        with Source(tar.location, size=tar.size) as source:
            hashing = _Hashing(source)
            samples = _refuse_duplicates(read_samples(hashing, tar.location), tar.location)
            while window := list(islice(samples, WINDOW)):
                for split in self.splits:
                    mine = [s for s in window if self._split_of(s.key) == split]
                    found, unread = read_all(mine, read, pool, progress, _bytes_of)
                    facts[split] += found
                    skipped[split] += unread
            digest = hashing.finish()
            size = source.position
        return [
            Part(
                shard=Shard(tar.name, len(facts[split]), size, digest),
                offsets=[fact.offset for fact in facts[split]],
                fingerprint=Fingerprint.total(fact.fingerprint for fact in facts[split]),
                classes=sorted({fact.class_name for fact in facts[split] if fact.class_name}),
                skipped=skipped[split],
            )
            for split in self.splits
        ]

    def _split_of(self, key: str) -> str:
        return self.splits[-1 if is_held_out(key, self.held_out) else 0]

    def _read(self, sample: RawSample, shape: Shape, where: str) -> Facts:
        image = self._read_image(sample, where)
        try:
            class_name = self.layout.read_label(sample.files)
        except UnreadableError as error:
            raise UnreadableError(f"{where}: {error}.") from error
        if image.shape != shape:
            raise DataError(
                f"{where} has the shape {image.shape}, others {shape}; give a resolution that all "
                f"are resized to."
            )
        fingerprint = Fingerprint()
        fingerprint.add(sample.key, class_name, image)
        return Facts(sample.offset, class_name, fingerprint.hexdigest())

    def _read_image(self, sample: RawSample, where: str) -> np.ndarray:
        try:
            return self.layout.read_image(sample.files)
        except DataError as error:
            raise type(error)(f"{where}: {error}.") from error

    def _first_shape(self) -> Shape:
        """Shape of the first image that can be read."""
        for tar in self.tars:
            with Source(tar.location, size=tar.size) as source:
                for sample in read_samples(source, tar.location):
                    where = f"{tar.location}, sample {sample.key!r}"
                    with suppress(UnreadableError):
                        channels, height, width = self._read_image(sample, where).shape
                        return channels, height, width
        raise DataError("No sample of the shards has an image that can be read.")


class _Hashing:
    """A file that is hashed while it is read."""

    def __init__(self, file: Source) -> None:
        self.file = file
        self.hash = hashlib.sha256()

    def read(self, size: int) -> bytes:
        """Read and hash."""
        data = self.file.read(size)
        self.hash.update(data)
        return data

    def finish(self) -> str:
        """Read what is left; return the whole file's SHA-256."""
        while self.read(1 << 20):
            pass
        return self.hash.hexdigest()


def _refuse_duplicates(samples: Iterable[RawSample], shard: str) -> Iterator[RawSample]:
    seen: set[str] = set()
    for sample in samples:
        if sample.key in seen:
            raise ShardError(f"{shard} holds the sample {sample.key!r} twice.")
        seen.add(sample.key)
        yield sample


def _bytes_of(sample: RawSample) -> int:
    return sum(map(len, sample.files.values()))
