"""From log-likelihoods to bits per dimension."""

import math

from torch import Tensor


def bits_per_dim(log_prob: Tensor, dimensions: int) -> Tensor:
    """Turn log-likelihoods of images in nats into bits per dimension.

    >>> import torch
    >>> uniform_over_256_levels = torch.tensor(-12 * math.log(256.0), dtype=torch.float64)
    >>> bits_per_dim(uniform_over_256_levels, dimensions=12).item()
    8.0
    """
    return -log_prob / (dimensions * math.log(2))
