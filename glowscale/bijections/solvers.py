"""Solving a continuous flow's differential equation, through torchdiffeq."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from glowscale.errors import UserError

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("rk4", "midpoint", "euler", "heun2", "heun3")
Field = Callable[[Tensor, Tensor], Tensor]
"""dy/dt at a time, a scalar, of a state, in the state's shape."""
Norm = Callable[[Tensor], Tensor]
"""The size of a state's error, of which an adaptive method keeps it below its tolerance."""


class StiffError(UserError):
    """A differential equation that takes too many evaluations, or too small steps."""


@dataclass(frozen=True)
class Solver:
    """How a differential equation is solved.

    Args:
        method: of torchdiffeq: one of `ADAPTIVE` or, on a fixed grid, of `FIXED`.
        tolerance: absolute and relative, of an adaptive method.
        steps: of a fixed grid.
        evaluation_limit: so many evaluations an adaptive method may take.
        smallest_step: of an adaptive method, as a part of the time.

    Raises:
        ValueError: for a method that there is not.
    """

    method: str = "dopri5"
    tolerance: float = 1e-5
    steps: int = 4
    evaluation_limit: int = 1000
    smallest_step: float = 1e-7

    def __post_init__(self) -> None:
        if self.method not in ADAPTIVE + FIXED:
            raise ValueError(
                f"There is no solver {self.method!r}, only {', '.join(ADAPTIVE + FIXED)}."
            )

    @property
    def is_adaptive(self) -> bool:
        """Whether the method chooses its steps."""
        return self.method in ADAPTIVE

    def solve(self, field: Field, state: Tensor, start: float, end: float, norm: Norm) -> Tensor:
        """The state at `end` of a solution that has the given one at `start`.

        Raises:
            StiffError: where the evaluations or the steps pass their limits.
        """
        from torchdiffeq import odeint  # with all of scipy behind it, which most jobs never need

        times = torch.tensor([start, end], dtype=torch.float64, device=state.device)
        times = times.to(torch.promote_types(state.dtype, torch.float32))
        if self.is_adaptive:
            watched = _Watched(field, self, abs(end - start))
            options = {"norm": norm}
            tolerance = self.tolerance
            solution = odeint(
                watched,
                state,
                times,
                rtol=tolerance,
                atol=tolerance,
                method=self.method,
                options=options,
            )
        else:
            # A step size would be rounded, and a step of rounding be taken besides.
            grid = torch.linspace(start, end, self.steps + 1).to(times)
            options = {"grid_constructor": lambda *_: grid}
            solution = odeint(field, state, times, method=self.method, options=options)
        return solution[-1]


class _Watched:
    """A field that counts, and ends a solve that gets nowhere.

    torchdiffeq itself would end in a bare assertion, or accept any error.
    """

    def __init__(self, field: Field, solver: Solver, duration: float) -> None:
        self.field = field
        self.solver = solver
        self.smallest = solver.smallest_step * duration
        self.evaluations = 0

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        self.evaluations += 1
        if self.evaluations > self.solver.evaluation_limit:
            self._give_up(f"more than {self.solver.evaluation_limit} evaluations")
        return self.field(t, state)

    def callback_step(self, t: Tensor, state: Tensor, step: Tensor) -> None:
        """Called by torchdiffeq before every step that it tries."""
        if not bool(state.isfinite().all()):
            self._give_up("values that are not finite")
        size = abs(float(step.detach()))
        if not size >= self.smallest:  # also where it is not a number
            self._give_up(f"a step of {size:.1e}")

    def _give_up(self, what: str) -> None:
        raise StiffError(
            f"{self.solver.method} at the tolerance {self.solver.tolerance:g} takes {what}; allow "
            f"a larger tolerance or more evaluations, regularize the dynamics, or lower the "
            f"learning rate."
        )
