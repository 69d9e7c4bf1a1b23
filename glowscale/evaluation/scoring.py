"""Log-likelihoods of a block of images, under noise that is keyed by image."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from glowscale.data import Batch
from glowscale.evaluation.fit import refuse_unlabelled
from glowscale.models import MultiscaleFlow


class Scores(NamedTuple):
    """What is known of each image of a block, float64 (B,) each."""

    log_prob: Tensor
    """The importance-weighted bound, in nats."""
    single_sample_log_prob: Tensor
    """The bound with the first sample alone."""
    trace_variance: Tensor
    """Variance of `log_prob` due to the estimates of a continuous flow's trace."""
    labels: Tensor


def score_block(
    model: MultiscaleFlow, block: Batch, seed: int, importance_samples: int = 1, probes: int = 1
) -> Tensor:
    """The importance-weighted bound on log p of each image, float64 (B,), in nats."""
    scores = estimate_block(model, block, seed, importance_samples, probes)
    assert scores is not None  # nobody asked to stop
    return scores.log_prob


def estimate_block(
    model: MultiscaleFlow,
    block: Batch,
    seed: int,
    importance_samples: int,
    probes: int,
    stopping: Callable[[], bool] = lambda: False,
) -> Scores | None:
    """Score a block; None where `stopping`, asked before every sample, puts an end to it.

    Args:
        model: in evaluation mode.
        block: images with their numbers, which key the noise.
        seed: of the noise.
        importance_samples: K of log 1/K Σ p(v)/q(v|x). Their images are scored one after the
            other, so memory does not grow but for K numbers an image.
        probes: estimates of a continuous flow's trace that are averaged.
        stopping: whether this process was asked to stop.

    Raises:
        DataError: if the model needs labels and there are none.
    """
    device = model.device
    refuse_unlabelled(model, block)
    images, labels = block.images.to(device), block.labels.to(device)
    log_weights, variances = [], []
    for k in range(importance_samples):
        estimates = []
        for probe in range(probes):
            if stopping():
                return None
            noise = model.draw_noise(noise_keys(block, seed, k), probe).to(device)
            estimates.append(model(images, labels, noise).log_prob.double())
        log_weights.append(torch.stack(estimates).mean(0))
        spread = torch.stack(estimates).var(0) if probes > 1 else torch.zeros_like(estimates[0])
        variances.append(spread / probes)
    weights = torch.stack(log_weights)
    total = torch.logsumexp(weights, 0) - math.log(importance_samples)
    variance = (weights.softmax(0).square() * torch.stack(variances)).sum(0)
    return Scores(total, log_weights[0], variance, labels.double())


def noise_keys(block: Batch, seed: int, k: int) -> Iterator[tuple[int | str, ...]]:
    """What determines the noise of each image's sample k."""
    return ((seed, "evaluation", k, i) for i in block.ids.tolist())
