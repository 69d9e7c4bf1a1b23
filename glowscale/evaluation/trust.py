"""How far a model's inverse, and a continuous flow's solver, can be trusted."""

import math

import torch
from torch import Tensor

from glowscale.data import Batch
from glowscale.evaluation.bits import bits_per_dim
from glowscale.evaluation.scoring import noise_keys, score_block
from glowscale.models import MultiscaleFlow
from glowscale.sampling import draw_continuous

ROUND_TRIPS = 8
"""Images, and samples, whose round trip is measured."""


def measure_trust(model: MultiscaleFlow, block: Batch, seed: int) -> Tensor:
    """Round-trip errors of a block and of samples, and the solver's gap on the block: (3,)."""
    samples = draw_continuous(model, seed, range(ROUND_TRIPS))
    figures = [
        _round_trip_of(model, *_dequantized(model, block, seed)),
        _round_trip_of(model, *samples, clamp=True),
        _solver_gap(model, block, seed),
    ]
    return torch.stack(figures)


def _solver_gap(model: MultiscaleFlow, block: Batch, seed: int) -> Tensor:
    """Mean bits/dim of a block as it is scored, less that of a tight adaptive solve."""
    if not model.is_solved:
        return torch.zeros((), dtype=torch.float64, device=model.device)
    log_prob = score_block(model, block, seed)
    with model.solving_tightly():
        tight = score_block(model, block, seed)
    return bits_per_dim(log_prob - tight, model.dimensions).mean()


def _round_trip_of(
    model: MultiscaleFlow, images: Tensor, labels: Tensor, clamp: bool = False
) -> Tensor:
    """Largest |decode(encode(x)) − x| over continuous images x, in grey levels, or infinity.

    Where `clamp` is set, both sides are seen as pixels are: no value is beyond the grey levels.
    """
    latents, _ = model.encode(images, labels)
    decoded = model.decode(latents, labels)
    if clamp:
        images, decoded = (x.clamp(0, model.grey_levels) for x in (images, decoded))
    return (decoded - images).abs().max().double().nan_to_num(nan=math.inf, posinf=math.inf)


def _dequantized(model: MultiscaleFlow, block: Batch, seed: int) -> tuple[Tensor, Tensor]:
    """Continuous images of a block, and their labels."""
    noise = model.draw_noise(noise_keys(block, seed, 0)).to(model.device, model.dtype)
    noise = noise[:, : model.image_shape[0]]  # others are probes
    images, _ = model.dequantizer(block.images.to(model.device), noise)
    return images, block.labels.to(model.device)
