"""The stream's order: every epoch exactly once, from any cursor, on any number of readers."""

import tracemalloc
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glowscale.data import Batch, DataError, ShardSet, check_lanes, training_stream
from glowscale.data.manifest import Manifest, Shard, save_offsets
from glowscale.data.sources import Sample
from glowscale.data.stream import LaneReader, Lanes
from glowscale.data.writer import encode, write_shard


@given(samples=st.integers(1, 300), count=st.integers(1, 40), epochs=st.integers(1, 5))
def test_lanes_cover_every_epoch_exactly_once(samples: int, count: int, epochs: int) -> None:
    lanes = Lanes(samples, count)
    for epoch in range(epochs):
        end = 0
        for lane in range(count):
            start, stop = lanes.positions(lane, epoch)
            assert lanes.line_start(lane, epoch) == end
            end += stop - start
            assert all(lanes.epoch_at(lane, p) == epoch for p in range(start, stop))
        assert end == samples
    ends = [lanes.positions(lane, epochs - 1)[1] for lane in range(count)]
    assert max(ends) - min(ends) <= 1


def take(shards: ShardSet, steps: int, cursor: int = 0, **arguments: int) -> list[Batch]:
    options = {"seed": 3, "lanes": 4, "batch": 16, "shuffle_block": 10, **arguments}
    stream = training_stream(shards, cursor=cursor, **options)  # type: ignore[arg-type]
    return [next(stream).batch for _ in range(steps)]


def rows(batches: list[Batch]) -> list[tuple[int, int]]:
    return [row for b in batches for row in zip(b.epochs.tolist(), b.ids.tolist(), strict=True)]


@pytest.fixture(scope="module")
def shards(data_dir: Path) -> ShardSet:
    return ShardSet(data_dir / "train")


