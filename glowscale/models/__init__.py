"""Image models, and the one registry from a config to a model."""

from collections.abc import Callable, Mapping
from typing import Any

from glowscale.bijections import AffinePixels, Bijection, LogitPixels
from glowscale.dequantization import Dequantizer, UniformDequantizer, VariationalDequantizer
from glowscale.models.glow import glow
from glowscale.models.multiscale import FlowOutput, MultiscaleFlow, Split

FAMILIES: dict[str, Callable[..., MultiscaleFlow]] = {"glow": glow}
"""Assemblies by family; each takes image_shape, grey_levels, dequantizer, preprocessing, ..."""

__all__ = ["FAMILIES", "FlowOutput", "MultiscaleFlow", "Split", "build_model", "glow"]


def build_model(
    config: Mapping[str, Any], image_shape: tuple[int, int, int], grey_levels: int
) -> MultiscaleFlow:
    """Build the model that the `model` section of a config describes.

    Args:
        config: `family`, `dequantization`, `preprocessing` and the family's own arguments.
        image_shape: (C, H, W).
        grey_levels: number of values that a pixel takes.

    Raises:
        ValueError: where the model cannot have images of this shape.
    """
    arguments = dict(config)
    family = FAMILIES[arguments.pop("family")]
    dequantizer = _dequantizer(arguments.pop("dequantization"), image_shape, grey_levels)
    preprocessing = _preprocessing(arguments.pop("preprocessing"), grey_levels)
    return family(image_shape, grey_levels, dequantizer, preprocessing, **arguments)


def _dequantizer(
    config: Mapping[str, Any], image_shape: tuple[int, int, int], grey_levels: int
) -> Dequantizer:
    arguments = dict(config)
    match arguments.pop("kind"):
        case "uniform":
            return UniformDequantizer(**arguments)
        case "variational":
            return VariationalDequantizer(image_shape, grey_levels, **arguments)
        case kind:
            raise ValueError(f"There is no dequantization {kind!r}, only uniform, variational.")


def _preprocessing(config: Mapping[str, Any], grey_levels: int) -> Bijection:
    arguments = dict(config)
    kind = {"affine": AffinePixels, "logit": LogitPixels}[arguments.pop("kind")]
    return kind(grey_levels, **arguments)
