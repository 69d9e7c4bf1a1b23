"""Coupling: one part of the channels is transformed by what a network reads in the other."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from glowscale.bijections.base import (
    Bijection,
    Gradients,
    Pullback,
    gradients_of,
    soft_clamp,
    sum_per_image,
    zero_log_det,
)

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
        kept, rest = split_channels(x)
        rest, log_det = self.transform(rest, self.network(kept, context).to(x.dtype))
        return torch.cat([kept, rest], 1), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Undo it: the kept channels still tell the parameters."""
        kept, rest = split_channels(z)
        rest = self.untransform(rest, self.network(kept, context).to(z.dtype))
        return torch.cat([kept, rest], 1)

    def differentiate(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Pullback]:
        """As `forward`, outside of any graph; also what takes gradients back, once."""
        kept, rest = split_channels(x.detach())
        return self._differentiate(self._read(kept, context, x.dtype), rest)

    def rebuild(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Pullback]:
        """As `inverse`; the network's one pass serves the inverse and the gradients alike."""
        kept, rest = split_channels(z.detach())
        reading = self._read(kept, context, z.dtype)
        with torch.no_grad():
            rest = self.untransform(rest, reading.parameters)
        return torch.cat([kept, rest], 1), self._differentiate(reading, rest)[2]

    def _read(self, kept: Tensor, context: Tensor | None, dtype: torch.dtype) -> "_Reading":
        """Let the network read the kept channels, in a graph that begins with them."""
        kept = kept.detach().requires_grad_()
        context = None if context is None else context.detach().requires_grad_()
        with torch.enable_grad():
            return _Reading(kept, context, self.network(kept, context).to(dtype))

    def _differentiate(self, reading: "_Reading", rest: Tensor) -> tuple[Tensor, Tensor, Pullback]:
        kept, context, parameters = reading
        rest = rest.detach().requires_grad_()
        with torch.enable_grad():
            changed, log_det = self.transform(rest, parameters)
        wanted = [rest, kept, *self.leaves]
        if context is not None:
            wanted.append(context)

        def pullback(grad_z: Tensor, grad_log_det: Tensor) -> Gradients:
            of_kept, of_changed = split_channels(grad_z)
            outputs, gradients = (changed, log_det), (of_changed, grad_log_det)
            of_rest, by_network, *others = gradients_of(outputs, wanted, gradients)
            of_context = None if context is None else others.pop()
            if by_network is not None:
                of_kept = of_kept + by_network
            of_x = torch.cat([of_kept, cast("Tensor", of_rest)], 1)
            return Gradients(of_x, of_context, tuple(others))

        return torch.cat([kept.detach(), changed.detach()], 1), log_det.detach(), pullback

    def transform(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Map the transformed channels x; return them with the log-det (B,)."""
        raise TypeError(f"{type(self).__name__} must define transform(x, parameters).")

    def untransform(self, z: Tensor, parameters: Tensor) -> Tensor:
        """Undo `transform`."""
        raise TypeError(f"{type(self).__name__} must define untransform(z, parameters).")


class _Reading(NamedTuple):
    """What a coupling's network read, and said."""

    kept: Tensor
    context: Tensor | None
    parameters: Tensor


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


def split_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first half of the channels of x (B, C, H, W), and the rest."""
    if x.shape[1] < 2:
        raise ValueError(f"A coupling needs at least 2 channels, not {x.shape[1]}; squeeze first.")
    kept, rest = torch.split(x, [x.shape[1] // 2, (x.shape[1] + 1) // 2], dim=1)
    return kept, rest
