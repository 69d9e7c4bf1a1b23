"""What the parametrizations of a linear flow's matrix cost, and how that grows with dimension.

Four things of every parametrization: the log-det alone; building W with its log-det; forward and
backward of a batch of vectors; the inverse of a batch, in float64. All parametrizations and things
take turns. The exponent of a dimension D is the slope of log time over log D, over all dimensions
and between the two largest: small ones cost no more than the calls themselves.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.turns import exponent, in_turn
from glowscale.bijections import Linear
from glowscale.bijections.matrices import MATRICES
from glowscale.jobs import positive, say

WHAT = ("log-det", "W and log-det", "forward and backward", "inverse")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark is told."""
    parser.add_argument("--dims", type=positive, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--batch", type=positive, default=256, help="vectors")
    parser.add_argument("--repeats", type=positive, default=15, help="measurements of each")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Milliseconds, ratios to `plain` and exponents, by what is done and parametrization."""
    dims = sorted(set(arguments.dims))
    seconds = {dim: seconds_of(dim, arguments.batch, arguments.repeats) for dim in dims}
    say(f"{arguments.batch} vectors; in brackets the ratio to plain")
    figures: dict[str, Any] = {}
    for what in WHAT:
        columns = "".join(f"D={dim}".rjust(18) for dim in dims)
        say(f"{what:<22}{columns}{'exponent':>10}{'at the end':>12}")
        figures[what] = {}
        for name in MATRICES:
            of_name, of_plain = (
                [seconds[dim][f"{what}, {x}"] for dim in dims] for x in (name, "plain")
            )
            row = figures[what][name] = figures_of(dims, of_name, of_plain)
            say(line_of(name, row))
    return figures


def seconds_of(dim: int, batch: int, repeats: int) -> dict[str, float]:
    """Median seconds by what is done and parametrization."""
    torch.manual_seed(0)
    x = torch.randn(batch, dim)
    steps = {
        f"{what}, {name}": step
        for name, matrix in MATRICES.items()
        for what, step in steps_of(Linear(matrix(dim)), x).items()
    }
    return in_turn(steps, repeats)


def steps_of(linear: Linear, x: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed of one parametrization; all but the backward pass without a graph."""
    parameters = list(linear.parameters())

    def forward_and_backward() -> None:
        z, log_det = linear(x)
        torch.autograd.grad(z.square().sum() - log_det.sum(), parameters)

    without_graph = torch.no_grad()
    steps = (
        without_graph(linear.matrix.log_det),
        without_graph(linear.matrix.forward),
        forward_and_backward,
        without_graph(partial(linear.inverse, x)),
    )
    return dict(zip(WHAT, steps, strict=True))


def figures_of(dims: list[int], seconds: list[float], plain: list[float]) -> dict[str, Any]:
    """Of one parametrization: what it takes, beside `plain`, and its exponents in D."""
    return {
        "ms": {str(dim): round(1000 * x, 4) for dim, x in zip(dims, seconds, strict=True)},
        "over_plain": {
            str(dim): round(x / y, 3) for dim, x, y in zip(dims, seconds, plain, strict=True)
        },
        "exponent": exponent(dims, seconds),
        "exponent_at_the_end": exponent(dims[-2:], seconds[-2:]),
    }


def line_of(name: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    pairs = zip(row["ms"].values(), row["over_plain"].values(), strict=True)
    cells = "".join(f"{ms:.3f} ms ({ratio:.2g})".rjust(18) for ms, ratio in pairs)
    return f"  {name:<20}{cells}{row['exponent']!s:>10}{row['exponent_at_the_end']!s:>12}"
