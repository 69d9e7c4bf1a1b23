"""Levels put together from blocks, which a config lists by kind: any of them in any order."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from glowscale.bijections import (
    ActNorm,
    Additive,
    Affine,
    Autoregressive,
    Bijection,
    ChannelMask,
    CheckerboardMask,
    Coupling,
    FlowStep,
    Inverse,
    InverseTransform,
    Invertible1x1Conv,
    Mask,
    MixtureOfLogistics,
    RationalQuadraticSpline,
    RecursiveCoupling,
    Sequential,
    Shape,
    Squeeze,
    Transform,
)
from glowscale.bijections.continuous import ContinuousFlow, Gradient, Trace
from glowscale.bijections.matrices import MATRICES
from glowscale.bijections.solvers import Solver
from glowscale.models.multiscale import MultiscaleFlow, Split
from glowscale.models.solved import SolvedFlow
from glowscale.networks import (
    CausalTransformer,
    ConvolutionalNetwork,
    GatedAttentionNetwork,
    MaskedConvolutionalNetwork,
    VisionTransformer,
)
from glowscale.networks.stepping import CausalNetwork
from glowscale.networks.velocity import TimeConditioning, VelocityNetwork

Section = Mapping[str, Any]
"""Part of a config: its `kind`, and arguments of what that names."""

TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "affine": Affine,
    "additive": Additive,
    "gaussian": lambda scale: InverseTransform(Affine(scale)),
    "mixture": MixtureOfLogistics,
    "spline": RationalQuadraticSpline,
}
"""Transforms by kind; each takes its own arguments."""
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "convolutional": ConvolutionalNetwork,
    "gated": GatedAttentionNetwork,
    "transformer": VisionTransformer,
}
"""Conditioners by kind; each takes the channels that go in and come out, and its own arguments."""
CAUSAL_NETWORKS: dict[str, Callable[..., CausalNetwork]] = {
    "masked": MaskedConvolutionalNetwork,
    "causal": CausalTransformer,
}
"""The same, of autoregressive flows."""


def assemble(
    image_shape: tuple[int, int, int],
    grey_levels: int,
    *,
    levels: Sequence[Sequence[Section]],
    probe: str = "rademacher",
    kinetic: float = 0.0,
    frobenius: float = 0.0,
    classes: int = 0,
    class_channels: int = 0,
    **common: Any,  # noqa: ANN401
) -> MultiscaleFlow:
    """A multiscale flow from the blocks of each level, finest first.

    Args:
        image_shape: (C, H, W).
        grey_levels: number of values that a pixel takes.
        levels: the blocks of each level, in order; see `BLOCKS`.
        probe: of continuous blocks, as the next two, see `SolvedFlow`.
        kinetic: weight of their velocities' mean square.
        frobenius: weight of their Jacobians' mean square.
        classes: number of classes that the blocks' networks are conditional on.
        class_channels: features of a class; 0 makes the model unconditional.
        common: other arguments of `MultiscaleFlow`.

    Raises:
        ValueError: where a block cannot take the shape that reaches it; names the block.

    >>> affine = {"kind": "coupling", "transform": {"kind": "affine"},
    ...           "network": {"kind": "convolutional", "hidden_channels": 8}}
    >>> squeeze = {"kind": "squeeze"}
    >>> model = assemble((1, 8, 8), 17, levels=[[squeeze, affine], [squeeze, affine]])
    >>> model.latent_shapes
    [(2, 4, 4), (8, 2, 2)]
    """
    context_channels = class_channels if classes else 0
    if not levels:
        raise ValueError("A model needs at least one level; levels is empty.")
    bijections: list[Bijection] = []
    shape: Shape = image_shape
    for number, blocks in enumerate(levels):
        if number:
            shape = Split(shape[0]).output_shapes(shape)[0]
        level = Sequential(_build_level(blocks, shape, context_channels, f"levels.{number}"))
        shape = level.output_shape(shape)
        bijections.append(level)
    arguments = {**common, "classes": classes, "class_channels": class_channels}
    if any(isinstance(x, ContinuousFlow) for level in bijections for x in level.modules()):
        arguments |= {"probe": probe, "kinetic": kinetic, "frobenius": frobenius}
        return SolvedFlow(image_shape, grey_levels, bijections, **arguments)
    return MultiscaleFlow(image_shape, grey_levels, bijections, **arguments)


def _build_level(
    blocks: Sequence[Section], shape: Shape, context_channels: int, where: str
) -> list[Bijection]:
    bijections: list[Bijection] = []
    for number, block in enumerate(blocks):
        arguments = dict(block)
        kind = arguments.pop("kind")
        try:
            made = BLOCKS[kind](shape, context_channels, **arguments)
            shape = Sequential(made).output_shape(shape)
        except ValueError as error:
            raise ValueError(f"In {where}.{number}, a {kind} block: {error}") from None
        bijections += made
    return bijections


def squeeze_blocks(shape: Shape, context_channels: int, *, depth: int = 1) -> list[Bijection]:
    """Squeezes; two of them make patches of 4×4."""
    return [Squeeze() for _ in range(depth)]


def linear_blocks(
    shape: Shape, context_channels: int, *, depth: int = 1, matrix: str = "lu"
) -> list[Bijection]:
    """ActNorm and an invertible 1×1 convolution, each time."""
    channels = shape[0]
    return [
        layer
        for _ in range(depth)
        for layer in (ActNorm(channels), Invertible1x1Conv(MATRICES[matrix](channels)))
    ]


def coupling_blocks(
    shape: Shape,
    context_channels: int,
    *,
    transform: Section,
    network: Section,
    depth: int = 1,
    mask: str = "channels",
    matrix: str | None = "lu",
) -> list[Bijection]:
    """Couplings; those with a checkerboard keep one colour and the other by turns."""

    def make(index: int) -> Bijection:
        part = ChannelMask() if mask == "channels" else CheckerboardMask(odd=index % 2 == 1)
        coupling = make_coupling(shape, part, transform, network, context_channels)
        return normalized(coupling, shape[0], matrix)

    return [make(index) for index in range(depth)]


def recursive_blocks(
    shape: Shape,
    context_channels: int,
    *,
    transform: Section,
    network: Section,
    recursions: int,
    depth: int = 1,
    matrix: str | None = "lu",
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
    transform: Section,
    network: Section,
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
    *,
    hidden_channels: Sequence[int],
    depth: int = 1,
    matrix: str | None = None,
    time: TimeConditioning = "concat",
    solver: Section | None = None,
    evaluation_solver: Section | None = None,
    gradient: Gradient = "adjoint",
    trace: Trace = "hutchinson",
    fallback_steps: int = 8,
) -> list[Bijection]:
    """Continuous flows.

    Args:
        shape: of what reaches them.
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
            VelocityNetwork(shape[0], hidden_channels, time, context_channels),
            Solver(**solver or {}),
            Solver(**evaluation_solver) if evaluation_solver else None,
            gradient,
            trace,
            fallback=Solver("rk4", steps=fallback_steps),
        )
        if matrix is None:
            return flow
        # No FlowStep: the flow's energies are part of the loss, and it keeps only z's gradient.
        return Sequential([*linear_blocks(shape, 0, matrix=matrix), flow])

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


