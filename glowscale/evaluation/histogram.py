"""The figure of the simplest honest model of pixels."""

import math
from collections.abc import Iterator

import torch

from glowscale.data import Batch, ShardSet
from glowscale.evaluation.bits import bits_per_dim

HISTOGRAM_BYTES = 1 << 28
"""Memory for the images that a histogram counts at once."""


def histogram_bits_per_dim(train: ShardSet, held_out: ShardSet, most: int = 60_000) -> float:
    """Held-out bits/dim of a histogram for every pixel, counted (plus one) on the training set.

    The simplest honest model of discrete pixels: what a flow must beat to have learned anything
    about how pixels depend on one another.

    Args:
        train: what is counted.
        held_out: what is scored.
        most: count at most the first so many training images, which lie in random order.
    """
    pixels = math.prod(train.manifest.image_shape)
    batch = max(1, HISTOGRAM_BYTES // (8 * pixels))
    levels = train.manifest.grey_levels
    counts = torch.ones(levels, *train.manifest.image_shape, dtype=torch.float64)
    for block in _blocks(train, batch, min(most, train.manifest.samples)):
        values = block.images.long()
        counts.scatter_add_(0, values, torch.ones(values.shape, dtype=torch.float64))
    log_prob = (counts / counts.sum(0)).log()
    count = held_out.manifest.samples
    total = torch.zeros((), dtype=torch.float64)
    for block in _blocks(held_out, batch, count):
        total += log_prob.gather(0, block.images.long()).sum()
    return float(bits_per_dim(total / count, math.prod(train.manifest.image_shape)))


def _blocks(shards: ShardSet, batch: int, count: int) -> Iterator[Batch]:
    for start in range(0, count, batch):
        yield shards.read_batch(start, min(start + batch, count))
