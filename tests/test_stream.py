"""The stream's order: every epoch exactly once, from any cursor, on any number of readers."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glowscale.data import Batch, DataError, ShardSet, training_stream
from glowscale.data.stream import LaneReader, Lanes


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
    return [next(stream) for _ in range(steps)]


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
