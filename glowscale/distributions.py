"""Priors. A learned Gaussian is written as the bijection that makes its variable standard normal.

So every latent of a model is standard normal noise, a temperature only scales it, and the
learned means and deviations enter through log-dets like any other map.
"""

import math

import torch
from torch import Tensor, nn

from glowscale.bijections.base import Bijection, soft_clamp, sum_per_image

LOG_STD_BOUND = 5.0
"""How far a learned log standard deviation may move from zero."""


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """Log-density in nats, (B,), of z (B, ...) under the standard normal.

    >>> standard_normal_log_prob(torch.zeros(1, 2))
    tensor([-1.8379])
    """
    return -0.5 * sum_per_image(z.square() + math.log(2 * math.pi))


class Gaussian(Bijection):
    """Whiten z ~ N(mean, std²), learned per channel: ε = (z − mean) / std.

    Args:
        channels: size of dimension 1 of z (B, C, H, W).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(channels, 1, 1))
        self.log_std = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whiten x (B, C, H, W)."""
        return _whiten(x, self.mean, self.log_std)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Give standard normal z the learned mean and deviation."""
        return _colour(z, self.mean, self.log_std)


class ConditionalGaussian(Bijection):
    """Whiten z ~ N(mean(c), std(c)²), both read from a context c.

    Source: Glow (Kingma & Dhariwal 2018), appendix B; the prior of a split.

    Args:
        network: maps the context to means and raw log-deviations (B, 2C, H, W).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whiten x (B, C, H, W) given the context."""
        return _whiten(x, *self._read(x, context))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Give standard normal z the mean and deviation that the context tells."""
        return _colour(z, *self._read(z, context))

    def _read(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        mean, raw = self.network(context).to(x.dtype).chunk(2, dim=1)
        return mean, soft_clamp(raw, LOG_STD_BOUND)


def _whiten(x: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    return (x - mean) * (-log_std).exp(), -sum_per_image(log_std.expand_as(x))


def _colour(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    return torch.addcmul(mean, z, log_std.exp())
