"""A step of flow: what Glow, and a variational dequantizer, repeat."""

from glowscale.bijections.actnorm import ActNorm
from glowscale.bijections.base import Bijection, Sequential
from glowscale.bijections.conv1x1 import Invertible1x1Conv
from glowscale.bijections.matrices import MATRICES


class FlowStep(Sequential):
    """ActNorm, then an invertible 1×1 convolution, then a coupling or another bijection.

    Source: Glow (Kingma & Dhariwal 2018), figure 2a.

    Args:
        channels: of x (B, C, H, W).
        coupling: a coupling of so many channels, or what takes its place.
        matrix: parametrization of the 1×1 convolution, a key of `MATRICES`.
    """

    def __init__(self, channels: int, coupling: Bijection, matrix: str = "lu") -> None:
        conv = Invertible1x1Conv(MATRICES[matrix](channels))
        super().__init__([ActNorm(channels), conv, coupling])
