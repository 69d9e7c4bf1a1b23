"""Autoregressive flows: every position is transformed by what a network reads in those before."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from glowscale.bijections.base import Bijection
from glowscale.bijections.fixed_point import Jacobi, with_gradients
from glowscale.bijections.inverse import Inverse
from glowscale.bijections.stepping import CausalNetwork, Guidance, GuidedNetwork
from glowscale.bijections.transforms import Transform


class Autoregressive(Bijection):
    """Transform every position of an image given those before it, in raster order.

    The Jacobian is triangular by positions. `forward` is one pass of the network; `inverse` steps
    from position to position, or solves for all at once within `solving_inverses`. Source: MAF
    (Papamakarios et al. 2017); with a transformer on patches, in alternating directions, TarFlow
    (Zhai et al. 2024).

    Args:
        network: causal; from x (B, C, H, W) and the context to the transform's parameters,
            (B, parameters_per_value · C, H, W); it alone may run in low precision.
        transform: what is done to each value.
        backwards: begin at the last position; the network sees images turned by 180°.

    >>> from glowscale.bijections import Affine
    >>> from glowscale.networks import MaskedConvolutionalNetwork
    >>> network = MaskedConvolutionalNetwork(2, 4, hidden_channels=8, blocks=1)
    >>> flow = Autoregressive(network, Affine())
    >>> z, log_det = flow(torch.ones(1, 2, 3, 3))
    """

    passes = 0
    """Of the network, in the last inverse; a step is one too."""

    def __init__(
        self, network: CausalNetwork, transform: Transform, backwards: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self.transform = transform
        self.backwards = backwards
        self._solver: Jacobi | None = None
        self._guidance: Guidance | None = None

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform all positions of x (B, C, H, W); context is (B, K, H or 1, W or 1)."""
        x = self._turn(x)
        parameters = self.network(x, self._turn_context(context)).to(x.dtype)
        z, log_det = self.transform.forward(x, parameters)
        return self._turn(z), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Undo it, guided within `guiding`; gradients go back by the implicit function theorem."""
        z, context = self._turn(z), self._turn_context(context)
        with torch.no_grad():
            if self._solver is None:
                x, self.passes = self._step(z, context)
            else:
                x, self.passes = self._solve(self._solver, z, context)
        if torch.is_grad_enabled():
            x = with_gradients(lambda x: self._update(x, z, context), x)
        return self._turn(x)

    def _step(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, int]:
        """Find x position by position; how many there are."""
        stepper = self._guided_network.start(z, context)
        found: list[Tensor] = []
        for latents in z.flatten(2).unbind(2):
            parameters = stepper.next(found[-1] if found else None).to(z.dtype)
            found.append(self.transform.inverse(latents, parameters))
        return torch.stack(found, 2).view(z.shape), len(found)

    def _solve(self, solver: Jacobi, z: Tensor, context: Tensor | None) -> tuple[Tensor, int]:
        """Find x at all positions at once, in passes; how many it took."""

        def update(x: Tensor, rows: Tensor) -> Tensor:
            return self._update(x, z[rows], None if context is None else context[rows])

        return solver.solve(update, z)

    def _update(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        """What x would be if x were right at the positions before."""
        return self.transform.inverse(z, self._guided_network(x, context).to(z.dtype))

    @property
    def _guided_network(self) -> CausalNetwork | GuidedNetwork:
        """What tells the parameters in the inverse."""
        if self._guidance is None:
            return self.network
        return GuidedNetwork(self.network, self._guidance)

    def _turn(self, x: Tensor) -> Tensor:
        return x.flip((2, 3)) if self.backwards else x

    def _turn_context(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else self._turn(context)


def solving_inverses(model: nn.Module, solver: Jacobi | None) -> AbstractContextManager[None]:
    """Within it, a model's autoregressive flows solve for their inverses in parallel passes.

    How many each took is in its `passes`. With None as solver they step.
    """
    return _setting(autoregressive_flows(model), "_solver", solver)


def guiding(model: nn.Module, guidance: Guidance | None) -> AbstractContextManager[None]:
    """Within it, a model's autoregressive flows are guided in `inverse`, and there alone.

    So what they decode then is not encoded back to the same latents. Those within an `Inverse`,
    whose inverse is part of the density, are left alone.
    """
    return _setting(sampled_in_steps(model), "_guidance", guidance)


def autoregressive_flows(model: nn.Module) -> list[Autoregressive]:
    """All of a model."""
    return [layer for layer in model.modules() if isinstance(layer, Autoregressive)]


def sampled_in_steps(model: nn.Module) -> list[Autoregressive]:
    """Those of a model whose inverse samples; within an `Inverse` it is the density's."""
    turned = [layer for layer in model.modules() if isinstance(layer, Inverse)]
    within = {flow for layer in turned for flow in autoregressive_flows(layer)}
    return [flow for flow in autoregressive_flows(model) if flow not in within]


@contextmanager
def _setting(flows: Sequence[Autoregressive], name: str, value: object) -> Iterator[None]:
    """Within it, an attribute of autoregressive flows has another value."""
    before = [getattr(flow, name) for flow in flows]
    for flow in flows:
        setattr(flow, name, value)
    try:
        yield
    finally:
        for flow, value_before in zip(flows, before, strict=True):
            setattr(flow, name, value_before)
