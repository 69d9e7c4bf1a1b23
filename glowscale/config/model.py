"""The config keys of models: their families, pixels and dequantization."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from glowscale.config.blocks import ContinuousBlock, Level, Matrix, Scale, Velocities
from glowscale.config.section import Count, Positive, Section, Weight


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
