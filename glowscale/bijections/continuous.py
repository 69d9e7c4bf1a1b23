"""The continuous flow: x follows a velocity field, its log-density the field's divergence.

With dx/dt = f(t, x) from data at t = 0 to latent at t = 1, log|det dz/dx| = ∫ Tr(∂f/∂x) dt.
Source: FFJORD (Grathwohl et al. 2019), equations 2 to 4.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glowscale.bijections.base import Bijection
from glowscale.bijections.solvers import Solver, StiffError

Gradient = Literal["adjoint", "direct"]
Trace = Literal["hutchinson", "exact"]
DIVERGENCE, KINETIC, FROBENIUS = range(3)
"""Integrals along a solution beside x itself."""
FALLBACK = Solver("rk4", steps=8)


class Velocity(Protocol):
    """A velocity field with its Jacobian's product, such as `VelocityNetwork`."""

    def product(
        self, t: Tensor, x: Tensor, vector: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The velocity (B, ...) at time t of x (B, ...), and its Jacobian times a vector."""

    def __call__(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity (B, ...) at time t of x (B, ...)."""


@dataclass
class Solves:
    """What the continuous flows within `probing` read and tell."""

    probes: Tensor | None
    """Probe vectors of the trace (B, D), of which a flow takes what its x needs."""
    kinetic: list[Tensor] = field(default_factory=list)
    """Of each flow ∫ |f|² / d dt, (B,)."""
    frobenius: list[Tensor] = field(default_factory=list)
    """Of each flow an unbiased estimate of ∫ ‖∂f/∂x‖² / d dt, (B,)."""


_SOLVES: ContextVar[Solves | None] = ContextVar("solves", default=None)


@contextmanager
def probing(probes: Tensor | None) -> Iterator[Solves]:
    """Within it, continuous flows take these probes (B, D), and tell what they integrate."""
    solves = Solves(probes)
    token = _SOLVES.set(solves)
    try:
        yield solves
    finally:
        _SOLVES.reset(token)


class ContinuousFlow(Bijection):
    """Follows a velocity field from t = 0 to 1; the log-det is the integral of its divergence.

    The divergence is estimated by Hutchinson's estimator, e·(∂f/∂x)e with one probe e a solve,
    or taken exactly, one product a dimension. State, trace and integration are at least float32,
    also under autocast; only the network runs in lower precision. Solving is approximate:
    `inverse` and `log_det` are as good as the solver.

    A solve that passes its solver's limits is done again on the fixed grid of `fallback`, in the
    backward pass too, and noted in `troubles`; so no process leaves the others waiting. Where
    there is no fallback it raises.

    Args:
        velocity: of x (B, ...), with its Jacobian's product.
        solver: in training.
        evaluation_solver: otherwise; the training's if not given.
        gradient: `adjoint` solves an equation of its own backwards in constant memory (its
            error's norm leaves the parameters' gradients out: Kidger et al. 2021); `direct`
            differentiates the solver's steps, which are computed again in the backward pass.
        trace: `hutchinson` or `exact`.
        index: of the flow in its model, so that each takes other parts of the probes.
        fallback: for solves that pass the limits.

    Raises:
        StiffError: where a solve passes the limits and there is no fallback.
    """

    def __init__(
        self,
        velocity: nn.Module,
        solver: Solver,
        evaluation_solver: Solver | None = None,
        gradient: Gradient = "adjoint",
        trace: Trace = "hutchinson",
        index: int = 0,
        fallback: Solver | None = FALLBACK,
    ) -> None:
        super().__init__()
        self.velocity = cast("Velocity", velocity)
        self.solver = solver
        self.evaluation_solver = evaluation_solver or solver
        self.gradient = gradient
        self.trace = trace
        self.index = index
        self.fallback = fallback
        self.name = f"flow {index}"
        """In messages."""
        self.evaluations = 0
        """Of the velocity, in all forward passes so far."""
        self.backward_evaluations = 0
        """In all backward passes of the adjoint so far."""
        self.troubles: list[str] = []
        """Solves that passed the limits."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Follow x (B, ...) to t = 1; return it with the integrated divergence, (B,)."""
        solves = _SOLVES.get()
        probe = self._probe(x, solves.probes if solves else None)
        size = x[0].numel()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if x.is_meta:  # shapes alone: what one evaluation keeps is what the backward pass holds
            ends = self._rates(wide.new_zeros(()), wide, probe, context)
        else:
            state = torch.cat([_flat(wide), wide.new_zeros(len(x), 3)], 1)
            ends = self._follow(state, x.shape, probe, context)
        if solves is not None:
            solves.kinetic.append(ends[:, size + KINETIC] / size)
            solves.frobenius.append(ends[:, size + FROBENIUS] / size)
        return _unflat(ends[:, :size], x.shape), ends[:, size + DIVERGENCE]

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Follow z (B, ...) back to t = 0; no trace is taken."""

        def velocity(t: Tensor, state: Tensor) -> Tensor:
            self.evaluations += 1
            return _flat(self.velocity(t, _unflat(state, z.shape), context).to(state.dtype))

        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        start = self._solve(velocity, _flat(wide), 1.0, 0.0, _rms, self._active())
        return _unflat(start, z.shape)

    def _active(self) -> Solver:
        return self.solver if self.training else self.evaluation_solver

    def _probe(self, x: Tensor, probes: Tensor | None) -> Tensor:
        """This flow's probe, of x's shape: ±1 each where none is given."""
        if probes is None:
            probe = torch.randint(0, 2, x.shape, device=x.device, dtype=torch.int8) * 2 - 1
        else:
            # Flows that share a probe's values take them in other orders.
            turned = probes.roll(131 * self.index, 1)
            probe = turned[:, : x[0].numel()].reshape(x.shape)
        return probe.to(torch.promote_types(x.dtype, torch.float32))

    def _follow(
        self, state: Tensor, shape: torch.Size, probe: Tensor, context: Tensor | None
    ) -> Tensor:
        solver = self._active()
        if not torch.is_grad_enabled():
            return self._integrate(state, shape, probe, context, solver)
        if self.gradient == "adjoint":
            parameters = tuple(self.parameters())
            return _Adjoint.apply(self, solver, shape, probe, context, state, *parameters)
        if solver.is_adaptive:
            return self._again(state, shape, probe, context, solver)
        # On a grid, a step at a time: what is kept is one state a step.
        one = Solver(solver.method, steps=1)
        for step in range(solver.steps):
            times = (step / solver.steps, (step + 1) / solver.steps)
            state = self._again(state, shape, probe, context, one, *times)
        return state

    def _again(self, *arguments: Any) -> Tensor:  # noqa: ANN401
        """Integrate, keep only the arguments, and integrate again in the backward pass."""
        passes = 0

        def integrate(*arguments: Any) -> Tensor:  # noqa: ANN401
            nonlocal passes
            passes += 1
            before = self.evaluations
            try:
                return self._integrate(*arguments)
            finally:  # the second pass is left by an exception as soon as it has done enough
                if passes > 1:
                    self.backward_evaluations += self.evaluations - before
                    self.evaluations = before

        return checkpoint(integrate, *arguments, use_reentrant=False, preserve_rng_state=False)

    def _integrate(
        self,
        state: Tensor,
        shape: torch.Size,
        probe: Tensor,
        context: Tensor | None,
        solver: Solver,
        start: float = 0.0,
        end: float = 1.0,
    ) -> Tensor:
        size = state.shape[1] - 3

        def field(t: Tensor, state: Tensor) -> Tensor:
            self.evaluations += 1
            x = _unflat(state[:, :size], shape)
            return self._rates(t, x, probe, context)

        def norm(error: Tensor) -> Tensor:
            error = error.view(state.shape)
            return torch.maximum(_rms(error[:, :size]), _rms(error[:, size]))

        return self._solve(field, state, start, end, norm, solver)

    def _solve(
        self,
        field: Callable[[Tensor, Tensor], Tensor],
        state: Tensor,
        start: float,
        end: float,
        norm: Callable[[Tensor], Tensor],
        solver: Solver,
    ) -> Tensor:
        try:
            return solver.solve(field, state, start, end, norm)
        except StiffError as error:
            sentence = f"In {self.name}, {error}"
            if self.fallback is None:
                raise StiffError(sentence) from None
            self.troubles.append(sentence)
            return self.fallback.solve(field, state, start, end, norm)

    def _rates(self, t: Tensor, x: Tensor, probe: Tensor, context: Tensor | None) -> Tensor:
        """Velocity, divergence, |f|² and ‖∂f/∂x‖² at (t, x), flat: (B, d + 3)."""
        if self.trace == "exact":
            return self._exact_rates(t, x, context)
        velocity, product = self.velocity.product(t, x, probe, context)
        velocity, product = velocity.to(x.dtype), product.to(x.dtype)
        rates = [(probe * product), velocity.square(), product.square()]
        return torch.cat([_flat(velocity), *(_flat(r).sum(1, keepdim=True) for r in rates)], 1)

    def _exact_rates(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """As `_rates`, from the whole Jacobian, a column at a time."""
        divergence = x.new_zeros(len(x), 1)
        frobenius = x.new_zeros(len(x), 1)
        size = x[0].numel()
        for column in range(size):
            unit = torch.zeros(size, dtype=x.dtype, device=x.device)
            unit[column] = 1
            vector = _unflat(unit.expand(len(x), -1), x.shape)
            velocity, product = self.velocity.product(t, x, vector, context)
            flat = _flat(product.to(x.dtype))
            divergence = divergence + flat[:, column : column + 1]
            frobenius = frobenius + flat.square().sum(1, keepdim=True)
        velocity = _flat(velocity.to(x.dtype))
        return torch.cat(
            [velocity, divergence, velocity.square().sum(1, keepdim=True), frobenius], 1
        )


class _Adjoint(torch.autograd.Function):
    """Integrates a flow and, backwards, the gradient; of the way only its end is kept.

    Going back, x follows its velocity and its gradient a, da/dt = −∂/∂x (a·f + c·r), where r are
    the rates of the other integrals and c their gradients, which are constant; so do the gradients
    of parameters and context. Source: FFJORD (Grathwohl et al. 2019), equation 6.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        flow: ContinuousFlow,
        solver: Solver,
        shape: torch.Size,
        probe: Tensor,
        context: Tensor | None,
        state: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ends = flow._integrate(state, shape, probe, context, solver)
        ctx.flow, ctx.solver, ctx.shape = flow, solver, shape
        device = state.device.type
        ctx.autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )
        ctx.save_for_backward(ends, probe, context, *parameters)
        return ends

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # noqa: ANN401
        flow: ContinuousFlow = ctx.flow
        ends, probe, context, *parameters = ctx.saved_tensors
        gradient = gradients[0]
        size = ends.shape[1] - 3
        constant = gradient[:, size:]
        needed = (ctx.needs_input_grad[4], *ctx.needs_input_grad[6:])
        wanted = [
            x for x, is_needed in zip((context, *parameters), needed, strict=True) if is_needed
        ]
        batch = len(ends)

        def field(t: Tensor, flat: Tensor) -> Tensor:
            flow.backward_evaluations += 1
            x = flat[: batch * size].view(batch, size)
            a = flat[batch * size : 2 * batch * size].view(batch, size)
            with torch.enable_grad():
                x = _unflat(x, ctx.shape).detach().requires_grad_()
                rates = flow._rates(t, x, probe, context)
                total = (rates[:, :size] * a).sum() + (rates[:, size:] * constant).sum()
                of_x, *others = torch.autograd.grad(
                    total, (x, *wanted), allow_unused=True, materialize_grads=True
                )
            parts = [rates[:, :size].detach(), -_flat(of_x), *(-g for g in others)]
            return torch.cat([part.reshape(-1) for part in parts])

        def norm(error: Tensor) -> Tensor:
            of_x, of_a = error[: 2 * batch * size].view(2, -1)
            return torch.maximum(_rms(of_x), _rms(of_a))

        start = [ends[:, :size], gradient[:, :size], *(torch.zeros_like(w) for w in wanted)]
        with ctx.autocast:
            state = torch.cat([part.reshape(-1) for part in start])
            flat = flow._solve(field, state, 1.0, 0.0, norm, ctx.solver)
        sizes = [batch * size, batch * size, *(w.numel() for w in wanted)]
        _, of_state, *of_wanted = torch.split(flat, sizes)
        found = (g.view_as(w) for g, w in zip(of_wanted, wanted, strict=True))
        of_context, *of_parameters = (next(found) if is_needed else None for is_needed in needed)
        of_state = torch.cat([of_state.view(batch, size), constant], 1)
        return None, None, None, None, of_context, of_state, *of_parameters


def _flat(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H·W·C): images stay channels-last, so that nothing is copied."""
    return (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).reshape(len(x), -1)


def _unflat(flat: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_flat`."""
    if len(shape) != 4:
        return flat.reshape(shape)
    _, channels, height, width = shape
    return flat.reshape(len(flat), height, width, channels).permute(0, 3, 1, 2)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
