"""A step of a continuous flow at the original code's reference setting, and by our recipe.

The reference: 28×28 images, three levels, two flows in a row before and after each squeeze, hidden
64-64-64, dopri5 at 1e-5, batch 32, the layers at PyTorch's own initialization. The recipe is that
of `configs/fashion_mnist_ffjord.yaml`.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.images import pack_shapes
from benchmarks.updates import Updates
from glowscale.config import load_config
from glowscale.distributed import start_accelerator
from glowscale.jobs import positive, say

REFERENCE = {
    "family": "ffjord",
    "levels": 3,
    "depth": 2,
    "hidden_channels": [64, 64, 64],
    "time": "concat",
    "solver": {"method": "dopri5", "tolerance": 1e-5},
    "gradient": "adjoint",
}
BATCH = 32
RECIPE = Path(__file__).parents[2] / "configs" / "fashion_mnist_ffjord.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark is told."""
    parser.add_argument("--repeats", type=positive, default=3, help="measurements of each")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds, evaluations and images per second of a step, the two kinds in turn."""
    pack_shapes(folder / "data", (1, 28, 28))
    accelerator = start_accelerator()
    recipe = load_config(RECIPE).model.model_dump()

    def make(name: str, model: dict[str, Any]) -> Updates:
        train = {"batch": BATCH, "clip": 10.0}
        return Updates(model, train, folder / "data", folder / name, accelerator)

    steps = {"reference": make("reference", REFERENCE), "recipe": make("recipe", recipe)}
    start_as_the_original(steps["reference"].trainer.state.model)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for updates in steps.values():
        updates.seconds(1)
    for _ in range(arguments.repeats):
        for name, updates in steps.items():
            seconds[name].append(updates.seconds(1))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    told = {name: updates.trainer.state.model.figures() for name, updates in steps.items()}
    forward, backward = (
        told["reference"][f"{way}_evaluations"] for way in ("forward", "backward")
    )
    figures = {
        "step_seconds": round(medians["reference"], 3),
        "nfe": forward + backward,
        "nfe_forward": forward,
        "nfe_backward": backward,
        "seconds_per_evaluation": round(medians["reference"] / (forward + backward), 5),
        "images_per_second": round(BATCH / medians["reference"], 3),
        "recipe_nfe": told["recipe"]["forward_evaluations"],
        "recipe_images_per_second": round(BATCH / medians["recipe"], 3),
    }
    say(
        f"reference: {figures['step_seconds']:.2f} s a step, {forward:.0f} + {backward:.0f} "
        f"evaluations, {1000 * figures['seconds_per_evaluation']:.1f} ms each, "
        f"{figures['images_per_second']:.2f} images/s\n"
        f"recipe: {figures['recipe_nfe']:.0f} evaluations, "
        f"{figures['recipe_images_per_second']:.2f} images/s"
    )
    return figures


def start_as_the_original(model: torch.nn.Module) -> None:
    """Give the velocities' last layers the size that PyTorch's own initialization has."""
    for name, parameter in model.named_parameters():
        if "velocity" in name and parameter.shape[:1] != (64,) and parameter.dim() == 4:
            torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