def make_coupling(
    shape: Shape, mask: Mask, transform: Section, network: Section, context_channels: int
) -> Coupling:
    """A coupling of images of `shape`, its network as wide as mask and transform need."""
    kept, rest = mask.shapes(shape)
    change = make_transform(transform)
    widths = (kept[0], change.parameters_per_value * rest[0])
    return Coupling(make_network(NETWORKS, network, *widths, context_channels), change, mask)


def make_transform(section: Section) -> Transform:
    """The transform that a section of a config describes."""
    arguments = dict(section)
    return TRANSFORMS[arguments.pop("kind")](**arguments)


def make_network(
    networks: Mapping[str, Callable[..., Any]],
    section: Section,
    in_channels: int,
    out_channels: int,
    context_channels: int,
) -> Any:  # noqa: ANN401
    """The conditioner, one of `networks`, that a section of a config describes."""
    arguments = dict(section)
    make = networks[arguments.pop("kind")]
    return make(in_channels, out_channels, context_channels=context_channels, **arguments)


def normalized(bijection: Bijection, channels: int, matrix: str | None) -> Bijection:
    """A bijection after ActNorm and, if a parametrization is given, a 1×1 convolution."""
    if matrix is None:
        return Sequential([ActNorm(channels), bijection])
    return FlowStep(channels, bijection, matrix)
