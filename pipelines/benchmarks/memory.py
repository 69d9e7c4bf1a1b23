"""Memory and time of Glow's training by what it keeps for the backward pass: `train.activations`.

Each figure is of a fresh process. Activations are the bytes of tensors that the profiler saw
allocated at once in a pass, gradients being dropped as soon as they are there; beside them, what
the peak resident size of a batch is above that of one image. Seconds are of forward and backward,
the ways taking turns in one process.
"""

import argparse
import json
import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot
from torch.profiler import ProfilerActivity, profile

from benchmarks.turns import in_turn
from glowscale.bijections.activations import Activations
from glowscale.config import load_config
from glowscale.jobs import positive, say
from glowscale.models import build_model
from glowscale.training.plan import drop_gradient

WAYS: tuple[Activations, ...] = ("store", "recompute", "invert")
MIB = 2**20


class Work(NamedTuple):
    """A model and a batch."""

    model: dict[str, Any]
    size: int
    batch: int
    way: Activations


class Peak(NamedTuple):
    """Bytes in use at once at most."""

    profiled: int
    """Of tensors, during a pass."""
    resident: int
    """Of the whole process."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark is told."""
    parser.add_argument("--config", type=Path, help="whose model, instead of levels and width")
    parser.add_argument("--size", type=positive, default=32, help="of the images, which have RGB")
    parser.add_argument("--batch", type=positive, default=16, help="images of a pass")
    parser.add_argument("--levels", type=positive, default=3)
    parser.add_argument("--width", type=positive, default=256, help="of the couplings' networks")
    parser.add_argument("--depths", type=positive, nargs="+", default=[8, 64], help="per level")
    parser.add_argument("--repeats", type=positive, default=9, help="timed passes; 1st depth")
    parser.add_argument("--picture", type=Path, help="draw the activations by depth")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Activations in MiB by way and depth, and seconds by way."""
    if arguments.config:
        models = {"": load_config(arguments.config).model.model_dump()}
    else:
        models = {str(depth): glow(arguments, depth) for depth in arguments.depths}
    activations: dict[str, dict[str, dict[str, float]]] = {way: {} for way in WAYS}
    for way in WAYS:
        for depth, model in models.items():
            work = Work(model, arguments.size, arguments.batch, way)
            whole, single = (in_fresh_process(x) for x in (work, work._replace(batch=1)))
            found = {
                "activation_mb": whole.profiled / MIB,
                "resident_above_one_image_mb": (whole.resident - single.resident) / MIB,
                "peak_resident_mb": whole.resident / MIB,
            }
            activations[way][depth] = {key: round(value, 1) for key, value in found.items()}
            say(f"{way:>9} {depth and 'K=' + depth}: {json.dumps(activations[way][depth])}")
    if arguments.picture:
        draw(activations, arguments.picture)
    figures: dict[str, Any] = {"activation_mb": activations}
    first = next(iter(models.values()))
    passes: dict[str, Callable[[], object]] = {
        way: pass_of(Work(first, arguments.size, arguments.batch, way)) for way in WAYS
    }
    seconds = in_turn(passes, arguments.repeats)
    figures["seconds"] = {way: round(value, 4) for way, value in seconds.items()}
    figures["invert_over_store"] = round(seconds["invert"] / seconds["store"], 4)
    figures["invert_over_recompute"] = round(seconds["invert"] / seconds["recompute"], 4)
    say(
        ", ".join(f"{way} {value:.3f} s" for way, value in seconds.items())
        + f": invert takes {figures['invert_over_store']:.2f} times store's time, "
        f"{figures['invert_over_recompute']:.2f} times recompute's"
    )
    return figures


def draw(activations: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """The activations of every way over depth."""
    figure, axes = pyplot.subplots(figsize=(5, 3), layout="constrained")
    for way, by_depth in activations.items():
        values = [found["activation_mb"] for found in by_depth.values()]
        axes.plot([int(depth) for depth in by_depth], values, marker="o", label=way)
    axes.set(xlabel="flow steps per level", ylabel="activations, MiB", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def glow(arguments: argparse.Namespace, depth: int) -> dict[str, Any]:
    """The `model` section of a Glow."""
    return {
        "family": "glow",
        "levels": arguments.levels,
        "depth": depth,
        "hidden_channels": arguments.width,
        "class_channels": 0,
        "dequantization": {"kind": "uniform"},
        "preprocessing": {"kind": "affine"},
    }


def pass_of(work: Work, keeps_gradients: bool = True) -> Callable[[], None]:
    """A forward and backward pass of a new model, on made-up images."""
    torch.manual_seed(0)
    shape = (3, work.size, work.size)
    model = build_model(work.model, shape, 256, 0, work.way)
    model.to(memory_format=torch.channels_last)
    if not keeps_gradients:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(drop_gradient)  # type: ignore[no-untyped-call]
    images = torch.randint(0, 256, (work.batch, *shape), dtype=torch.uint8)

    def once() -> None:
        model.zero_grad(set_to_none=True)
        model(images).log_prob.sum().backward()

    return once


def in_fresh_process(work: Work) -> Peak:
    """What a pass needs at most, by itself."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_of, work).result()


def peak_of(work: Work) -> Peak:
    """What a pass needs in this process, which has done nothing before."""
    once = pass_of(work, keeps_gradients=False)
    once()
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        once()
    return Peak(most_allocated(profiled), resident)


def most_allocated(profiled: profile) -> int:
    """Bytes that a profile saw allocated at once at most, beyond those before it."""
    found = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes: list[Any] = [event for event in found if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    held, most = 0, 0
    for event in changes:
        held += event.nbytes()
        most = max(most, held)
    return most
