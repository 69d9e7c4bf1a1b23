"""The training stream beside the plain webdataset pipeline and beside a bare loop.

One reading process; the bare loop, the floor, reads and decodes the same bytes and does no more.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import webdataset

from benchmarks.images import soft_shape
from glowscale.data import ShardSet, Slice, training_stream
from glowscale.data.images import decode_png
from glowscale.data.sources import Sample, Split
from glowscale.data.writer import pack_split
from glowscale.jobs import positive, say

BATCH = 64
LANES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark is told."""
    parser.add_argument("--shards", type=Path, help="a packed split; else images are made")
    parser.add_argument("--images", type=positive, default=20_000, help="of one measurement")
    parser.add_argument("--repeats", type=positive, default=5, help="measurements of each")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Images per second of the three streams, and the time to a first batch."""
    torch.set_num_threads(1)  # of one reader
    shards = ShardSet(arguments.shards or packed_clothes(folder, arguments.images))
    figures = compare_streams(shards, arguments.images, arguments.repeats)
    say(describe(shards, figures))
    return figures


def compare_streams(shards: ShardSet, images: int, repeats: int) -> dict[str, float]:
    """Images per second of our stream, webdataset's and the floor, taken in turn."""
    streams: dict[str, Callable[[ShardSet], Iterator[int]]] = {
        "ours": our_stream,
        "webdataset": webdatasets_stream,
        "floor": bare_loop,
    }
    speeds: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(repeats):
        for name, stream in streams.items():
            speeds[name].append(speed_of(stream(shards), images))
    figures = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    return {
        **figures,
        "ours_over_webdataset": round(figures["ours"] / figures["webdataset"], 3),
        "floor_over_ours": round(figures["floor"] / figures["ours"], 3),
        "seconds_to_first_batch": round(seconds_to_first_batch(shards, 0.0), 4),
        "seconds_to_first_batch_at_10_percent": round(seconds_to_first_batch(shards, 0.1), 4),
        "seconds_to_first_batch_at_90_percent": round(seconds_to_first_batch(shards, 0.9), 4),
    }


def speed_of(batches: Iterator[int], images: int) -> float:
    """Images per second of a stream that tells how many each of its batches has."""
    started, seen = time.perf_counter(), 0
    for count in batches:
        seen += count
        if seen >= images:
            break
    return seen / (time.perf_counter() - started)


def our_stream(shards: ShardSet) -> Iterator[int]:
    """The training stream in this process: shuffled, uint8, with labels and ids."""
    for part in stream_from(shards, cursor=0):
        yield len(part.batch.ids)


def stream_from(shards: ShardSet, cursor: int) -> Iterator[Slice]:
    """The training stream from a cursor on."""
    return training_stream(
        shards, seed=0, lanes=LANES, batch=BATCH, shuffle_block=256, cursor=cursor
    )


def webdatasets_stream(shards: ShardSet) -> Iterator[int]:
    """The plain pipeline of webdataset's documentation, which does not shuffle."""
    urls = [str(Path(shards.folder) / shard.name) for shard in shards.manifest.shards]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("torchrgb")
    while True:
        for images, _ in dataset.to_tuple("png", "cls").batched(BATCH):
            yield len(images)


def bare_loop(shards: ShardSet) -> Iterator[int]:
    """Read every shard whole and decode its PNGs, nothing else; where they lie is known."""
    places = [png_places(shards, number) for number in range(len(shards.manifest.shards))]
    while True:
        for shard, ranges in zip(shards.manifest.shards, places, strict=True):
            data = (Path(shards.folder) / shard.name).read_bytes()
            for start, stop in ranges:
                decode_png(data[start:stop])
            yield len(ranges)


def png_places(shards: ShardSet, number: int) -> list[tuple[int, int]]:
    """Where a shard's PNGs begin and end, in bytes."""
    shard = shards.manifest.shards[number]
    data = (Path(shards.folder) / shard.name).read_bytes()
    places, position = [], 0
    for sample in shards.read(number, 0, shard.samples):
        start = data.index(sample.files["png"], position)
        position = start + len(sample.files["png"])
        places.append((start, position))
    return places


def seconds_to_first_batch(shards: ShardSet, part: float) -> float:
    """How long a stream takes to begin when it resumes at a part of the first epoch."""
    cursor = int(part * shards.manifest.samples) // LANES * LANES
    started = time.perf_counter()
    next(stream_from(shards, cursor))
    return time.perf_counter() - started


def packed_clothes(folder: Path, images: int) -> Path:
    """Shards of grey 28×28 images with soft shapes on black, much like Fashion-MNIST's."""
    classes = tuple("0123456789")

    def sample(i: int) -> Sample:
        return Sample(f"{i:07d}", soft_shape(i, (1, 28, 28)), i % 10)

    split = Split("train", "soft shapes", (1, 28, 28), 256, classes, images, sample)
    pack_split(split, folder / "train", 1000, workers=2)
    return folder / "train"


def describe(shards: ShardSet, figures: dict[str, float]) -> str:
    """The figures in words."""
    manifest = shards.manifest
    shape = "×".join(map(str, manifest.image_shape))
    return (
        f"{manifest.samples:,} images of {shape} in {len(manifest.shards)} shards, one process:\n"
        f"  ours        {figures['ours']:>9,.0f} images/s\n"
        f"  webdataset  {figures['webdataset']:>9,.0f} images/s; ours is "
        f"{figures['ours_over_webdataset']:.2f} times as fast\n"
        f"  floor       {figures['floor']:>9,.0f} images/s, "
        f"{figures['floor_over_ours']:.2f} times as fast as ours\n"
        f"  first batch after {figures['seconds_to_first_batch']:.3f} s; at 10 % and 90 % of an "
        f"epoch after {figures['seconds_to_first_batch_at_10_percent']:.3f} and "
        f"{figures['seconds_to_first_batch_at_90_percent']:.3f} s"
    )
