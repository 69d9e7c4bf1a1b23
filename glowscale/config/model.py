"""The config keys of models: families, blocks, and what they are made of."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from glowscale.config.section import Count, Positive, Section, Weight

Scale = Literal["tanh", "sigmoid", "exponential"]
Matrix = Literal["lu", "plain", "qr"]
Mask = Literal["channels", "checkerboard"]


class AffinePreprocessing(Section):
    """Pixels linearly to [-½, ½]."""

    kind: Literal["affine"] = Field(description="pixels linearly to [-1/2, 1/2]")


class LogitPreprocessing(Section):
    """Pixels to the whole line."""

    kind: Literal["logit"] = Field(description="pixels to the whole line")
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.05, description="how far the ends are moved inwards before the logit"
    )


class UniformDequantization(Section):
    """Uniform noise."""

    kind: Literal["uniform"] = Field(description="uniform noise within a grey level")


class VariationalDequantization(Section):
    """Noise from a conditional flow."""

    kind: Literal["variational"] = Field(description="noise from a flow that reads the image")
    depth: Count = Field(4, description="coupling steps of the noise's flow")
    hidden_channels: Count = Field(64, description="width of its couplings' networks")
    context_channels: Count = Field(32, description="features that they read of the image")


class NoiseAugmentation(Section):
    """Gaussian noise, for samples and not for bits/dim."""

    kind: Literal["noise"] = Field(description="Gaussian noise that samples are freed of again")
    std: Positive = Field(description="of the noise, in grey levels")


Preprocessing = Annotated[AffinePreprocessing | LogitPreprocessing, Field(discriminator="kind")]
Dequantization = Annotated[
    UniformDequantization | VariationalDequantization | NoiseAugmentation,
    Field(discriminator="kind"),
]


class Family(Section):
    """What all models share."""

    class_channels: Annotated[int, Field(ge=0)] = Field(
        0, description="features of the class that networks and top prior read; 0 ignores classes"
    )
    class_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="part of the training images whose class is withheld, for guidance"
    )
    preprocessing: Preprocessing = Field(
        AffinePreprocessing(kind="affine"), description="from grey levels to the flow"
    )
    dequantization: Dequantization = Field(
        UniformDequantization(kind="uniform"), description="how pixels become continuous"
    )

    @property
    def is_continuous(self) -> bool:
        """Whether there are continuous flows in it."""
        return False

    @model_validator(mode="after")
    def _classes_are_known(self) -> Self:
        """Refuse to withhold classes from a model that reads none."""
        if self.class_dropout and not self.class_channels:
            raise ValueError(
                f"model.class_dropout is {self.class_dropout}, but with model.class_channels=0 "
                "there are no classes to withhold"
            )
        return self

    @model_validator(mode="after")
    def _noise_fits(self) -> Self:
        """Refuse Gaussian noise where no pixel may leave its range, or densities are estimated."""
        if self.dequantization.kind != "noise":
            return self
        if self.preprocessing.kind == "logit":
            raise ValueError(
                "model.dequantization.kind is 'noise', which takes pixels out of the range that "
                "model.preprocessing.kind='logit' is defined on; take 'affine'"
            )
        if self.is_continuous:
            raise ValueError(
                "model.dequantization.kind is 'noise', of which samples are freed by the exact "
                "density alone, but continuous flows estimate it; take 'uniform' or 'variational'"
            )
        return self


class Glow(Family):
    """A multiscale Glow."""

    family: Literal["glow"] = Field(description="which kind of flow")
    levels: Count = Field(description="scales; the image's sides must be divisible by 2^levels")
    depth: Count = Field(description="flow steps per level")
    hidden_channels: Count = Field(description="width of the couplings' networks")
    coupling: Literal["affine", "additive"] = Field("affine", description="kind of coupling")
    scale: Scale = Field("tanh", description="how an affine coupling bounds its scale")
    matrix: Matrix = Field("lu", description="parametrization of the 1x1 convolutions")


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
    smallest_step: Positive = Field(1e-7, description="of the time from 0 to 1, where chosen")


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
        description="otherwise; on a grid, figures do not depend on the block",
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


class Energies(Section):
    """What a loss takes of continuous flows besides their likelihood."""

    probe: Literal["rademacher", "gaussian"] = Field("rademacher", description="of the trace")
    kinetic: Weight = Field(0.0, description="weight of the velocities' mean square")
    frobenius: Weight = Field(0.0, description="weight of their Jacobians' mean square")


class Ffjord(Velocities, Energies, Family):
    """A multiscale continuous flow."""

    family: Literal["ffjord"] = Field(description="which kind of flow")
    levels: Count = Field(description="scales; sides must be divisible by 2^(levels - 1)")
    depth: Count = Field(2, description="continuous flows in a row, before and after a squeeze")
    unsqueezed_depth: Annotated[int, Field(ge=0)] | None = Field(
        None, description="flows before a squeeze, on the larger image; depth if not given"
    )

    @property
    def is_continuous(self) -> bool:
        """Whether there are continuous flows in it."""
        return True


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
        "channels", description="what is kept: half the channels; every other pixel, by turns"
    )
    transform: Transform = Field(description="what is done to each value of the rest")
    network: Network = Field(description="what reads the kept part")


class RecursiveBlock(Mixed):
    """Recursive couplings."""

    kind: Literal["recursive"] = Field(description="couplings within each half of a coupling")
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


class Multiscale(Energies, Family):
    """Levels of any blocks."""

    family: Literal["multiscale"] = Field(description="which kind of flow")
    levels: tuple[Level, ...] = Field(
        strict=False,
        description="lists of blocks, finest level first; half the channels are split off between",
    )

    @property
    def is_continuous(self) -> bool:
        """Whether there are continuous flows in it."""
        return any(isinstance(block, ContinuousBlock) for level in self.levels for block in level)

    @field_validator("levels", mode="before")
    @classmethod
    def _levels_are_lists(cls, levels: object) -> object:
        """Refuse blocks that stand where levels should."""
        if isinstance(levels, list | tuple):
            for number, level in enumerate(levels):
                if isinstance(level, Mapping):
                    raise ValueError(
                        f"model.levels is a list of levels, each a list of blocks, but "
                        f"model.levels.{number} is a block: {level}"
                    )
        return levels

    @model_validator(mode="after")
    def _energies_are_of_something(self) -> Self:
        """Refuse what is of continuous blocks where there are none."""
        for name, field in Energies.model_fields.items():
            value = getattr(self, name)
            if value != field.default and not self.is_continuous:
                raise ValueError(
                    f"model.{name} is {value!r}, but no block in model.levels is continuous"
                )
        return self


Model = Annotated[Glow | Ffjord | Multiscale, Field(discriminator="family")]
