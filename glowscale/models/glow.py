"""Glow: every level squeezes, then repeats ActNorm, 1×1 convolution and coupling."""

from glowscale.bijections import (
    Additive,
    Affine,
    Bijection,
    Coupling,
    FlowStep,
    Sequential,
    Squeeze,
    Transform,
)
from glowscale.bijections.activations import Activations
from glowscale.dequantization import Dequantizer
from glowscale.models.multiscale import MultiscaleFlow, refuse_odd_sides
from glowscale.networks import ConvolutionalNetwork


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
        matrix: parametrization of the 1×1 convolutions, `lu` or `plain`.
        classes: number of classes that the couplings and the top prior are conditional on.
        class_channels: features of a class; 0 makes the model unconditional.
        dequantizer: makes images continuous; uniform if not given.
        preprocessing: from grey levels to the flow's scale; affine if not given.
        activations: what is kept for the backward pass, see `apply_keeping`.

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
        dequantizer: Dequantizer | None = None,
        preprocessing: Bijection | None = None,
        activations: Activations = "store",
    ) -> None:
        refuse_odd_sides(image_shape, levels, squeezes=levels)

        transform: Transform = Affine(scale) if coupling == "affine" else Additive()

        def make_step(channels: int) -> FlowStep:
            kept = channels // 2
            network = ConvolutionalNetwork(
                kept,
                transform.parameters_per_value * (channels - kept),
                hidden_channels,
                class_channels if classes else 0,
            )
            return FlowStep(channels, Coupling(network, transform), matrix)

        def make_level(channels: int) -> Bijection:
            return Sequential([Squeeze(), *(make_step(channels) for _ in range(depth))])

        super().__init__(
            image_shape,
            grey_levels,
            # A squeeze makes four channels of one and a split keeps half of them.
            [make_level(4 * image_shape[0] * 2**level) for level in range(levels)],
            dequantizer=dequantizer,
            preprocessing=preprocessing,
            classes=classes,
            class_channels=class_channels,
            activations=activations,
        )
