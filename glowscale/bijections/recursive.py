"""Recursive coupling: what one coupling keeps and what it transforms are coupled again inside."""

from collections.abc import Callable

from torch import Tensor

from glowscale.bijections.base import Bijection, Gradients, Pullback, Sequential, add_gradients
from glowscale.bijections.coupling import Coupling
from glowscale.bijections.masks import ChannelMask


class Halves(Bijection):
    """A bijection of each half of the channels, by itself.

    Args:
        first: of C // 2 channels.
        second: of the other C − C // 2.
    """

    def __init__(self, first: Bijection, second: Bijection) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.mask = ChannelMask()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map both halves of x (B, C, H, W)."""
        a, b = self.mask.split(x)
        a, log_det_a = self.first(a, context)
        b, log_det_b = self.second(b, context)
        return self.mask.join(a, b), log_det_a + log_det_b

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Undo both."""
        a, b = self.mask.split(z)
        return self.mask.join(self.first.inverse(a, context), self.second.inverse(b, context))

    def differentiate(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Pullback]:
        """As `forward`, outside of any graph; also what takes gradients back, once."""
        a, b = self.mask.split(x.detach())
        a, log_det_a, of_first = self.first.differentiate(a, context)
        b, log_det_b, of_second = self.second.differentiate(b, context)
        return self.mask.join(a, b), log_det_a + log_det_b, self._pullback(of_first, of_second)

    def rebuild(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Pullback]:
        """As `inverse`, outside of any graph; also what takes gradients from z to x, once."""
        a, b = self.mask.split(z.detach())
        a, of_first = self.first.rebuild(a, context)
        b, of_second = self.second.rebuild(b, context)
        return self.mask.join(a, b), self._pullback(of_first, of_second)

    def _pullback(self, of_first: Pullback, of_second: Pullback) -> Pullback:
        def pullback(grad_z: Tensor, grad_log_det: Tensor) -> Gradients:
            of_a, of_b = self.mask.split(grad_z)
            a, b = of_first(of_a, grad_log_det), of_second(of_b, grad_log_det)
            of_context = add_gradients(a.context, b.context)
            return Gradients(self.mask.join(a.x, b.x), of_context, (*a.parameters, *b.parameters))

        return pullback


class RecursiveCoupling(Sequential):
    """A coupling, then the same within each half of the channels, and so on down.

    Where a coupling leaves half of its triangular Jacobian's lower part empty, this one fills
    more of it with every recursion, down to single channels. Source: HINT (Kruse et al. 2021),
    section 3.2 and figure 2.

    Args:
        channels: C of x (B, C, H, W).
        make_coupling: a coupling of so many channels, which keeps their first half.
        recursions: how often halves are coupled again; no further than there are two channels.

    >>> from glowscale.bijections import Affine
    >>> from glowscale.networks import ConvolutionalNetwork
    >>> def make_coupling(channels: int) -> Coupling:
    ...     kept = channels // 2
    ...     return Coupling(ConvolutionalNetwork(kept, 2 * (channels - kept), 8), Affine())
    >>> flow = RecursiveCoupling(8, make_coupling, recursions=2)
    >>> sum(isinstance(layer, Coupling) for layer in flow.modules())
    7
    """

    def __init__(
        self, channels: int, make_coupling: Callable[[int], Coupling], recursions: int
    ) -> None:
        bijections: list[Bijection] = [make_coupling(channels)]
        if recursions and channels > 2:
            halves = [
                RecursiveCoupling(part, make_coupling, recursions - 1)
                if part > 1
                else Sequential([])
                for part in (channels // 2, channels - channels // 2)
            ]
            bijections.append(Halves(*halves))
        super().__init__(bijections)
