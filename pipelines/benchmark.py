"""Speed beside peers and beside the floor, in one run on the same data; medians of several.

python pipelines/benchmark.py data: the training stream, images per second of one reading process,
beside the plain webdataset pipeline and beside a bare loop that reads and decodes the same bytes.

python pipelines/benchmark.py checkpoint: what a save costs the training, the mean time of so many
steps with one save in them beside the mean of as many without.

python pipelines/benchmark.py ffjord: a step of a continuous flow, at the original code's reference
setting (28×28 images, three levels, two flows in a row, hidden 64-64-64, dopri5 at 1e-5, batch 32)
and by a cheaper recipe: a flow a stage, a fixed grid, regularized, through the solver's steps.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from accelerate.state import AcceleratorState

from glowscale.config import parse_config
from glowscale.data import ShardSet, Slice, training_stream
from glowscale.data.images import decode_png
from glowscale.data.sources import Sample, Split
from glowscale.data.writer import pack_split
from glowscale.distributed import start_accelerator
from glowscale.jobs import job, positive, report, run, say
from glowscale.training import Trainer

BATCH = 64
LANES = 8


def main() -> None:
    """Run the benchmark that is asked for."""
    arguments = parse_arguments()
    with job(), tempfile.TemporaryDirectory() as folder:
        figures = arguments.measure(arguments, Path(folder))
        if arguments.json:
            report(figures)


def measure_streams(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The benchmark of the training stream."""
    torch.set_num_threads(1)  # of one reader
    shards = ShardSet(arguments.shards or packed_clothes(folder, arguments.images))
    figures = compare_streams(shards, arguments.images, arguments.repeats)
    say(describe(shards, figures))
    return figures


