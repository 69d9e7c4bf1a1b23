"""Monotone maps of single values: what couplings and autoregressive flows apply to them."""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glowscale.bijections.base import differentiate, soft_clamp, sum_per_image, zero_log_det

TransformPullback = Callable[[Tensor, Tensor], Sequence[Tensor | None]]
"""From the gradients of a transform's z and log_det to those of x and its parameters."""


class Transform:
    """An increasing map of every value of x (B, C, ...), with parameters of its own for each.

    Parameters are (B, parameters_per_value · C, ...), one group of C channels after the other.
    Parameters of zero make it the identity, or nearly so. It is no bijection of its own and has
    no weights: all that it knows, a network tells it.
    """

    parameters_per_value: int
    tolerance: ClassVar[float | None] = None
    """To which `inverse` is solved; None where it is written out."""

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (B, C, ...); return z of its shape with the log-det (B,)."""
        raise TypeError(f"{type(self).__name__} must define forward(x, parameters).")

    def inverse(self, z: Tensor, parameters: Tensor) -> Tensor:
        """Undo `forward`."""
        raise TypeError(f"{type(self).__name__} must define inverse(z, parameters).")

    def differentiate(
        self, x: Tensor, parameters: Tensor
    ) -> tuple[Tensor, Tensor, TransformPullback]:
        """As `forward`, outside of any graph, and the way back to x and parameters, once."""
        (z, log_det), pullback = differentiate(self.forward, (x, parameters), ())
        return z, log_det, pullback


class LogScale(NamedTuple):
    """From a network's raw output to the log-scale of an affine transform."""

    of: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor | float]
    """The derivative, at the log-scale."""


LOG_SCALES = {
    "tanh": LogScale(
        lambda raw: soft_clamp(raw, 2.0), lambda log_scale: 1 - (log_scale / 2).square()
    ),
    "sigmoid": LogScale(lambda raw: F.logsigmoid(raw + 2.0), lambda log_scale: -log_scale.expm1()),
    "exponential": LogScale(lambda raw: raw, lambda log_scale: 1.0),
}
"""By the name that a config gives it."""


class Affine(Transform):
    """z = x · exp(log_scale) + shift. Source: RealNVP (Dinh et al. 2017), equation 7.

    Args:
        scale: `tanh` bounds log_scale to ±2 (the default, stable), `sigmoid` is Glow's
            sigmoid(raw + 2), `exponential` is RealNVP's unbounded exp(raw).
    """

    parameters_per_value = 2

    def __init__(self, scale: str = "tanh") -> None:
        self.log_scale = LOG_SCALES[scale]

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift x (B, C, ...)."""
        shift, raw = parameters.chunk(2, dim=1)
        log_scale = self.log_scale.of(raw)
        return torch.addcmul(shift, x, log_scale.exp()), sum_per_image(log_scale)

    def inverse(self, z: Tensor, parameters: Tensor) -> Tensor:
        """Unshift and unscale z."""
        shift, raw = parameters.chunk(2, dim=1)
        return (z - shift) * (-self.log_scale.of(raw)).exp()

    @torch.no_grad()
    def differentiate(
        self, x: Tensor, parameters: Tensor
    ) -> tuple[Tensor, Tensor, TransformPullback]:
        """As `forward`, outside of any graph, with the way back written out."""
        shift, raw = parameters.chunk(2, dim=1)
        log_scale = self.log_scale.of(raw)
        scale = log_scale.exp()

        def pullback(grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor, Tensor]:
            of_x = grad_z * scale
            per_image = grad_log_det.view(-1, *[1] * (x.dim() - 1))
            of_log_scale = torch.addcmul(per_image, of_x, x)
            of_raw = of_log_scale * self.log_scale.slope(log_scale)
            return of_x, torch.cat([grad_z, of_raw], 1)

        return torch.addcmul(shift, x, scale), sum_per_image(log_scale), pullback


class Additive(Transform):
    """z = x + shift; preserves volume. Source: NICE (Dinh et al. 2015)."""

    parameters_per_value = 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Shift x (B, C, ...)."""
        return x + parameters, zero_log_det(x)

    def inverse(self, z: Tensor, parameters: Tensor) -> Tensor:
        """Unshift z."""
        return z - parameters
