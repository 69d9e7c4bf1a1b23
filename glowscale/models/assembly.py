"""Multiscale flows of any blocks, as a config lists them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from glowscale.bijections import Bijection, Sequential, Shape
from glowscale.bijections.continuous import ContinuousFlow
from glowscale.models.blocks import BLOCKS
from glowscale.models.multiscale import MultiscaleFlow, split_shapes
from glowscale.models.parts import Arguments
from glowscale.models.solved import SolvedFlow


def assemble(
    image_shape: tuple[int, int, int],
    grey_levels: int,
    *,
    levels: Sequence[Sequence[Arguments]],
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
        ValueError: where a block, or the split after a level, cannot take the shape that reaches
            it; names the place.

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
            with _at(f"After levels.{number - 1}"):
                shape, _ = split_shapes(shape)
        level = Sequential(_build_level(blocks, shape, context_channels, f"levels.{number}"))
        shape = level.output_shape(shape)
        bijections.append(level)
    arguments = {**common, "classes": classes, "class_channels": class_channels}
    if any(isinstance(x, ContinuousFlow) for level in bijections for x in level.modules()):
        arguments |= {"probe": probe, "kinetic": kinetic, "frobenius": frobenius}
        return SolvedFlow(image_shape, grey_levels, bijections, **arguments)
    return MultiscaleFlow(image_shape, grey_levels, bijections, **arguments)


def _build_level(
    blocks: Sequence[Arguments], shape: Shape, context_channels: int, where: str
) -> list[Bijection]:
    bijections: list[Bijection] = []
    for number, block in enumerate(blocks):
        arguments = dict(block)
        kind = arguments.pop("kind")
        with _at(f"In {where}.{number}, a {kind} block"):
            made = BLOCKS[kind](shape, context_channels, **arguments)
            shape = Sequential(made).output_shape(shape)
        bijections += made
    return bijections


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Within it, the sentence of a ValueError begins with a place."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