def measure_saves(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The benchmark of saving: steps with a save among them beside steps without, in turn."""
    trainer = wide_trainer(arguments, folder)
    steps = Steps(trainer, arguments.batch)
    steps.mean_seconds(2, save=False)
    steps.mean_seconds(2, save=True)  # the copies' memory is taken once
    trainer.finish_saving()
    without, with_save, blocked = [], [], []
    for _ in range(arguments.repeats):
        without.append(steps.mean_seconds(arguments.steps, save=False))
        with_save.append(steps.mean_seconds(arguments.steps, save=True))
        blocked.append(steps.blocked)
        started = time.perf_counter()
        trainer.finish_saving()  # a save that outlasts the steps must not burden the next
        waited = time.perf_counter() - started
    newest = max(trainer.folder.checkpoints.glob("images-*"))
    size = sum(path.stat().st_size for path in newest.iterdir())
    parameters = sum(p.numel() for p in trainer.state.model.parameters())
    figures = {
        "parameters": parameters,
        "bytes": size,
        "steps": arguments.steps,
        "seconds_per_step": round(statistics.median(without), 4),
        "seconds_per_step_with_save": round(statistics.median(with_save), 4),
        "ratio": round(
            statistics.median(b / a for a, b in zip(without, with_save, strict=True)), 4
        ),
        "seconds_blocked": round(statistics.median(blocked), 3),
        "seconds_left_after_the_steps": round(waited, 3),
    }
    say(
        f"{parameters:,} parameters, {size / 1e6:,.0f} MB a checkpoint, "
        f"{arguments.steps} steps of {arguments.batch} images:\n"
        f"  a step without a save {figures['seconds_per_step']:.3f} s, with one among them "
        f"{figures['seconds_per_step_with_save']:.3f} s: {figures['ratio']:.4f} times\n"
        f"  the save itself blocks for {figures['seconds_blocked']:.3f} s"
    )
    return figures


def wide_trainer(arguments: argparse.Namespace, folder: Path) -> Trainer:
    """A trainer of the paper's CIFAR-10 Glow, on random images."""

    def sample(i: int) -> Sample:
        rng = np.random.default_rng(i)
        return Sample(f"{i:04d}", rng.integers(0, 256, (3, 32, 32), dtype=np.uint8), None)

    for name in ("train", "test"):
        split = Split(name, "noise", (3, 32, 32), 256, (), 64, sample)
        pack_split(split, folder / "data" / name, 64)
    config = {
        "run": {"dir": str(folder / "run")},
        "data": {"dir": str(folder / "data"), "lanes": 1},
        "model": {
            "family": "glow",
            "levels": 3,
            "depth": arguments.depth,
            "hidden_channels": arguments.width,
        },
        "train": {
            "images": 10**9,
            "batch": arguments.batch,
            "init_images": 16,
            "optimizer": {"kind": "adamax", "lr": 1e-7},  # noise teaches nothing
        },
    }
    return Trainer(parse_config(config), start_accelerator())


REFERENCE = {
    "family": "ffjord",
    "levels": 3,
    "depth": 2,
    "hidden_channels": [64, 64, 64],
    "time": "concat",
    "solver": {"method": "dopri5", "tolerance": 1e-5},
    "gradient": "adjoint",
}
RECIPE = {
    **REFERENCE,
    "depth": 1,
    "solver": {"method": "midpoint", "steps": 2},
    "gradient": "direct",
    "kinetic": 0.01,
    "frobenius": 0.01,
}


def measure_ffjord(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The benchmark of the continuous flow, one step of each kind in turn."""
    shards = packed_clothes(folder / "data", 64)
    pack_held_out(shards)
    steps = {}
    for name, model in (("reference", REFERENCE), ("recipe", RECIPE)):
        config = {
            "run": {"dir": str(folder / name)},
            "data": {"dir": str(folder / "data"), "lanes": 1},
            "model": model,
            "train": {"images": 10**9, "batch": 32, "init_images": 16, "clip": 10.0},
        }
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = Trainer(parse_config(config), start_accelerator())
        if name == "reference":
            start_as_the_original(trainer)
        steps[name] = Steps(trainer, 32)
        steps[name].mean_seconds(1, save=False)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.repeats):
        for name in steps:
            seconds[name].append(steps[name].mean_seconds(1, save=False))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    told = steps["reference"].trainer.state.model.figures()
    forward, backward = told["forward_evaluations"], told["backward_evaluations"]
    figures = {
        "step_seconds": round(medians["reference"], 3),
        "nfe": forward + backward,
        "nfe_forward": forward,
        "nfe_backward": backward,
        "seconds_per_evaluation": round(medians["reference"] / (forward + backward), 5),
        "images_per_second": round(32 / medians["reference"], 3),
        "recipe_images_per_second": round(32 / medians["recipe"], 3),
    }
    say(
        f"reference: {figures['step_seconds']:.2f} s a step, {forward:.0f} + {backward:.0f} "
        f"evaluations, {1000 * figures['seconds_per_evaluation']:.1f} ms each, "
        f"{figures['images_per_second']:.2f} images/s\n"
        f"recipe: {figures['recipe_images_per_second']:.2f} images/s"
    )
    return figures


def start_as_the_original(trainer: Trainer) -> None:
    """Give the velocities' last layers the size that PyTorch's own initialization has."""
    for name, parameter in trainer.state.model.named_parameters():
        if "velocity" in name and parameter.shape[:1] != (64,) and parameter.dim() == 4:
            torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)


def pack_held_out(train: Path) -> None:
    """A held-out split, which a trainer wants, of the training's own images."""
    shards = ShardSet(train)
    images = shards.read_batch(0, 8).images.numpy()
    split = Split(
        "test", "soft shapes", (1, 28, 28), 256, (), 8, lambda i: Sample(str(i), images[i], None)
    )
    pack_split(split, train.parent / "test", 64)


class Steps:
    """Updates of a trainer on one fixed batch, and their time."""

    def __init__(self, trainer: Trainer, batch: int) -> None:
        self.trainer = trainer
        self.part = Slice(trainer.train_shards.read_batch(0, batch), [])
        self.blocked = 0.0
        """Seconds that the last save kept the training waiting."""

    def mean_seconds(self, count: int, save: bool) -> float:
        """The mean of so many updates; one in their middle may be followed by a save."""
        begun = time.perf_counter()
        for number in range(count):
            self.trainer.update(self.part)
            if save and number == count // 5:
                started = time.perf_counter()
                self.trainer.save()
                self.blocked = time.perf_counter() - started
        return (time.perf_counter() - begun) / count


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

    def sample(i: int) -> Sample:
        rng = np.random.default_rng(i)
        y, x = np.mgrid[0:28, 0:28]
        width, height = rng.uniform(4, 11, 2)
        inside = (np.abs(x - 13.5) < width) & (np.abs(y - 13.5) < height)
        shade = (
            rng.uniform(60, 230) + 20 * np.sin(x / rng.uniform(1, 5)) + rng.normal(0, 8, x.shape)
        )
        return Sample(
            f"{i:07d}", np.where(inside, shade, 0).clip(0, 255).astype(np.uint8)[None], i % 10
        )

    classes = tuple("0123456789")
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


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    data = kinds.add_parser("data", help="the training stream")
    data.add_argument("--shards", type=Path, help="a packed split; else images are made")
    data.add_argument("--images", type=positive, default=20_000, help="of one measurement")
    data.add_argument("--repeats", type=positive, default=5, help="measurements of each")
    data.set_defaults(measure=measure_streams)
    saving = kinds.add_parser("checkpoint", help="what a save costs the training")
    saving.add_argument("--steps", type=positive, default=50, help="of one measurement")
    saving.add_argument("--batch", type=positive, default=16, help="images of a step")
    saving.add_argument("--depth", type=positive, default=32, help="of the Glow, per level")
    saving.add_argument("--width", type=positive, default=512, help="of its networks")
    saving.add_argument("--repeats", type=positive, default=3, help="measurements of each")
    saving.set_defaults(measure=measure_saves)
    flow = kinds.add_parser("ffjord", help="a step of a continuous flow")
    flow.add_argument("--repeats", type=positive, default=3, help="measurements of each")
    flow.set_defaults(measure=measure_ffjord)
    for kind in (data, saving, flow):
        kind.add_argument("--json", action="store_true", help="end with a JSON object on stdout")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
