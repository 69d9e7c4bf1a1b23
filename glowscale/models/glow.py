"""Glow: every level squeezes, then repeats ActNorm, 1×1 convolution and coupling."""

from typing import Any

from glowscale.bijections import Bijection, Sequential, Squeeze
from glowscale.models.blocks import coupling_blocks
from glowscale.models.multiscale import MultiscaleFlow, refuse_odd_sides


class Glow(MultiscaleFlow):
    """A multiscale Glow (Kingma & Dhariwal 2018), for any shape that its levels divide.

    Args:
        image_shape: (C, H, W); H and W must be divisible by 2^levels.
        grey_levels: number of values that a pixel takes.
        levels: L, the number of scales.
        depth: K, the flow steps of each level.
        hidden_channels: width of the couplings' networks.
        coupling: `affine` or `additive`.
        scale: how an affine coupling bounds its scale, see `Affine`.
        matrix: parametrization of the 1×1 convolutions, `lu`, `plain` or `qr`.
        classes: number of classes that the couplings and the top prior are conditional on.
        class_channels: features of a class; 0 makes the model unconditional.
        common: other arguments of `MultiscaleFlow`.

    Raises:
        ValueError: where the image's sides cannot be halved `levels` times.

    >>> model = Glow((1, 8, 8), grey_levels=17, levels=2, depth=1, hidden_channels=16)
    >>> model.latent_shapes
    [(2, 4, 4), (8, 2, 2)]
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        grey_levels: int,
        *,
        levels: int,
        depth: int,
        hidden_channels: int,
        coupling: str = "affine",
        scale: str = "tanh",
        matrix: str = "lu",
        classes: int = 0,
        class_channels: int = 0,
        **common: Any,  # noqa: ANN401
    ) -> None:
        refuse_odd_sides(image_shape, levels, squeezes=levels)
        channels, height, width = image_shape
        bounds = {"scale": scale} if coupling == "affine" else {}

        def make_level(level: int) -> Bijection:
            # A squeeze makes four channels of one and a split keeps half of them.
            side = 2 ** (level + 1)
            steps = coupling_blocks(
                (2 * channels * side, height // side, width // side),
                class_channels if classes else 0,
                transform={"kind": coupling, **bounds},
                network={"kind": "convolutional", "hidden_channels": hidden_channels},
                depth=depth,
                matrix=matrix,
            )
            return Sequential([Squeeze(), *steps])

        super().__init__(
            image_shape,
            grey_levels,
            [make_level(level) for level in range(levels)],
            classes=classes,
            class_channels=class_channels,
            **common,
        )
