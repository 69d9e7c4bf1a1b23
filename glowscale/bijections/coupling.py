"""Coupling: one part of the channels is transformed by what a network reads in the other."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from glowscale.bijections.base import Bijection, soft_clamp, sum_per_image, zero_log_det

LOG_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": lambda raw: soft_clamp(raw, 2.0),
    "sigmoid": lambda raw: nn.functional.logsigmoid(raw + 2.0),
    "exponential": lambda raw: raw,
}
"""From a network's raw output to the log-scale of an affine coupling, by its config name."""


class Coupling(Bijection):
    """Keep the first half of the channels, transform the rest given them.

    The Jacobian is triangular, so the log-det is that of the transformed part alone. Source:
    NICE (Dinh et al. 2015), RealNVP (Dinh et al. 2017). A subclass says what is done to the
    transformed channels and how many parameters that takes for each.

    Args:
        network: maps the kept channels (B, C // 2, H, W) and the context to
            (B, parameters_per_channel · (C − C // 2), H, W); it alone may run in low precision.
    """

    parameters_per_channel: ClassVar[int]

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform the second part of x (B, C, H, W)."""
        kept, rest = _split_channels(x)
        rest, log_det = self.transform(rest, self.network(kept, context).to(x.dtype))
        return torch.cat([kept, rest], 1), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Undo it: the kept channels still tell the parameters."""
        kept, rest = _split_channels(z)
        rest = self.untransform(rest, self.network(kept, context).to(z.dtype))
        return torch.cat([kept, rest], 1)

    def transform(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Map the transformed channels x; return them with the log-det (B,)."""
        raise TypeError(f"{type(self).__name__} must define transform(x, parameters).")

    def untransform(self, z: Tensor, parameters: Tensor) -> Tensor:
        """Undo `transform`."""
        raise TypeError(f"{type(self).__name__} must define untransform(z, parameters).")


class AffineCoupling(Coupling):
    """z = x · exp(log_scale) + shift.

    Args:
        network: see `Coupling`; two parameters for each transformed channel.
        scale: `tanh` bounds log_scale to ±2 (the default, stable), `sigmoid` is Glow's
            sigmoid(raw + 2), `exponential` is RealNVP's unbounded exp(raw).
    """

    parameters_per_channel = 2

    def __init__(self, network: nn.Module, scale: str = "tanh") -> None:
        super().__init__(network)
        self.log_scale = LOG_SCALES[scale]

    def transform(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift x."""
        shift, raw = parameters.chunk(2, dim=1)
        log_scale = self.log_scale(raw)
        return torch.addcmul(shift, x, log_scale.exp()), sum_per_image(log_scale)

    def untransform(self, z: Tensor, parameters: Tensor) -> Tensor:
        """Unshift and unscale z."""
        shift, raw = parameters.chunk(2, dim=1)
        return (z - shift) * (-self.log_scale(raw)).exp()


class AdditiveCoupling(Coupling):
    """z = x + shift; preserves volume."""

    parameters_per_channel = 1

    def transform(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Shift x."""
        return x + parameters, zero_log_det(x)

    def untransform(self, z: Tensor, parameters: Tensor) -> Tensor:
        """Unshift z."""
        return z - parameters


def _split_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[1] < 2:
        raise ValueError(f"A coupling needs at least 2 channels, not {x.shape[1]}; squeeze first.")
    kept = x.shape[1] // 2
    return x[:, :kept], x[:, kept:]
