"""Coupling: one part of the channels is transformed by what a network reads in the other."""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from glowscale.bijections.base import (
    Bijection,
    Gradients,
    Pullback,
    differentiate,
    soft_clamp,
    sum_per_image,
    zero_log_det,
)


class LogScale(NamedTuple):
    """From a network's raw output to the log-scale of an affine coupling."""

    of: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor | float]
    """The derivative, at the log-scale."""


LOG_SCALES = {
    "tanh": LogScale(
        lambda raw: soft_clamp(raw, 2.0), lambda log_scale: 1 - (log_scale / 2).square()
    ),
    "sigmoid": LogScale(
        lambda raw: nn.functional.logsigmoid(raw + 2.0), lambda log_scale: -log_scale.expm1()
    ),
    "exponential": LogScale(lambda raw: raw, lambda log_scale: 1.0),
}
"""By the name that a config gives it."""
TransformPullback = Callable[[Tensor, Tensor], Sequence[Tensor | None]]
"""From the gradients of a transformation's z and log_det to those of x and its parameters."""


@runtime_checkable
class Differentiable(Protocol):
    """A network that knows the way back itself."""

    def differentiate(
        self, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor | None]]]:
        """As its forward pass, outside of any graph, and what takes the result's gradient back.

        That is to those of x, context and parameters, in order, once.
        """


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
        parameters, of_network = self._differentiate_network(kept, context)
        rest, log_det, of_transform = self.differentiate_transform(rest, parameters)
        return torch.cat([kept, rest], 1), log_det, _pullback(of_transform, of_network)

    def rebuild(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Pullback]:
        """As `inverse`; the network's one pass serves the inverse and the gradients alike."""
        kept, rest = split_channels(z.detach())
        parameters, of_network = self._differentiate_network(kept, context)
        with torch.no_grad():
            rest = self.untransform(rest, parameters)
        _, _, of_transform = self.differentiate_transform(rest, parameters)
        return torch.cat([kept, rest], 1), _pullback(of_transform, of_network)

    def _differentiate_network(
        self, kept: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor | None]]]:
        """The network's word, in kept's type, and the way back to kept, context and weights."""
        if isinstance(self.network, Differentiable):
            word, pullback = self.network.differentiate(kept, context)
        else:
            (word,), pullback = differentiate(
                lambda *inputs: (self.network(*inputs),), (kept, context), self.leaves
            )
        return word.to(kept.dtype), lambda gradient: pullback(gradient.to(word.dtype))

    def differentiate_transform(
        self, x: Tensor, parameters: Tensor
    ) -> tuple[Tensor, Tensor, TransformPullback]:
        """As `transform`, outside of any graph, and the way back to x and parameters, once."""
        (z, log_det), pullback = differentiate(self.transform, (x, parameters), ())
        return z, log_det, pullback

    def transform(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Map the transformed channels x; return them with the log-det (B,)."""
        raise TypeError(f"{type(self).__name__} must define transform(x, parameters).")

    def untransform(self, z: Tensor, parameters: Tensor) -> Tensor:
        """Undo `transform`."""
        raise TypeError(f"{type(self).__name__} must define untransform(z, parameters).")


def _pullback(
    of_transform: TransformPullback, of_network: Callable[[Tensor], Sequence[Tensor | None]]
) -> Pullback:
    """Back through a coupling's transformation, then through the network that it follows."""

    def pullback(grad_z: Tensor, grad_log_det: Tensor) -> Gradients:
        of_kept, of_changed = split_channels(grad_z)
        of_rest, of_parameters = of_transform(of_changed, grad_log_det)
        of_kept_by_network, of_context, *of_weights = of_network(cast("Tensor", of_parameters))
        if of_kept_by_network is not None:
            of_kept = of_kept + of_kept_by_network
        of_x = torch.cat([of_kept, cast("Tensor", of_rest)], 1)
        return Gradients(of_x, of_context, tuple(of_weights))

    return pullback


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
        log_scale = self.log_scale.of(raw)
        return torch.addcmul(shift, x, log_scale.exp()), sum_per_image(log_scale)

    @torch.no_grad()
    def differentiate_transform(
        self, x: Tensor, parameters: Tensor
    ) -> tuple[Tensor, Tensor, TransformPullback]:
        """As `transform`, outside of any graph, with the way back written out."""
        shift, raw = parameters.chunk(2, dim=1)
        log_scale = self.log_scale.of(raw)
        scale = log_scale.exp()

        def pullback(grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor, Tensor]:
            of_x = grad_z * scale
            of_log_scale = torch.addcmul(grad_log_det[:, None, None, None], of_x, x)
            of_raw = of_log_scale * self.log_scale.slope(log_scale)
            return of_x, torch.cat([grad_z, of_raw], 1)

        return torch.addcmul(shift, x, scale), sum_per_image(log_scale), pullback

    def untransform(self, z: Tensor, parameters: Tensor) -> Tensor:
        """Unshift and unscale z."""
        shift, raw = parameters.chunk(2, dim=1)
        return (z - shift) * (-self.log_scale.of(raw)).exp()


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
