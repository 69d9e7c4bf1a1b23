"""Roots of increasing functions, many at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from glowscale.errors import UserError

LIMIT = 100
"""Of evaluations; some ten are usual, and bisection alone takes less than 60."""


class RootError(UserError):
    """Some roots were not found; the message says how many, and how far off they are."""


@torch.no_grad()
def find_root(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    target: Tensor,
    low: Tensor,
    high: Tensor,
    start: Tensor,
    tolerance: float,
) -> Tensor:
    """Solve function_i(x_i) = target_i for N values, by Newton's method within brackets.

    A step that would leave its bracket, or is more than half as long as the one before, becomes a
    bisection: so what Newton's method alone would lose is found, and its quadratic convergence
    remains. Each value goes its own way, and what is solved is computed no more. Source: Press et
    al., Numerical Recipes, section 9.4.

    Args:
        function: of x (n,) and the indices i (n,) that it belongs to; every function_i
            increases. Gives the values and their derivatives.
        target: what the values shall be, (N,).
        low: where a function is at most its target, up to rounding, (N,).
        high: where it is at least its target, (N,).
        start: between them, (N,). Where target or start are not finite, x is NaN.
        tolerance: x_i is solved when changes of x_i and target_i, relative to the larger of their
            size and 1, explain what is missing; 4 roundings at least.

    Raises:
        RootError: if values remain unsolved after `LIMIT` evaluations.

    >>> def cube(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    ...     return x**3, 3 * x**2
    >>> eight, low, high = torch.tensor([[8.0], [-1.0], [7.0]])
    >>> find_root(cube, eight, low, high, high, 1e-6)
    tensor([2.])
    """
    if target.is_meta:  # shapes alone: one evaluation of all is what is held at most
        return function(start, torch.arange(len(start), device=start.device))[0]
    tolerance = max(tolerance, 4 * torch.finfo(target.dtype).eps)
    root = torch.full_like(target, torch.nan)
    index = (target.isfinite() & start.isfinite()).nonzero().squeeze(1)
    target, low, high, x = target[index], low[index], high[index], start[index]
    last = high - low
    for _ in range(LIMIT):
        value, slope = function(x, index)
        excess = value - target
        low, high = torch.where(excess < 0, x, low), torch.where(excess > 0, x, high)
        slope = slope.nan_to_num(0, 0)  # where there is none, bisect
        is_left = ~(excess.abs() <= tolerance * (_at_least_1(target) + slope * _at_least_1(x)))
        root[index] = x
        left = is_left.nonzero().squeeze(1)
        if not len(left):
            return root
        newton = x - excess / slope
        is_good = (low <= newton) & (newton <= high) & ((newton - x).abs() <= last.abs() / 2)
        following = torch.where(is_good, newton, (low + high) / 2)
        state = (index, target, low, high, following, following - x)
        index, target, low, high, x, last = (part[left] for part in state)
    raise RootError(
        f"A transform cannot be inverted: {len(left)} of {len(root)} values were not solved to "
        f"{tolerance:.0e} in {LIMIT} evaluations, the worst is off by "
        f"{excess[left].abs().max():.1e}; lower the learning rate so that its parameters stay "
        f"moderate, sample at a lower temperature, or train with train.activations=recompute, "
        f"which inverts nothing."
    )


def _at_least_1(x: Tensor) -> Tensor:
    return x.abs().clamp(min=1)
