"""Solutions of x = update(x) where every position of x reads those before it alone."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 1e6
"""Unfinished values are kept within it, for attention spreads what is not finite backwards."""


@dataclass(frozen=True)
class Jacobi:
    """Updates all positions at once until they stand still.

    After n passes the first n positions are exact, so there are never more than positions. Every
    image stops on its own: what it comes to does not depend on those beside it. Source: Song et
    al. 2021, "Accelerating feedforward computation via parallel nonlinear equation solving".

    Args:
        tolerance: the largest change in the pass that is an image's last, positive.
    """

    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise ValueError(f"Jacobi needs a tolerance above 0, not {self.tolerance}.")

    def solve(self, update: Callable[[Tensor, Tensor], Tensor], z: Tensor) -> tuple[Tensor, int]:
        """Solve for x.

        Args:
            update: of x (R, C, H, W), the images that have not converged, and their indices (R,).
            z: where x begins, (B, C, H, W).

        Returns:
            x, and how many passes it took to find all of it.
        """
        x, rows, passes = z.clone(), torch.arange(len(z), device=z.device), 0
        while len(rows):
            passes += 1
            before = x[rows]
            after = update(before, rows)
            x[rows] = _keep_in_bounds(after, passes)
            change = (after - before).abs().flatten(1).amax(1)
            last = passes == z.shape[2] * z.shape[3]
            rows = rows[:0] if last else rows[~(change <= self.tolerance)]
        return x, passes


def with_gradients(update: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A solution x (B, C, H, W) of x = update(x), as a function of all that the update reads.

    By the implicit function theorem the gradient u of what the update reads besides x solves
    u = g + u · ∂update/∂x; the matrix is nilpotent, so iterating, as often as there are positions
    at most, is exact. It takes the memory of one pass. Source: Bai et al. 2019, section 3.1.2.
    """
    given = x.detach().requires_grad_()
    again = update(given)
    positions = x.shape[2] * x.shape[3]

    def solve(gradient: Tensor) -> Tensor:
        total = gradient
        for _ in range(positions - 1):
            (through,) = torch.autograd.grad(again, given, total, retain_graph=True)
            before, total = total, gradient + through
            if total.is_meta or torch.equal(before, total):  # shapes alone need one product
                break
        return total

    solution = again.clone()  # the hook must not be met within itself
    if solution.requires_grad:
        solution.register_hook(solve)  # type: ignore[no-untyped-call]
    return solution


def _keep_in_bounds(x: Tensor, exact: int) -> Tensor:
    """X with all but the first `exact` positions finite."""
    flat = x.flatten(2)
    rest = flat[..., exact:].nan_to_num(0.0).clamp(-LARGEST, LARGEST)
    return torch.cat([flat[..., :exact], rest], 2).view(x.shape)
