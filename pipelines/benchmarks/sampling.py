"""Glow's sampling beside normflows', and the whole job beside the model's sampling alone.

The first is of the model alone, `--depth` and its like being its size; the peer samples in
float32. The second is the job of `sample.py`: model, encoding and writing. Each pair takes turns.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator

from benchmarks.peers import normflows_glow
from benchmarks.training import add_model_arguments
from benchmarks.turns import in_turn
from glowscale.bijections import keeping_inverses
from glowscale.config import load_config
from glowscale.distributed import start_accelerator
from glowscale.jobs import positive, say
from glowscale.models import Glow, build_model
from glowscale.sampling import BLOCK, generate, sample_blocks, sample_images

CONFIG = Path(__file__).parents[2] / "configs" / "cifar10_glow.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark is told."""
    add_model_arguments(parser)
    parser.add_argument("--config", type=Path, default=CONFIG, help="whose model the job samples")
    parser.add_argument("--shard-size", type=positive, default=BLOCK, help="images of a shard")
    parser.add_argument("--shards", type=positive, default=4, help="of one measurement")
    parser.add_argument("--repeats", type=positive, default=3, help="measurements of each")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Images per second of both pairs, and their ratios."""
    accelerator = start_accelerator(arguments.precision)
    with accelerator.autocast():
        return {**beside_peer(arguments, accelerator), **of_job(arguments, folder, accelerator)}


@torch.inference_mode()
def beside_peer(arguments: argparse.Namespace, accelerator: Accelerator) -> dict[str, float]:
    """Images per second of our Glow and of normflows', and their ratio."""
    shape = (3, arguments.size, arguments.size)
    sizes = {"levels": arguments.levels, "depth": arguments.depth}
    torch.manual_seed(0)
    ours = Glow(shape, 256, **sizes, hidden_channels=arguments.width).eval()
    ours.to(accelerator.device).to(memory_format=torch.channels_last)
    peer = normflows_glow(shape, **sizes, hidden_channels=arguments.width)
    peer.to(accelerator.device)
    count = arguments.batch
    with torch.autocast(accelerator.device.type, enabled=False):
        peer(torch.rand(count, *shape, device=accelerator.device))  # its ActNorm
    of_peer = cast("Callable[[int], object]", peer.sample)

    def sample_peer() -> None:
        with torch.autocast(accelerator.device.type, enabled=False):
            of_peer(count)

    steps: dict[str, Callable[[], object]] = {
        "ours": lambda: sample_images(ours, 0, range(count)),
        "normflows": sample_peer,
    }
    with keeping_inverses(ours):
        seconds = in_turn(steps, 5 * arguments.repeats)
    speeds = {name: count / value for name, value in seconds.items()}
    ratio = speeds["ours"] / speeds["normflows"]
    say(
        f"{arguments.precision}, batches of {count}: {speeds['ours']:.2f} images/s, normflows "
        f"{speeds['normflows']:.2f}: {ratio:.2f} times its speed"
    )
    return {
        **{name: round(speed, 3) for name, speed in speeds.items()},
        "ours_over_normflows": round(ratio, 4),
    }


def of_job(
    arguments: argparse.Namespace, folder: Path, accelerator: Accelerator
) -> dict[str, float]:
    """Images per second of the job and of its model alone, and their ratio."""
    device = accelerator.device
    config = load_config(arguments.config)
    model = build_model(config.model.model_dump(), (3, 32, 32), 256, 0).eval().to(device)
    count = arguments.shards * arguments.shard_size
    seconds: dict[str, list[float]] = {"model": [], "job": []}
    sample_blocks(model, 0, range(BLOCK), 1.0, BLOCK)
    for repeat in range(arguments.repeats):
        started = time.perf_counter()
        for shard in range(arguments.shards):
            start = shard * arguments.shard_size
            sample_blocks(model, repeat, range(start, start + arguments.shard_size), 1.0, BLOCK)
        seconds["model"].append(time.perf_counter() - started)
        out = folder / "samples"
        started = time.perf_counter()
        generate(
            model,
            out,
            count=count,
            seed=repeat,
            temperature=1.0,
            identity={},
            shard_size=arguments.shard_size,
        )
        seconds["job"].append(time.perf_counter() - started)
        shutil.rmtree(out)
    speeds = {name: count / statistics.median(values) for name, values in seconds.items()}
    ratio = statistics.median(
        alone / whole for alone, whole in zip(seconds["model"], seconds["job"], strict=True)
    )
    say(
        f"{count} images in {arguments.shards} shards: {speeds['job']:.2f} images/s with encoding "
        f"and writing, {speeds['model']:.2f} by the model alone: {ratio:.3f} of it"
    )
    return {
        "images_per_second": round(speeds["job"], 3),
        "model_images_per_second": round(speeds["model"], 3),
        "job_over_model": round(ratio, 4),
    }
