"""The training stream: an endless order of samples whose position is one number, the cursor.

Each epoch's shuffled shards form one line of samples, a pure function of (seed, epoch). The
line is cut into lanes, a number fixed in a run; a lane is read sequentially, in blocks that are
shuffled. Over all epochs a lane is an endless sequence, and a global batch takes the next
batch / lanes samples of every lane. Processes own lanes, and so do their workers; which reader
owns which lane changes nothing in what the lanes hold.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from glowscale.data.augmentation import NO_AUGMENTATION, Augmentation
from glowscale.data.errors import DataError
from glowscale.data.shards import Batch, ShardSet, cat_batches
from glowscale.data.tar import RawSample
from glowscale.randomness import generator
from glowscale.stopping import leave_signals_to_parent


@dataclass(frozen=True)
class Lanes:
    """How every epoch's line of samples is cut into lanes, in closed form.

    Lane l holds ⌊((e + 1)·N + l) / L⌋ samples of the epochs up to e. Summed over l that is
    (e + 1)·N, so every epoch is covered exactly once, and no two lanes ever differ by more than
    one sample: the tail of an epoch simply stands before the next one's first samples.

    Args:
        samples: N, samples of an epoch.
        count: L, number of lanes.

    >>> lanes = Lanes(samples=10, count=4)
    >>> [lanes.positions(lane, epoch=0) for lane in range(4)]
    [(0, 2), (0, 2), (0, 3), (0, 3)]
    >>> [lanes.positions(lane, epoch=1) for lane in range(4)]
    [(2, 5), (2, 5), (3, 5), (3, 5)]
    """

    samples: int
    count: int

    def positions(self, lane: int, epoch: int) -> tuple[int, int]:
        """Where the epoch begins and ends in the lane's endless sequence."""
        start = (epoch * self.samples + lane) // self.count
        stop = ((epoch + 1) * self.samples + lane) // self.count
        return start, stop

    def epoch_at(self, lane: int, position: int) -> int:
        """The epoch that a lane's position belongs to."""
        return -(-((position + 1) * self.count - lane) // self.samples) - 1

    def line_start(self, lane: int, epoch: int) -> int:
        """Where the lane's part begins in the epoch's line: after the lanes before it."""
        return self._before(lane, (epoch + 1) * self.samples) - self._before(
            lane, epoch * self.samples
        )

    def _before(self, lane: int, total: int) -> int:
        """Sum over l < lane of ⌊(total + l) / L⌋."""
        quotient, rest = divmod(total, self.count)
        return lane * quotient + max(0, lane - (self.count - rest))

    def legal_processes(self) -> list[int]:
        """The process counts that share the lanes evenly: the divisors of their number."""
        return [n for n in range(1, self.count + 1) if self.count % n == 0]


class Failure(NamedTuple):
    """A shard of which something could not be read."""

    shard: str
    sentence: str


class Slice(NamedTuple):
    """A part of a global batch."""

    batch: Batch
    """The samples; what could not be read is missing, a hole in the order of all others."""
    failures: list[Failure]
    """What is newly known to be unreadable."""


Row = tuple[RawSample | None, int, int]
"""A sample, or None for a hole, with its id and epoch."""


class LaneReader:
    """Reads lanes of a split in their shuffled order.

    What cannot be read leaves holes: the place, the id and all other samples stay as they are.

    Args:
        shards: the split.
        lanes: how epochs are cut.
        seed: seed of the order.
        shuffle_block: samples of a lane that are shuffled together, and so held in memory.
        augmentation: how images are changed, by (seed, epoch, id).
    """

    def __init__(
        self,
        shards: ShardSet,
        lanes: Lanes,
        seed: int,
        shuffle_block: int,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:
        self.shards = shards
        self.lanes = lanes
        self.seed = seed
        self.shuffle_block = shuffle_block
        self.augmentation = augmentation
        self._failures: dict[str, Failure] = {}
        self._told = 0
        self._lines: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def read(self, lane: int, position: int) -> Iterator[Row]:
        """Samples of a lane from a position on, without end."""
        while True:
            epoch = self.lanes.epoch_at(lane, position)
            start, stop = self.lanes.positions(lane, epoch)
            block, skipped = divmod(position - start, self.shuffle_block)
            first = block * self.shuffle_block
            last = min(first + self.shuffle_block, stop - start)
            samples = self._read_line(epoch, self.lanes.line_start(lane, epoch), first, last)
            order = generator(self.seed, "block", epoch, lane, block).permutation(last - first)
            for index in order[skipped:]:
                sample, identity = samples[index]
                yield sample, identity, epoch
            position = start + last

    def decode(self, rows: list[Row]) -> Slice:
        """Decode and augment what `read` gave."""
        kept: list[tuple[int, int]] = []
        images: list[Tensor] = []
        labels: list[int] = []
        for sample, identity, epoch in rows:
            if sample is None:
                continue
            try:
                image, label = self.shards.decode_sample(sample)
            except DataError as error:
                self._fail(self.shards.shard_of(identity), error)
                continue
            images.append(self.augmentation(image, self.seed, epoch, identity))
            labels.append(label)
            kept.append((identity, epoch))
        told, self._told = self._told, len(self._failures)
        return Slice(self.shards.batch(images, labels, kept), [*self._failures.values()][told:])

    def part_of_line(self, epoch: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The shards of a line's part, each with its first and last (not included) sample."""
        order, ends = self._line(epoch)
        place = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            shard, end = int(order[place]), int(ends[place])
            origin = end - self.shards.manifest.shards[shard].samples
            upto = min(stop, end)
            yield shard, start - origin, upto - origin
            start, place = upto, place + 1

    def _read_line(
        self, epoch: int, origin: int, first: int, last: int
    ) -> list[tuple[RawSample | None, int]]:
        """Samples origin + first to origin + last of an epoch's line, with their ids."""
        result: list[tuple[RawSample | None, int]] = []
        for shard, start, stop in self.part_of_line(epoch, origin + first, origin + last):
            offset = int(self.shards.manifest.starts[shard])
            ids = range(offset + start, offset + stop)
            result += zip(self._read_shard(shard, start, stop), ids, strict=True)
        return result

    def _read_shard(self, shard: int, start: int, stop: int) -> list[RawSample | None]:
        """Samples of a shard, or as many holes."""
        try:
            return [*self.shards.read(shard, start, stop)]
        except DataError as error:
            self._fail(shard, error)
            return [None] * (stop - start)

    def _fail(self, shard: int, error: DataError) -> None:
        """Remember the first thing that is wrong with a shard."""
        name = self.shards.manifest.shards[shard].name
        self._failures.setdefault(name, Failure(name, str(error)))

    def _line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the shards in an epoch, and where each one ends in the line."""
        if epoch not in self._lines:
            counts = np.diff(self.shards.manifest.starts)
            order = generator(self.seed, "shards", epoch).permutation(len(counts))
            # Lanes are never more than an epoch apart.
            self._lines = {e: x for e, x in self._lines.items() if abs(e - epoch) == 1}
            self._lines[epoch] = order, np.cumsum(counts[order])
        return self._lines[epoch]


class _LaneSlices(IterableDataset[Slice]):
    """Endless slices of the global batches: `per_lane` samples of every lane in each.

    A DataLoader's worker yields those of its own part of the lanes.
    """

    def __init__(
        self, reader: LaneReader, parts: list[range], position: int, per_lane: int
    ) -> None:
        self.reader = reader
        self.parts = parts
        self.position = position
        self.per_lane = per_lane

    def __iter__(self) -> Iterator[Slice]:
        info = get_worker_info()
        part = self.parts[info.id if info else 0]
        lanes = [self.reader.read(lane, self.position) for lane in part]
        while True:
            rows = [next(lane) for lane in lanes for _ in range(self.per_lane)]
            yield self.reader.decode(rows)


def training_stream(
    shards: ShardSet,
    *,
    seed: int,
    lanes: int,
    batch: int,
    shuffle_block: int,
    cursor: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    augmentation: Augmentation = NO_AUGMENTATION,
) -> Generator[Slice]:
    """This process's parts of the global batches from `cursor` on, without end.

    Rank r's part is the r-th of `world_size` equal slices of the global batch, so the batch is
    the same whatever the number of processes and workers. What cannot be read is missing from it
    and told in the slice's failures.

    Args:
        shards: the split to read.
        seed: seed of the order.
        lanes: number of lanes; must divide `batch`, and `world_size` must divide it.
        batch: samples of a global batch.
        shuffle_block: samples of a lane that are shuffled together.
        cursor: samples of the stream that came before, a multiple of `lanes`.
        rank: this process.
        world_size: number of processes.
        workers: reading processes of this process; 0 reads in this one.
        augmentation: how images are changed.

    Raises:
        DataError: for numbers that do not fit together.
    """
    plan = Lanes(shards.manifest.samples, lanes)
    check_lanes(lanes, batch, world_size)
    if cursor % lanes:
        raise DataError(f"The cursor {cursor} is no multiple of the {lanes} lanes.")
    own = np.array_split(np.arange(lanes), world_size)[rank]
    parts = np.array_split(own, max(1, min(workers, len(own))))
    slices = _LaneSlices(
        LaneReader(shards, plan, seed, shuffle_block, augmentation),
        [range(int(part[0]), int(part[-1]) + 1) for part in parts],
        cursor // lanes,
        batch // lanes,
    )
    loader = DataLoader(
        slices,
        batch_size=None,
        num_workers=len(parts) if workers else 0,
        worker_init_fn=leave_signals_to_parent,
    )
    yield from _joined(iter(loader), len(parts))


def check_lanes(lanes: int, batch: int, world_size: int) -> None:
    """Refuse a batch that lanes do not divide, and a number of processes that do not fit them."""
    if batch % lanes:
        raise DataError(f"The batch of {batch} must be a multiple of the {lanes} lanes.")
    if lanes % world_size:
        legal = ", ".join(map(str, Lanes(1, lanes).legal_processes()))
        raise DataError(
            f"{world_size} processes cannot share {lanes} lanes evenly; with data.lanes={lanes} "
            f"the process count must be one of {legal}."
        )


def _joined(slices: Iterator[Slice], parts: int) -> Iterator[Slice]:
    """Join the workers' slices; the loader yields them in turn, worker by worker."""
    while True:
        joined = [next(slices) for _ in range(parts)]
        failures = [failure for part in joined for failure in part.failures]
        yield Slice(cat_batches([part.batch for part in joined]), failures)
