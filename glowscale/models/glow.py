"""Glow: every level squeezes, then repeats ActNorm, 1×1 convolution and coupling."""

from torch import nn

from glowscale.bijections import (
    AdditiveCoupling,
    AffineCoupling,
    Bijection,
    Coupling,
    FlowStep,
    Sequential,
    Squeeze,
)
from glowscale.dequantization import Dequantizer
from glowscale.models.multiscale import MultiscaleFlow
from glowscale.networks import ConvolutionalNetwork

COUPLINGS: dict[str, type[Coupling]] = {"affine": AffineCoupling, "additive": AdditiveCoupling}
"""Couplings by the name that a config gives them."""


def glow(
    image_shape: tuple[int, int, int],
    grey_levels: int,
    dequantizer: Dequantizer,
    preprocessing: Bijection,
    levels: int,
    depth: int,
    hidden_channels: int,
    coupling: str = "affine",
    scale: str = "tanh",
    matrix: str = "lu",
) -> MultiscaleFlow:
    """Assemble a Glow (Kingma & Dhariwal 2018).

    Args:
        image_shape: (C, H, W); H and W must be divisible by 2^levels.
        grey_levels: number of values that a pixel takes.
        dequantizer: makes images continuous.
        preprocessing: from grey levels to the flow's scale.
        levels: L, the number of scales.
        depth: K, the flow steps of each level.
        hidden_channels: width of the couplings' networks.
        coupling: `affine` or `additive`.
        scale: how an affine coupling bounds its scale, see `AffineCoupling`.
        matrix: parametrization of the 1×1 convolutions, `lu` or `plain`.

    Raises:
        ValueError: where the image's sides cannot be halved `levels` times.

    >>> from glowscale.bijections import AffinePixels
    >>> from glowscale.dequantization import UniformDequantizer
    >>> model = glow((1, 8, 8), 17, UniformDequantizer(), AffinePixels(17), 2, 1, 16)
    >>> model.latent_shapes
    [(2, 4, 4), (8, 2, 2)]
    """
    channels, height, width = image_shape
    if height % 2**levels or width % 2**levels:
        raise ValueError(
            f"Images of {height}×{width} cannot be halved {levels} times: so many levels need "
            f"sides divisible by {2**levels}."
        )

    def make_step(channels: int) -> FlowStep:
        kept = channels // 2
        out_channels = COUPLINGS[coupling].parameters_per_channel * (channels - kept)
        network = ConvolutionalNetwork(kept, out_channels, hidden_channels)
        return FlowStep(channels, make_coupling(coupling, network, scale), matrix)

    def make_level(channels: int) -> Bijection:
        return Sequential([Squeeze(), *(make_step(channels) for _ in range(depth))])

    # A squeeze makes four channels of one and a split keeps half of them.
    flows = [make_level(4 * channels * 2**level) for level in range(levels)]
    return MultiscaleFlow(image_shape, grey_levels, dequantizer, preprocessing, flows)


def make_coupling(kind: str, network: nn.Module, scale: str) -> Coupling:
    """A coupling of `COUPLINGS` over a network; `scale` matters to the affine one alone."""
    if kind == "affine":
        return AffineCoupling(network, scale)
    return COUPLINGS[kind](network)
