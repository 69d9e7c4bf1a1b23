"""The training stream: an endless order of samples whose position is one number, the cursor.

Each epoch's shuffled shards form one line of samples, a pure function of (seed, epoch). The
line is cut into lanes, a number fixed in a run; a lane is read sequentially, in blocks that are
shuffled. Over all epochs a lane is an endless sequence, and a global batch takes the next
batch / lanes samples of every lane. Processes own lanes, and so do their workers; which reader
owns which lane changes nothing in what the lanes hold.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from glowscale.data.augmentation import NO_AUGMENTATION, Augmentation
from glowscale.data.errors import DataError
from glowscale.data.shards import Batch, ShardSet, cat_batches
from glowscale.data.tar import RawSample
from glowscale.errors import UserError
from glowscale.randomness import generator


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


@dataclass(frozen=True)
class LaneReader:
    """Reads lanes of a split in their shuffled order.

    Args:
        shards: the split.
        lanes: how epochs are cut.
        seed: seed of the order.
        shuffle_block: samples of a lane that are shuffled together, and so held in memory.
        augmentation: how images are changed, by (seed, epoch, id).
    """

    shards: ShardSet
    lanes: Lanes
    seed: int
    shuffle_block: int
    augmentation: Augmentation = NO_AUGMENTATION

    def read(self, lane: int, position: int) -> Iterator[tuple[RawSample, int, int]]:
        """Samples of a lane from a position on, without end, each with its id and epoch."""
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

    def decode(self, rows: list[tuple[RawSample, int, int]]) -> Batch:
        """Decode and augment what `read` gave."""
        samples, ids, epochs = zip(*rows, strict=True)
        batch = self.shards.decode(list(samples), list(ids), list(epochs))
        for image, identity, epoch in zip(batch.images, ids, epochs, strict=True):
            changed = self.augmentation(image, self.seed, epoch, identity)
            if changed is not image:
                image.copy_(changed)
        return batch

    def _read_line(
        self, epoch: int, origin: int, first: int, last: int
    ) -> list[tuple[RawSample, int]]:
        """Samples origin + first to origin + last of an epoch's line, with their ids."""
        manifest = self.shards.manifest
        order = generator(self.seed, "shards", epoch).permutation(len(manifest.shards))
        ends = np.cumsum(np.diff(manifest.starts)[order])
        start, stop = origin + first, origin + last
        result: list[tuple[RawSample, int]] = []
        place = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            shard = int(order[place])
            shard_start = int(ends[place]) - manifest.shards[shard].samples
            upto = min(stop, int(ends[place]))
            samples = self.shards.read(shard, start - shard_start, upto - shard_start)
            offset = int(manifest.starts[shard]) + start - shard_start
            result += zip(samples, range(offset, offset + len(samples)), strict=True)
            start, place = upto, place + 1
        return result


class _LaneSlices(IterableDataset[Batch | UserError]):
    """Endless slices of the global batches: `per_lane` samples of every lane in each.

    A DataLoader's worker yields those of its own part of the lanes, or what is wrong with them.
    """

    def __init__(
        self, reader: LaneReader, parts: list[range], position: int, per_lane: int
    ) -> None:
        self.reader = reader
        self.parts = parts
        self.position = position
        self.per_lane = per_lane

    def __iter__(self) -> Iterator[Batch | UserError]:
        info = get_worker_info()
        part = self.parts[info.id if info else 0]
        lanes = [self.reader.read(lane, self.position) for lane in part]
        try:
            while True:
                yield self.reader.decode(
                    [next(lane) for lane in lanes for _ in range(self.per_lane)]
                )
        except UserError as error:  # raised, it would reach the user as a worker's traceback
            yield error


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
) -> Iterator[Batch]:
    """This process's parts of the global batches from `cursor` on, without end.

    Rank r's part is the r-th of `world_size` equal slices of the global batch, so the batch is
    the same whatever the number of processes and workers.

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
    loader = DataLoader(slices, batch_size=None, num_workers=len(parts) if workers else 0)
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


def _joined(slices: Iterator[Batch | UserError], parts: int) -> Iterator[Batch]:
    """Join the workers' slices; the loader yields them in turn, worker by worker."""
    while True:
        joined: list[Batch] = []
        for part in (next(slices) for _ in range(parts)):
            if isinstance(part, UserError):
                raise part
            joined.append(part)
        yield cat_batches(joined)
