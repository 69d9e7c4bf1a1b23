"""The config keys of a level's blocks, and of what they are made of."""

from typing import Annotated, Literal

from pydantic import Field

from glowscale.config.section import Count, Positive, Section

Scale = Literal["tanh", "sigmoid", "exponential"]
Matrix = Literal["lu", "plain", "qr"]
Mask = Literal["channels", "checkerboard"]


class AffineTransform(Section):
    """A scale and a shift."""

    kind: Literal["affine"] = Field(description="a scale and a shift of every value")
    scale: Scale = Field("tanh", description="how the scale is bounded")


class AdditiveTransform(Section):
    """A shift."""

    kind: Literal["additive"] = Field(description="a shift of every value")


class GaussianTransform(Section):
    """Whitened by a mean and a deviation."""

    kind: Literal["gaussian"] = Field(description="less a mean, by a deviation")
    scale: Scale = Field("tanh", description="how the deviation is bounded")


class MixtureTransform(Section):
    """The distribution function of a mixture of logistics, then a scale and a shift."""

    kind: Literal["mixture"] = Field(description="a mixture of logistics, then scale and shift")
    components: Count = Field(8, description="logistics of a mixture")
    scale: Scale = Field("tanh", description="how the scale is bounded")


class SplineTransform(Section):
    """A rational-quadratic spline."""

    kind: Literal["spline"] = Field(description="a rational-quadratic spline")
    bins: Annotated[int, Field(ge=2)] = Field(8, description="of a spline")
    bound: Positive = Field(3.0, description="values beyond it are left as they are")


Transform = Annotated[
    AffineTransform | AdditiveTransform | GaussianTransform | MixtureTransform | SplineTransform,
    Field(discriminator="kind"),
]


class ConvolutionalNetwork(Section):
    """Glow's three convolutions."""

    kind: Literal["convolutional"] = Field(description="Glow's three convolutions")
    hidden_channels: Count = Field(description="channels between them")


class GatedNetwork(Section):
    """Gated convolutions and self-attention."""

    kind: Literal["gated"] = Field(description="Flow++'s gated convolutions and self-attention")
    hidden_channels: Count = Field(description="features of every pixel")
    blocks: Count = Field(description="of convolution and attention")
    heads: Annotated[int, Field(ge=0)] = Field(1, description="of attention; 0 leaves it out")


class TransformerNetwork(Section):
    """A vision transformer."""

    kind: Literal["transformer"] = Field(description="a vision transformer; a pixel is a token")
    hidden_channels: Count = Field(description="features of every token")
    blocks: Count = Field(description="of attention and perceptron")
    heads: Count = Field(4, description="of attention")


Network = Annotated[
    ConvolutionalNetwork | GatedNetwork | TransformerNetwork, Field(discriminator="kind")
]


class MaskedConvolutionalNetwork(Section):
    """A gated PixelCNN."""

    kind: Literal["masked_convolutional"] = Field(description="a gated PixelCNN")
    hidden_channels: Count = Field(description="channels of either stack")
    blocks: Count = Field(description="gated residual ones, after the first convolutions")
    kernel_size: Count = Field(3, description="of the square that kernels are half of; odd")


class CausalTransformer(Section):
    """A causal transformer."""

    kind: Literal["causal_transformer"] = Field(description="reads in raster order")
    hidden_channels: Count = Field(description="features of every token")
    blocks: Count = Field(description="of attention and perceptron")
    heads: Count = Field(4, description="of attention")


CausalNetwork = Annotated[
    MaskedConvolutionalNetwork | CausalTransformer, Field(discriminator="kind")
]


class Repeated(Section):
    """A block that may stand several times in a row."""

    depth: Count = Field(1, description="how often, in a row")


class Mixed(Repeated):
    """A block that begins with ActNorm and a linear map of the channels."""

    matrix: Matrix | None = Field(
        "lu", description="of a 1x1 convolution, with ActNorm, before each; ActNorm alone if null"
    )


