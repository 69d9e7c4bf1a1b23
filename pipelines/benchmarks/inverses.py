"""What density and sampling cost by kind of flow, and how that grows with the number of positions.

A coupling goes both ways in one pass of its network. A masked autoregressive flow's density is one
pass, its sampling a step for every position, or parallel passes until nothing changes (Jacobi); an
inverse autoregressive flow is the same the other way round. All kinds take turns at every size;
flows are one bijection each, with random weights. The exponent is the slope of log time over the
logarithm of the number of positions.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.turns import exponent, in_turn
from glowscale.bijections import (
    Affine,
    Autoregressive,
    Bijection,
    Coupling,
    Inverse,
    InverseTransform,
    Jacobi,
    solving_inverses,
)
from glowscale.jobs import positive, say
from glowscale.networks import (
    CausalTransformer,
    ConvolutionalNetwork,
    MaskedConvolutionalNetwork,
)

CHANNELS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark is told."""
    parser.add_argument("--sides", type=positive, nargs="+", default=[4, 8, 16], help="of images")
    parser.add_argument("--batch", type=positive, default=16, help="images")
    parser.add_argument("--width", type=positive, default=64, help="hidden channels")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of the parallel passes")
    parser.add_argument("--repeats", type=positive, default=5, help="measurements of each")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Milliseconds a batch, passes and exponents of both directions, by kind of flow."""
    sides = sorted(set(arguments.sides))
    positions = [side * side for side in sides]
    found = [measure_side(arguments, side) for side in sides]
    say(f"ms of {arguments.batch} images of {CHANNELS} channels; in brackets passes or steps")
    say(f"{'':<38}{''.join(f'{n} positions'.rjust(18) for n in positions)}{'exponent':>10}")
    figures: dict[str, Any] = {}
    for name in found[0]:
        rows = [of_side[name] for of_side in found]
        slope = exponent(positions, [row["ms"] for row in rows])
        cells = "".join(f"{row['ms']:.2f} ({row['passes']})".rjust(18) for row in rows)
        say(f"{name:<38}{cells}{slope!s:>10}")
        by_size = {str(n): row for n, row in zip(positions, rows, strict=True)}
        figures[name] = {"by_positions": by_size, "exponent": slope}
    return figures


def measure_side(arguments: argparse.Namespace, side: int) -> dict[str, dict[str, Any]]:
    """Milliseconds and passes on images of one side, by kind and direction."""
    torch.manual_seed(0)
    x = torch.randn(arguments.batch, CHANNELS, side, side)
    steps: dict[str, Callable[[], object]] = {}
    passes: dict[str, int] = {}
    for kind, flow in flows(arguments.width).items():
        ways = {"density": partial(flow, x), "sampling": partial(flow.inverse, x)}
        if isinstance(flow, Autoregressive):
            ways["sampling by Jacobi"] = partial(solve, flow, x, Jacobi(arguments.tolerance))
        for direction, step in ways.items():
            name = f"{kind}, {direction}"
            steps[name] = torch.no_grad()(step)
            passes[name] = passes_of(flow, steps[name])
    seconds = in_turn(steps, arguments.repeats)
    return {
        name: {"ms": round(1000 * value, 3), "passes": passes[name]}
        for name, value in seconds.items()
    }


def flows(width: int) -> dict[str, Bijection]:
    """One bijection of every kind, off its starting point."""
    gaussian = InverseTransform(Affine())

    def masked() -> Autoregressive:
        network = MaskedConvolutionalNetwork(CHANNELS, 2 * CHANNELS, width, blocks=2)
        return Autoregressive(network, gaussian)

    causal = CausalTransformer(CHANNELS, 2 * CHANNELS, width, blocks=2, heads=4)
    made: dict[str, Bijection] = {
        "coupling": Coupling(ConvolutionalNetwork(CHANNELS // 2, CHANNELS, width), Affine()),
        "masked autoregressive": masked(),
        "causal transformer": Autoregressive(causal, gaussian),
        "inverse autoregressive": Inverse(masked()),
    }
    for flow in made.values():
        for parameter in flow.parameters():
            if not parameter.any():  # last layers, which start at zero
                nn.init.normal_(parameter, std=0.1 / width**0.5)
    return made


def solve(flow: Autoregressive, z: Tensor, solver: Jacobi) -> Tensor:
    """The inverse in parallel passes."""
    with solving_inverses(flow, solver):
        return flow.inverse(z)


def passes_of(flow: Bijection, step: Callable[[], object]) -> int:
    """How often a step asks the flow's network, one position at a time or all."""
    layers = [layer for layer in flow.modules() if isinstance(layer, Autoregressive)]
    for layer in layers:
        layer.passes = 0
    step()
    return max(1, sum(layer.passes for layer in layers))
