"""The job of sampling (model, encoding, writing) beside the model's sampling alone, in turn."""

import argparse
import shutil
import statistics
import time
from pathlib import Path

from glowscale.config import load_config
from glowscale.distributed import start_accelerator
from glowscale.jobs import positive, say
from glowscale.models import build_model
from glowscale.sampling import BLOCK, generate, sample_blocks

CONFIG = Path(__file__).parents[2] / "configs" / "cifar10_glow.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark is told."""
    parser.add_argument("--config", type=Path, default=CONFIG, help="whose model samples")
    parser.add_argument("--shard-size", type=positive, default=BLOCK, help="images of a shard")
    parser.add_argument("--shards", type=positive, default=4, help="of one measurement")
    parser.add_argument("--repeats", type=positive, default=3, help="measurements of each")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Images per second of both, and their ratio."""
    device = start_accelerator().device
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
