"""Activation normalization, and the explicit pass that initializes it from data."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from glowscale.bijections.base import Bijection

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


class ActNorm(Bijection):
    """A scale and a bias per channel: z = x · exp(log_scale) + bias.

    Source: Glow (Kingma & Dhariwal 2018), section 3.1. Until `initialize` it is the identity;
    afterwards the data it was shown have zero mean and unit variance per channel. Whether that
    has happened is the saved buffer `initialized`, so loading a checkpoint never repeats it.

    Args:
        channels: size of dimension 1 of x (B, C, ...).
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        self._reduce: Reduce | None = None

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalize x (B, C, ...)."""
        self.prepare(x)
        positions = math.prod(x.shape[2:])
        log_det = (positions * self.log_scale.sum()).expand(x.shape[0])
        return x * _per_channel(self.log_scale.exp(), x) + _per_channel(self.bias, x), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Undo the normalization."""
        return (z - _per_channel(self.bias, z)) * _per_channel((-self.log_scale).exp(), z)

    def prepare(self, x: Tensor) -> None:
        """Within `initializing`, take the statistics of the first x; otherwise nothing."""
        if self._reduce and not self.initialized:
            self.initialize(x, self._reduce)

    @torch.no_grad()
    def initialize(self, x: Tensor, reduce: Reduce) -> None:
        """Set scale and bias from x (B, C, ...), whose parts on all ranks `reduce` sums up.

        The statistics are two-pass (the mean first, then the squared distances from it) and
        in float64, so neither a large mean nor the number of ranks disturbs them.
        """
        values = x.double().transpose(0, 1).flatten(1)  # (C, B·positions); B may be 0
        count = reduce(values.new_tensor(float(values.shape[1])))
        mean = reduce(values.sum(1)) / count
        variance = reduce((values - mean[:, None]).square().sum(1)) / count
        scale = (variance + 1e-12).rsqrt()
        self.log_scale.copy_(scale.log())
        self.bias.copy_(-mean * scale)
        self.initialized.fill_(True)


@contextmanager
def initializing(module: nn.Module, reduce: Reduce) -> Iterator[None]:
    """Within it, a forward pass of `module` initializes its ActNorms, layer by layer.

    Each uninitialized ActNorm takes its statistics from the input that reaches it, through the
    already initialized layers before it. All ranks must run the same pass; it has no gradients.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, ActNorm)]
    for layer in layers:
        layer._reduce = reduce
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer._reduce = None


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Shape values (C,) so that they broadcast over x (B, C, ...)."""
    return values.view(-1, *[1] * (x.dim() - 2))
