"""A step of flow: what Glow, and a variational dequantizer, repeat."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from glowscale.bijections.activations import apply_stored
from glowscale.bijections.actnorm import ActNorm
from glowscale.bijections.base import Bijection, Gradients, Pullback, full_precision
from glowscale.bijections.conv1x1 import Invertible1x1Conv, mix_channels
from glowscale.bijections.matrices import MATRICES, Parametrized, inverse_of
from glowscale.pixels import pixels_of


class FlowStep(Bijection):
    """ActNorm, then an invertible 1×1 convolution, then a coupling, or what stands in its place.

    Source: Glow (Kingma & Dhariwal 2018), figure 2a. ActNorm and convolution are affine maps of
    the channels, y = W (s x + b), and so are computed as one; its gradients are written out, for
    autograd's many small operations would take longer than the arithmetic.

    Args:
        channels: of x (B, C, H, W).
        coupling: of so many channels; any bijection that has no penalties.
        matrix: parametrization of the 1×1 convolution, a key of `MATRICES`.
    """

    def __init__(self, channels: int, coupling: Bijection, matrix: str = "lu") -> None:
        super().__init__()
        conv = Invertible1x1Conv(MATRICES[matrix](channels))
        self.bijections = nn.ModuleList([ActNorm(channels), conv, coupling])
        self._inverted: tuple[Tensor, Tensor] | None = None

    @property
    def actnorm(self) -> ActNorm:
        """Its first part."""
        return cast("ActNorm", self.bijections[0])

    @property
    def conv(self) -> Invertible1x1Conv:
        """Its second part."""
        return cast("Invertible1x1Conv", self.bijections[1])

    @property
    def coupling(self) -> Bijection:
        """Its last part."""
        return cast("Bijection", self.bijections[2])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalize and mix the channels of x (B, C, H, W), then couple them."""
        if torch.is_grad_enabled():
            return apply_stored(self, x, context)
        self.actnorm.prepare(x)
        with full_precision(x):
            matrix, log_det = self.conv.matrix()
            y = mix_channels(x, *self._fold(matrix))
        z, coupling_log_det = self.coupling(y, context)
        return z, coupling_log_det + self._log_det(x, log_det)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Undo the coupling, unmix the channels, undo the normalization."""
        y = self.coupling.inverse(z, context)
        with full_precision(y):
            return mix_channels(y, *(self._inverted or self._invert(self.conv.matrix()[0])))

    def differentiate(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Pullback]:
        """As `forward`, outside of any graph; also what takes gradients back, once."""
        x = x.detach()
        with torch.no_grad(), full_precision(x):
            matrix, log_det, _ = parametrized = self.conv.matrix.differentiate()
            weight, bias = self._fold(matrix)
            y = mix_channels(x, weight, bias)
            log_det = self._log_det(x, log_det)
        z, coupling_log_det, pullback = self.coupling.differentiate(y, context)
        return z, coupling_log_det + log_det, self._pullback(x, weight, parametrized, pullback)

    def rebuild(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Pullback]:
        """As `inverse`, outside of any graph; also what takes gradients from z to x, once."""
        y, pullback = self.coupling.rebuild(z, context)
        with torch.no_grad(), full_precision(y):
            parametrized = self.conv.matrix.differentiate()
            weight, _ = self._fold(parametrized.matrix)
            x = mix_channels(y, *self._invert(parametrized.matrix))
        return x, self._pullback(x, weight, parametrized, pullback)

    def _fold(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """ActNorm and convolution as one weight (C, C) and bias (C,)."""
        return matrix * self.actnorm.log_scale.exp(), matrix @ self.actnorm.bias

    def _invert(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of the inverse of what `_fold` gives."""
        shrink = (-self.actnorm.log_scale).exp()
        return shrink[:, None] * inverse_of(matrix), -shrink * self.actnorm.bias

    def _log_det(self, x: Tensor, of_matrix: Tensor) -> Tensor:
        return math.prod(x.shape[2:]) * (of_matrix + self.actnorm.log_scale.sum())

    def _pullback(
        self, x: Tensor, weight: Tensor, parametrized: Parametrized, of_coupling: Pullback
    ) -> Pullback:
        """Through the coupling, then through the linear map of x (B, C, H, W) and its weight."""

        def pullback(grad_z: Tensor, grad_log_det: Tensor) -> Gradients:
            gradients = of_coupling(grad_z, grad_log_det)
            of_y = pixels_of(gradients.x)
            of_weight, of_bias = of_y.T @ pixels_of(x), of_y.sum(0)
            of_log_det = math.prod(x.shape[2:]) * grad_log_det.sum()
            scale = self.actnorm.log_scale.exp()
            of_matrix = torch.addr(of_weight * scale, of_bias, self.actnorm.bias)
            of_log_scale = (of_weight * weight).sum(0) + of_log_det
            of_actnorm = (of_log_scale, parametrized.matrix.T @ of_bias)
            of_parameters = parametrized.pullback(of_matrix, of_log_det)
            of_x = mix_channels(gradients.x, weight.T)
            parameters = (*of_actnorm, *of_parameters, *gradients.parameters)
            return Gradients(of_x, gradients.context, parameters)

        return pullback


@contextmanager
def keeping_inverses(model: nn.Module) -> Iterator[None]:
    """Within it, a model's flow steps invert their matrices once; its weights must not change."""
    steps = [layer for layer in model.modules() if isinstance(layer, FlowStep)]
    for step in steps:
        with torch.no_grad(), full_precision(step.actnorm.log_scale):
            step._inverted = step._invert(step.conv.matrix()[0])
    try:
        yield
    finally:
        for step in steps:
            step._inverted = None
