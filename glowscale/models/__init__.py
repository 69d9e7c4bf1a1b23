"""Image models, and the one registry from a config to a model."""

from collections.abc import Callable, Mapping
from typing import Any

from glowscale.bijections import AffinePixels, Bijection, LogitPixels
from glowscale.bijections.activations import Activations
from glowscale.dequantization import (
    Dequantizer,
    NoiseAugmentation,
    UniformDequantizer,
    VariationalDequantizer,
)
from glowscale.models.assembly import assemble
from glowscale.models.ffjord import Ffjord
from glowscale.models.glow import Glow
from glowscale.models.multiscale import FlowOutput, MultiscaleFlow, Split

FAMILIES: dict[str, Callable[..., MultiscaleFlow]] = {
    "glow": Glow,
    "ffjord": Ffjord,
    "multiscale": assemble,
}
"""Assemblies by family; each takes the image shape, the grey levels, and its own arguments."""

__all__ = ["FAMILIES", "Ffjord", "FlowOutput", "Glow", "MultiscaleFlow", "Split", "build_model"]


def build_model(
    config: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    grey_levels: int,
    classes: int,
    activations: Activations = "store",
) -> MultiscaleFlow:
    """Build the model that the `model` section of a config describes.

    Args:
        config: `family`, `dequantization`, `preprocessing` and the family's own arguments.
        image_shape: (C, H, W).
        grey_levels: number of values that a pixel takes.
        classes: number of classes of the data.
        activations: what training keeps for the backward pass, see `apply_keeping`.

    Raises:
        ValueError: where the model cannot have images of this shape, or needs classes.
    """
    if config["class_channels"] and not classes:
        raise ValueError("it is to be conditional on classes, but the images have none")
    arguments = dict(config)
    family = FAMILIES[arguments.pop("family")]
    return family(
        image_shape,
        grey_levels,
        classes=classes,
        dequantizer=_dequantizer(
            arguments.pop("dequantization"), image_shape, grey_levels, activations
        ),
        preprocessing=_preprocessing(arguments.pop("preprocessing"), grey_levels),
        activations=activations,
        **arguments,
    )


def _dequantizer(
    config: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    grey_levels: int,
    activations: Activations,
) -> Dequantizer:
    arguments = dict(config)
    match arguments.pop("kind"):
        case "uniform":
            return UniformDequantizer(**arguments)
        case "variational":
            return VariationalDequantizer(
                image_shape, grey_levels, **arguments, activations=activations
            )
        case "noise":
            return NoiseAugmentation(**arguments)
        case kind:
            raise ValueError(
                f"There is no dequantization {kind!r}, only uniform, variational, noise."
            )


def _preprocessing(config: Mapping[str, Any], grey_levels: int) -> Bijection:
    arguments = dict(config)
    kind = {"affine": AffinePixels, "logit": LogitPixels}[arguments.pop("kind")]
    return kind(grey_levels, **arguments)
