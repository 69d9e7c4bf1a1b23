"""The invertible 1×1 convolution: one linear map of the channels at every pixel."""

import math

import torch.nn.functional as F
from torch import Tensor

from glowscale.bijections.base import Bijection, full_precision
from glowscale.bijections.matrices import InvertibleMatrix
from glowscale.pixels import image_of, pixels_of


class Invertible1x1Conv(Bijection):
    """z = W x over the channels of x (B, C, H, W); log_det = H·W·log|det W|.

    Source: Glow (Kingma & Dhariwal 2018), section 3.2.

    Args:
        matrix: the parametrization of W (C, C).
    """

    def __init__(self, matrix: InvertibleMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mix the channels of x (B, C, H, W)."""
        with full_precision(x):
            matrix, log_det = self.matrix()
            z = mix_channels(x, matrix)
        return z, (math.prod(x.shape[2:]) * log_det).expand(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Unmix the channels."""
        with full_precision(z):
            return mix_channels(z, self.matrix.inverse_matrix())


def mix_channels(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b at every pixel of x (B, C, H, W), as one product of matrices."""
    return image_of(F.linear(pixels_of(x), matrix, bias), x)
