"""FFJORD: every level follows continuous flows, squeezes, and follows some more."""

from collections.abc import Mapping, Sequence
from typing import Any

from glowscale.bijections import Bijection, Sequential, Squeeze
from glowscale.bijections.continuous import Gradient, Trace
from glowscale.models.blocks import continuous_flows
from glowscale.models.multiscale import refuse_odd_sides
from glowscale.models.solved import SolvedFlow
from glowscale.networks.velocity import TimeConditioning


class Ffjord(SolvedFlow):
    """A multiscale continuous flow (Grathwohl et al. 2019), for any shape that its levels divide.

    A level is `depth` flows, a squeeze and `depth` more flows, before the split; the last level,
    which does not squeeze, is `depth` flows.

    Args:
        image_shape: (C, H, W); H and W must be divisible by 2^(levels − 1).
        grey_levels: number of values that a pixel takes.
        levels: number of scales.
        depth: flows in a row.
        hidden_channels: widths of the velocities' hidden layers.
        unsqueezed_depth: flows before a level's squeeze, `depth` if not given; 0 leaves out those
            that work on the larger image, most of the time of a step.
        matrix, time, solver, evaluation_solver, gradient, trace, fallback_steps: of the flows, see
            `continuous_flows`.
        classes: number of classes that the velocities are conditional on.
        class_channels: features of a class; 0 makes the model unconditional.
        common: other arguments of `SolvedFlow`.

    Raises:
        ValueError: where the image's sides cannot be halved so often, for other activations
            than `store`, or for a dequantizer that hides the images.

    >>> model = Ffjord((1, 8, 8), grey_levels=17, levels=2, depth=1, hidden_channels=[16])
    >>> model.latent_shapes
    [(2, 4, 4), (2, 4, 4)]
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        grey_levels: int,
        *,
        levels: int,
        depth: int,
        hidden_channels: Sequence[int],
        unsqueezed_depth: int | None = None,
        matrix: str | None = None,
        time: TimeConditioning = "concat",
        solver: Mapping[str, Any] | None = None,
        evaluation_solver: Mapping[str, Any] | None = None,
        gradient: Gradient = "adjoint",
        trace: Trace = "hutchinson",
        fallback_steps: int = 8,
        classes: int = 0,
        class_channels: int = 0,
        **common: Any,  # noqa: ANN401
    ) -> None:
        refuse_odd_sides(image_shape, levels, squeezes=levels - 1)

        def make_flows(channels: int, number: int) -> list[Bijection]:
            return continuous_flows(
                channels,
                class_channels if classes else 0,
                depth=number,
                hidden_channels=hidden_channels,
                matrix=matrix,
                time=time,
                solver=solver,
                evaluation_solver=evaluation_solver,
                gradient=gradient,
                trace=trace,
                fallback_steps=fallback_steps,
            )

        def make_level(channels: int, last: bool) -> Bijection:
            if last:
                return Sequential(make_flows(channels, depth))
            before = make_flows(channels, depth if unsqueezed_depth is None else unsqueezed_depth)
            return Sequential([*before, Squeeze(), *make_flows(4 * channels, depth)])

        super().__init__(
            image_shape,
            grey_levels,
            # A squeeze makes four channels of one and a split keeps half of them.
            [
                make_level(image_shape[0] * 2**level, level == levels - 1)
                for level in range(levels)
            ],
            classes=classes,
            class_channels=class_channels,
            **common,
        )