def test_every_epoch_holds_every_sample_once_in_an_order_of_its_own(shards: ShardSet) -> None:
    seen = rows(take(shards, steps=50))  # 800 samples, 4 epochs of 200
    assert Counter(seen) == Counter((e, i) for e in range(4) for i in range(200))
    orders = [[i for e, i in seen if e == epoch] for epoch in range(4)]
    assert all(order != sorted(order) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_an_epochs_tail_stands_before_the_next_ones_first_samples(shards: ShardSet) -> None:
    seen = rows(take(shards, steps=13))  # 208 samples
    assert Counter(e for e, _ in seen) == {0: 200, 1: 8}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(step=st.integers(0, 40), block=st.sampled_from([1, 7, 16, 1000]), seed=st.integers(0, 9))
def test_resuming_at_any_cursor_continues_the_same_order(
    shards: ShardSet, step: int, block: int, seed: int
) -> None:
    whole = rows(take(shards, steps=step + 3, shuffle_block=block, seed=seed))
    resumed = rows(take(shards, steps=3, cursor=16 * step, shuffle_block=block, seed=seed))
    assert resumed == whole[16 * step :]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_processes(shards: ShardSet, world_size: int) -> None:
    expected = take(shards, steps=20)
    parts = [take(shards, steps=20, rank=r, world_size=world_size) for r in range(world_size)]
    for step, batch in enumerate(expected):
        joined = [i for part in parts for i in part[step].ids.tolist()]
        assert joined == batch.ids.tolist()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_do_not_change_the_order(shards: ShardSet, workers: int) -> None:
    expected = take(shards, steps=8, cursor=16)
    found = take(shards, steps=8, cursor=16, workers=workers)
    assert rows(found) == rows(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.images.equal(b.images)
        assert a.labels.equal(b.labels)


def test_fewer_samples_than_lanes_still_flow(data_dir: Path) -> None:
    held_out = ShardSet(data_dir / "test")  # 37 samples
    seen = rows(take(held_out, steps=37, lanes=64, batch=64))
    assert Counter(seen) == Counter((e, i) for e in range(64) for i in range(37))


def test_samples_come_with_their_own_pixels_and_labels(shards: ShardSet) -> None:
    ordered = shards.read_batch(0, 200)
    for batch in take(shards, steps=14):
        assert batch.images.equal(ordered.images[batch.ids])
        assert batch.labels.equal(ordered.labels[batch.ids])


def test_a_lane_reads_no_more_than_a_block_to_resume(shards: ShardSet) -> None:
    reads: list[int] = []

    class Counting(ShardSet):
        def read(self, shard: int, start: int, stop: int) -> list:  # type: ignore[type-arg]
            reads.append(stop - start)
            return super().read(shard, start, stop)

    reader = LaneReader(Counting(shards.folder), Lanes(200, 2), seed=0, shuffle_block=10)
    next(reader.read(lane=1, position=87))
    assert sum(reads) == 10


def test_numbers_that_do_not_fit_are_refused_with_what_would(shards: ShardSet) -> None:
    with pytest.raises(DataError, match="must be one of 1, 2, 4"):
        take(shards, steps=1, world_size=3)
    with pytest.raises(DataError, match="multiple of the 4 lanes"):
        take(shards, steps=1, batch=18)


def uneven_shards(folder: Path, sizes: list[int]) -> ShardSet:
    """A split whose shards have these sizes; images of 2×2 that tell their number."""
    samples = iter(range(sum(sizes)))
    shards, offsets = [], []
    folder.mkdir()
    for number, size in enumerate(sizes):
        images = [(i, np.full((1, 2, 2), i % 256, np.uint8)) for i in islice(samples, size)]
        encoded = [encode(Sample(f"{i:05d}", image, None)) for i, image in images]
        shard, starts = write_shard(folder / f"{number}.tar", encoded)
        shards.append(shard)
        offsets += starts
    digest = save_offsets(folder, offsets)
    Manifest((1, 2, 2), 256, (), "0", digest, tuple(shards)).save(folder)
    return ShardSet(folder)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    lanes=st.sampled_from([1, 2, 4, 6, 12]),
    per_lane=st.integers(1, 3),
    block=st.integers(1, 12),
    world_sizes=st.lists(st.integers(1, 12), min_size=3, max_size=3),
    kills=st.lists(st.integers(0, 5), min_size=2, max_size=2),
    lost=st.booleans(),
)
def test_killed_resized_and_damaged_streams_go_on_as_if_nothing_had_happened(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    lanes: int,
    per_lane: int,
    block: int,
    world_sizes: list[int],
    kills: list[int],
    lost: bool,
) -> None:
    """Any shards, lanes, batches; killed twice, each time another number of processes."""
    shards = uneven_shards(tmp_path_factory.mktemp("uneven") / "x", sizes)
    batch, steps = lanes * per_lane, 3 * sum(sizes) // (lanes * per_lane) + 12

    def batches(cursor: int, world_size: int, count: int) -> list[list[tuple[int, int]]]:
        streams = [
            training_stream(
                shards,
                seed=5,
                lanes=lanes,
                batch=batch,
                shuffle_block=block,
                cursor=cursor,
                rank=rank,
                world_size=world_size,
            )
            for rank in range(world_size)
        ]
        return [rows([next(stream).batch for stream in streams]) for _ in range(count)]

    whole = batches(0, 1, steps)
    seen = [row for step in whole for row in step]
    epochs = {epoch for epoch, _ in seen[:-1]}
    for epoch in epochs - {max(epochs)}:  # the last one is not over
        assert sorted(i for e, i in seen if e == epoch) == list(range(sum(sizes)))
    if lost:
        Path(shards.folder, "0.tar").unlink()
        whole = [[(e, i) for e, i in step if i >= sizes[0]] for step in whole]
    legal = [n for n in range(1, lanes + 1) if lanes % n == 0]
    done: list[list[tuple[int, int]]] = []
    for world_size, count in zip(world_sizes, [*kills, steps], strict=True):
        world = legal[world_size % len(legal)]
        done += batches(len(done) * batch, world, min(count, steps - len(done)))
    assert done == whole


def test_a_hundred_thousand_shards_are_shared_by_32_768_readers(tmp_path: Path) -> None:
    """4,096 processes of 8 workers: each finds its part at once and in little memory."""
    readers, count = 4096 * 8, 100_000
    sizes = np.random.default_rng(0).integers(500, 1500, count)
    entries = tuple(Shard(f"{i}.tar", int(n), 0, "") for i, n in enumerate(sizes))
    Manifest((3, 64, 64), 256, (), shards=entries).save(tmp_path)
    shards = ShardSet(tmp_path)
    samples = shards.manifest.samples
    lanes = Lanes(samples, readers)
    check_lanes(readers, 32_768, 4096)
    epoch, end = 3, 0
    for lane in range(readers):
        assert lanes.line_start(lane, epoch) == end
        start, stop = lanes.positions(lane, epoch)
        end += stop - start
    assert end == samples
    pieces: dict[int, list[tuple[int, int]]] = {}
    some = range(20_000, 20_032)
    tracemalloc.start()
    for lane in some:
        reader = LaneReader(shards, lanes, seed=0, shuffle_block=1024)
        first = lanes.line_start(lane, epoch)
        start, stop = lanes.positions(lane, epoch)
        for shard, low, high in reader.part_of_line(epoch, first, first + stop - start):
            pieces.setdefault(shard, []).append((low, high))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    assert sum(high - low for found in pieces.values() for low, high in found) == sum(
        np.subtract(*lanes.positions(lane, epoch)[::-1]) for lane in some
    )
    whole = 0
    for shard, found in pieces.items():  # disjoint, and within a shard one after the other
        found.sort()
        assert all(a[1] == b[0] for a, b in pairwise(found))
        assert 0 <= found[0][0] < found[-1][1] <= sizes[shard]
        whole += found == [(0, int(sizes[shard]))] or found[-1][1] - found[0][0] == sizes[shard]
    assert whole >= len(pieces) - 2  # all but the first and the last are complete
