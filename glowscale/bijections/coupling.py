"""Coupling: one part of the image is transformed by what a network reads in the other."""

from collections.abc import Callable, Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from glowscale.bijections.base import Bijection, Gradients, Pullback, differentiate
from glowscale.bijections.masks import ChannelMask, Mask
from glowscale.bijections.transforms import Transform, TransformPullback

CHANNELS = ChannelMask()


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
    """Keep one part of the image, transform the rest given it.

    The Jacobian is triangular, so the log-det is that of the transformed part alone. Source:
    NICE (Dinh et al. 2015), RealNVP (Dinh et al. 2017).

    Args:
        network: maps the kept part (B, C, H, W) and the context to the transform's parameters,
            (B, parameters_per_value · channels of the rest, H, W); it alone may run in low
            precision.
        transform: what is done to each value of the rest.
        mask: which part is kept; the first half of the channels if not given.

    >>> from glowscale.bijections import Affine
    >>> from glowscale.networks import ConvolutionalNetwork
    >>> coupling = Coupling(ConvolutionalNetwork(2, 4, 8), Affine())
    >>> z, log_det = coupling(torch.ones(1, 4, 3, 3))
    """

    def __init__(self, network: nn.Module, transform: Transform, mask: Mask = CHANNELS) -> None:
        super().__init__()
        self.network = network
        self.transform = transform
        self.mask = mask

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform the rest of x (B, C, H, W)."""
        kept, rest = self.mask.split(x)
        rest, log_det = self.transform.forward(rest, self.network(kept, context).to(x.dtype))
        return self.mask.join(kept, rest), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Undo it: what was kept still tells the parameters."""
        kept, rest = self.mask.split(z)
        rest = self.transform.inverse(rest, self.network(kept, context).to(z.dtype))
        return self.mask.join(kept, rest)

    def differentiate(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Pullback]:
        """As `forward`, outside of any graph; also what takes gradients back, once."""
        kept, rest = self.mask.split(x.detach())
        parameters, of_network = self._differentiate_network(kept, context)
        rest, log_det, of_transform = self.transform.differentiate(rest, parameters)
        return self.mask.join(kept, rest), log_det, self._pullback(of_transform, of_network)

    def rebuild(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Pullback]:
        """As `inverse`; the network's one pass serves the inverse and the gradients alike."""
        kept, rest = self.mask.split(z.detach())
        parameters, of_network = self._differentiate_network(kept, context)
        with torch.no_grad():
            rest = self.transform.inverse(rest, parameters)
        _, _, of_transform = self.transform.differentiate(rest, parameters)
        return self.mask.join(kept, rest), self._pullback(of_transform, of_network)

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

    def _pullback(
        self,
        of_transform: TransformPullback,
        of_network: Callable[[Tensor], Sequence[Tensor | None]],
    ) -> Pullback:
        """Back through the transform, then through the network that it follows."""

        def pullback(grad_z: Tensor, grad_log_det: Tensor) -> Gradients:
            of_kept, of_changed = self.mask.split(grad_z)
            of_rest, of_parameters = of_transform(of_changed, grad_log_det)
            of_kept_by_network, of_context, *of_weights = of_network(cast("Tensor", of_parameters))
            if of_kept_by_network is not None:
                of_kept = of_kept + of_kept_by_network
            of_x = self.mask.join(of_kept, cast("Tensor", of_rest))
            return Gradients(of_x, of_context, tuple(of_weights))

        return pullback