class SqueezeBlock(Repeated):
    """Blocks of 2×2 pixels into channels."""

    kind: Literal["squeeze"] = Field(description="2x2 pixels into channels; twice makes 4x4")


class LinearBlock(Repeated):
    """ActNorm and an invertible 1×1 convolution."""

    kind: Literal["linear"] = Field(description="ActNorm and an invertible 1x1 convolution")
    matrix: Matrix = Field("lu", description="parametrization of the 1x1 convolution")


class CouplingBlock(Mixed):
    """Couplings."""

    kind: Literal["coupling"] = Field(description="one part is transformed given the other")
    mask: Mask = Field(
        "channels",
        description="what is kept: half the channels, one and the other by turns "
        "without a matrix; every other pixel, by turns",
    )
    transform: Transform = Field(description="what is done to each value of the rest")
    network: Network = Field(description="what reads the kept part")


class RecursiveBlock(Repeated):
    """Recursive couplings."""

    kind: Literal["recursive"] = Field(description="couplings within each half of a coupling")
    matrix: Matrix = Field("lu", description="of the 1x1 convolution, with ActNorm, before each")
    recursions: Count = Field(description="how often halves are coupled again")
    transform: Transform = Field(description="what is done to each value of the rest")
    network: Network = Field(description="what reads the kept part")


class AutoregressiveBlock(Mixed):
    """Autoregressive flows."""

    kind: Literal["autoregressive"] = Field(
        description="each pixel is transformed given those before it; by turns from either end"
    )
    transform: Transform = Field(description="what is done to each value")
    network: CausalNetwork = Field(description="what reads the pixels before")
    inverse: bool = Field(
        False, description="the other way round: sampling is parallel, and density sequential"
    )


class Solver(Section):
    """How a differential equation is solved."""

    method: Literal[
        "dopri5",
        "dopri8",
        "bosh3",
        "fehlberg2",
        "adaptive_heun",
        "rk4",
        "midpoint",
        "euler",
        "heun2",
        "heun3",
    ] = Field("dopri5", description="the first five choose their steps, the others have a grid")
    tolerance: Positive = Field(1e-5, description="absolute and relative, where steps are chosen")
    steps: Count = Field(4, description="of a grid")
    evaluation_limit: Count = Field(1000, description="evaluations of one solve, where chosen")
    smallest_step: Annotated[float, Field(ge=1e-12)] = Field(
        1e-7, description="of the time from 0 to 1, where chosen"
    )


class Velocities(Section):
    """Continuous flows: their velocities, and how they are solved."""

    hidden_channels: tuple[Count, ...] = Field(
        (64, 64, 64), strict=False, min_length=1, description="widths of a velocity's layers"
    )
    matrix: Matrix | None = Field(
        None, description="of a 1x1 convolution with ActNorm before every flow; none if null"
    )
    time: Literal["concat", "scale_shift"] = Field(
        "scale_shift", description="how a velocity is told the time"
    )
    solver: Solver = Field(Solver(), description="in training")
    evaluation_solver: Solver = Field(
        Solver(method="rk4", steps=8),
        description="otherwise; on a grid, figures do not depend on evaluate.batch",
    )
    gradient: Literal["adjoint", "direct"] = Field(
        "adjoint", description="solved backwards, or through the solver's own steps"
    )
    trace: Literal["hutchinson", "exact"] = Field(
        "hutchinson", description="estimated by a probe, or a product for every dimension"
    )
    fallback_steps: Count = Field(
        8, description="rk4 steps where a solve passes its limits; see train.stiff_limit"
    )


class ContinuousBlock(Velocities, Repeated):
    """Continuous flows."""

    kind: Literal["continuous"] = Field(description="flows that follow a velocity")


Block = Annotated[
    SqueezeBlock
    | LinearBlock
    | CouplingBlock
    | RecursiveBlock
    | AutoregressiveBlock
    | ContinuousBlock,
    Field(discriminator="kind"),
]
Level = Annotated[tuple[Block, ...], Field(strict=False)]
