"""Glow's training beside normflows' and beside the floor, which is its networks alone.

Ours is the whole update as `train.py` makes it: noise, model, gradient's norm, masked Adamax step,
averaged weights. The peer's is its loss, backward and Adamax, in float32. The floor is forward and
backward of the couplings' networks alone, on inputs of their shapes, at our precision. They take
turns, a step each, so that a machine whose speed drifts hits all alike.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.images import pack_shapes
from benchmarks.peers import PeerUpdates, normflows_glow
from benchmarks.turns import in_turn
from benchmarks.updates import Updates
from glowscale.bijections import Coupling
from glowscale.distributed import start_accelerator
from glowscale.jobs import positive, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark is told."""
    add_model_arguments(parser)
    parser.add_argument("--activations", default="store", help="see the config train.activations")
    parser.add_argument("--repeats", type=positive, default=15, help="steps of each")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The size of the Glow."""
    parser.add_argument("--size", type=positive, default=32, help="of the images, which have RGB")
    parser.add_argument("--batch", type=positive, default=16, help="images of a step")
    parser.add_argument("--levels", type=positive, default=3)
    parser.add_argument("--depth", type=positive, default=8, help="steps of flow, per level")
    parser.add_argument("--width", type=positive, default=256, help="of the couplings' networks")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images per second of all three, and ratios."""
    accelerator = start_accelerator(arguments.precision)
    ours = glow_updates(arguments, folder, accelerator, activations=arguments.activations)
    shape = (3, arguments.size, arguments.size)
    torch.manual_seed(0)
    peer = normflows_glow(shape, arguments.levels, arguments.depth, arguments.width)
    images = ours.part.batch.images / 256 - 0.5
    floor = Networks(ours.trainer.state.model, images, accelerator)
    steps: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.seconds(1),
        "normflows": PeerUpdates(peer.to(accelerator.device), images.to(accelerator.device)),
        "floor": floor,
    }
    seconds = in_turn(steps, arguments.repeats)
    speeds = {name: arguments.batch / value for name, value in seconds.items()}
    figures = {
        **{name: round(speed, 3) for name, speed in speeds.items()},
        "ours_over_normflows": round(speeds["ours"] / speeds["normflows"], 4),
        "ours_over_floor": round(speeds["ours"] / speeds["floor"], 4),
        "seconds_over_floor": round(seconds["ours"] / seconds["floor"], 4),
    }
    say(
        f"K={arguments.depth} L={arguments.levels} H={arguments.width}, {arguments.batch} images "
        f"of {arguments.size}×{arguments.size}, {arguments.precision}, "
        f"{arguments.activations}:\n"
        + "\n".join(
            f"  {name:<10}{1000 * seconds[name]:9.1f} ms a step{speeds[name]:9.2f} images/s"
            for name in steps
        )
        + f"\n  {figures['ours_over_normflows']:.2f} times normflows' speed; "
        f"{figures['seconds_over_floor']:.3f} times the floor's time"
    )
    return figures


def glow_updates(
    arguments: argparse.Namespace, folder: Path, accelerator: Accelerator, **train: object
) -> Updates:
    """Our updates of a Glow of the size that was asked for, by Adamax."""
    pack_shapes(folder / "data", (3, arguments.size, arguments.size))
    model = {
        "family": "glow",
        "levels": arguments.levels,
        "depth": arguments.depth,
        "hidden_channels": arguments.width,
    }
    settings = {
        "batch": arguments.batch,
        "precision": arguments.precision,
        "optimizer": {"kind": "adamax", "lr": 1e-6},
        **train,
    }
    return Updates(model, settings, folder / "data", folder / "run", accelerator)


class Networks:
    """Forward and backward of a Glow's coupling networks, and nothing else."""

    def __init__(self, model: nn.Module, images: Tensor, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.inputs: list[tuple[nn.Module, Tensor]] = []
        hooks = [
            layer.network.register_forward_pre_hook(self._note)
            for layer in model.modules()
            if isinstance(layer, Coupling)
        ]
        with torch.no_grad():
            model((images + 0.5).mul(256).to(torch.uint8).to(accelerator.device))
        for hook in hooks:
            hook.remove()

    def _note(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].contiguous(memory_format=torch.channels_last).requires_grad_()
        self.inputs.append((network, x))

    def __call__(self) -> None:
        """All of them once."""
        for network, x in self.inputs:
            with self.accelerator.autocast():
                y = network(x)
            wanted = [x, *network.parameters()]
            torch.autograd.grad(y, wanted, torch.ones_like(y))
