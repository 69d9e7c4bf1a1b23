"""Bijections of a level by the kind of block that a config lists: any of them in any order."""

from collections.abc import Callable, Sequence
from typing import Any

from glowscale.bijections import (
    ActNorm,
    Autoregressive,
    Bijection,
    ChannelMask,
    Coupling,
    FlowStep,
    Inverse,
    Invertible1x1Conv,
    Mask,
    RecursiveCoupling,
    Sequential,
    Shape,
    Squeeze,
)
from glowscale.bijections.continuous import ContinuousFlow, Gradient, Trace
from glowscale.bijections.matrices import MATRICES
from glowscale.bijections.solvers import Solver
from glowscale.models.parts import (
    CAUSAL_NETWORKS,
    MASKS,
    NETWORKS,
    Arguments,
    make_network,
    make_transform,
)
from glowscale.networks.velocity import TimeConditioning, VelocityNetwork


def squeeze_blocks(shape: Shape, context_channels: int, *, depth: int = 1) -> list[Bijection]:
    """Squeezes; two of them make patches of 4×4."""
    return [Squeeze() for _ in range(depth)]


def linear_blocks(
    shape: Shape, context_channels: int, *, depth: int = 1, matrix: str = "lu"
) -> list[Bijection]:
    """ActNorm and an invertible 1×1 convolution, each time."""
    return [layer for _ in range(depth) for layer in linear_flows(shape[0], matrix)]


def coupling_blocks(
    shape: Shape,
    context_channels: int,
    *,
    transform: Arguments,
    network: Arguments,
    depth: int = 1,
    mask: str = "channels",
    matrix: str | None = "lu",
) -> list[Bijection]:
    """Couplings; they keep one colour and the other by turns, or halves of channels not mixed."""

    def make(index: int) -> Bijection:
        kept = MASKS[mask](index, matrix is not None)
        coupling = make_coupling(shape, kept, transform, network, context_channels)
        return normalized(coupling, shape[0], matrix)

    return [make(index) for index in range(depth)]


def recursive_blocks(
    shape: Shape,
    context_channels: int,
    *,
    transform: Arguments,
    network: Arguments,
    recursions: int,
    depth: int = 1,
    matrix: str = "lu",
) -> list[Bijection]:
    """Recursive couplings."""
    mask = ChannelMask()

    def make(channels: int) -> Coupling:
        inner = (channels, *shape[1:])
        return make_coupling(inner, mask, transform, network, context_channels)

    def make_step() -> Bijection:
        return normalized(RecursiveCoupling(shape[0], make, recursions), shape[0], matrix)

    return [make_step() for _ in range(depth)]


def autoregressive_blocks(
    shape: Shape,
    context_channels: int,
    *,
    transform: Arguments,
    network: Arguments,
    depth: int = 1,
    matrix: str | None = "lu",
    inverse: bool = False,
) -> list[Bijection]:
    """Autoregressive flows, which begin at the first position and at the last by turns."""
    channels = shape[0]

    def make(index: int) -> Bijection:
        change = make_transform(transform)
        widths = (channels, change.parameters_per_value * channels)
        causal = make_network(CAUSAL_NETWORKS, network, *widths, context_channels)
        flow = Autoregressive(causal, change, backwards=index % 2 == 1)
        return normalized(Inverse(flow) if inverse else flow, channels, matrix)

    return [make(index) for index in range(depth)]


def continuous_blocks(
    shape: Shape,
    context_channels: int,
    **arguments: Any,  # noqa: ANN401
) -> list[Bijection]:
    """Continuous flows; arguments of `continuous_flows`."""
    return continuous_flows(shape[0], context_channels, **arguments)


def continuous_flows(
    channels: int,
    context_channels: int,
    *,
    hidden_channels: Sequence[int],
    depth: int = 1,
    matrix: str | None = None,
    time: TimeConditioning = "concat",
    solver: Arguments | None = None,
    evaluation_solver: Arguments | None = None,
    gradient: Gradient = "adjoint",
    trace: Trace = "hutchinson",
    fallback_steps: int = 8,
) -> list[Bijection]:
    """Continuous flows of images of any size.

    Args:
        channels: of what reaches them.
        context_channels: features of the class.
        hidden_channels: widths of the velocities' hidden layers.
        depth: flows in a row.
        matrix: parametrization of an invertible 1×1 convolution with ActNorm before every flow,
            so that the dynamics need not learn what is linear; none if None.
        time: how the velocities are told the time, see `VelocityNetwork`.
        solver: in training; arguments of `Solver`.
        evaluation_solver: otherwise; arguments of `Solver`, the training's if not given.
        gradient: `adjoint` or `direct`, see `ContinuousFlow`.
        trace: `hutchinson` or `exact`.
        fallback_steps: of the grid on which solves that pass their limits are done again.
    """

    def make() -> Bijection:
        flow = ContinuousFlow(
            VelocityNetwork(channels, hidden_channels, time, context_channels),
            Solver(**solver or {}),
            Solver(**evaluation_solver) if evaluation_solver else None,
            gradient,
            trace,
            fallback=Solver("rk4", steps=fallback_steps),
        )
        if matrix is None:
            return flow
        # No FlowStep: the flow's energies are part of the loss, and it keeps only z's gradient.
        return Sequential([*linear_flows(channels, matrix), flow])

    return [make() for _ in range(depth)]


BLOCKS: dict[str, Callable[..., list[Bijection]]] = {
    "squeeze": squeeze_blocks,
    "linear": linear_blocks,
    "coupling": coupling_blocks,
    "recursive": recursive_blocks,
    "autoregressive": autoregressive_blocks,
    "continuous": continuous_blocks,
}
"""Blocks by kind; each takes the shape (C, H, W) that reaches it, the channels of the context, and
its own arguments."""


def linear_flows(channels: int, matrix: str) -> list[Bijection]:
    """ActNorm and an invertible 1×1 convolution."""
    return [ActNorm(channels), Invertible1x1Conv(MATRICES[matrix](channels))]


def make_coupling(
    shape: Shape, mask: Mask, transform: Arguments, network: Arguments, context_channels: int
) -> Coupling:
    """A coupling of images of `shape`, its network as wide as mask and transform need."""
    kept, rest = mask.shapes(shape)
    change = make_transform(transform)
    widths = (kept[0], change.parameters_per_value * rest[0])
    return Coupling(make_network(NETWORKS, network, *widths, context_channels), change, mask)


def normalized(bijection: Bijection, channels: int, matrix: str | None) -> Bijection:
    """A bijection after ActNorm and, if a parametrization is given, a 1×1 convolution."""
    if matrix is None:
        return Sequential([ActNorm(channels), bijection])
    return FlowStep(channels, bijection, matrix)
