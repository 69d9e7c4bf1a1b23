"""Bits per dimension of held-out images, the same figure on any number of processes."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from glowscale.data import Batch, DataError, ShardSet
from glowscale.distributed import failing_together, sum_over_ranks
from glowscale.models import MultiscaleFlow
from glowscale.sampling import labels_of
from glowscale.stopping import Stopped

ROUND_TRIPS = 8
"""Images, and samples, whose round trip is measured."""
HISTOGRAM_BYTES = 1 << 28
"""Memory for the images that a histogram counts at once."""


def bits_per_dim(log_prob: Tensor, dimensions: int) -> Tensor:
    """Turn log-likelihoods of images in nats into bits per dimension.

    >>> uniform_over_256_levels = torch.tensor(-12 * math.log(256.0), dtype=torch.float64)
    >>> bits_per_dim(uniform_over_256_levels, dimensions=12).item()
    8.0
    """
    return -log_prob / (dimensions * math.log(2))


@dataclass(frozen=True)
class Evaluation:
    """Held-out bits/dim, with everything that it depends on."""

    bits_per_dim: float
    """Mean over the images; an upper bound in expectation where dequantization is variational."""
    per_class: dict[str, float]
    """Mean of each class's images, by its name; empty where images have no labels."""
    standard_error: float | None
    """Of the mean, over the images; None for one image."""
    images: int
    importance_samples: int
    probes: int
    """Estimates of a continuous flow's trace for each of these; 1 of other models."""
    trace_standard_error: float | None
    """Of the mean, due to the trace's estimates; None where there is one or none."""
    solver_gap: float | None
    """Bits/dim by which a tight adaptive solve of the first images differs; None of other
    models."""
    dequantization: str
    image_shape: tuple[int, int, int]
    grey_levels: int
    seed: int
    """Of the dequantization noise."""
    fingerprint: str
    """Of the whole data set that the images are the first of."""
    round_trip_error: float
    """Largest |decode(encode(x)) − x| over the first few images, in grey levels."""
    prior_round_trip_error: float
    """The same over samples of the model at temperature 1, values beyond the grey levels counting
    as the nearest one; infinite where they are not finite."""

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        samples = "samples" if self.importance_samples > 1 else "sample"
        gap = "" if self.solver_gap is None else f"solver's gap {self.solver_gap:+.1e}, "
        trace = self.trace_standard_error
        probes = "" if trace is None else f"{self.probes} probes ± {trace:.1e}, "
        return (
            f"{self.bits_per_dim:.4f}{error} bits/dim ({self.images:,} held-out images, "
            f"{self.dequantization} dequantization, {self.importance_samples} importance "
            f"{samples}, {probes}{gap}data {self.fingerprint[:8]}, round trip off by "
            f"{self.round_trip_error:.1e}, of prior samples by {self.prior_round_trip_error:.1e})"
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; a figure that is not finite is None."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def evaluate(
    model: MultiscaleFlow,
    shards: ShardSet,
    *,
    seed: int,
    batch: int = 250,
    images: int | None = None,
    importance_samples: int = 1,
    probes: int = 1,
    rank: int = 0,
    world_size: int = 1,
    stopping: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Score every image exactly once, in float32 (float64 for such a model).

    The work is cut into fixed blocks in the manifest's order and image i's noise is keyed by
    (seed, i), so the figure depends neither on the number of processes nor on the block.

    Args:
        model: not wrapped for DDP or autocast.
        shards: the held-out split.
        seed: of the dequantization noise.
        batch: images of a block.
        images: score only the first so many.
        importance_samples: K of the importance-weighted bound log 1/K Σ p(v)/q(v|x).
        probes: estimates of a continuous flow's trace that are averaged.
        rank: this process.
        world_size: number of processes; all must call this.
        stopping: whether this process was asked to stop; asked before every block.

    Raises:
        Stopped: on all processes, if one of them was asked to stop before it was through.
        DataError: if the model is for images of another shape or number of grey levels, or if
            not every image was scored exactly once.
    """
    check_fits(model, shards)
    available = shards.manifest.samples
    count = available if images is None else min(images, available)
    was_training = model.training
    model.eval()
    with failing_together(), torch.inference_mode():
        scores = torch.zeros(4, count, dtype=torch.float64, device=model.device)
        trust = torch.zeros(3, dtype=torch.float64, device=model.device)
        left = _score_blocks(
            model,
            shards,
            scores,
            [range(i, min(i + batch, count)) for i in range(0, count, batch)][rank::world_size],
            seed,
            importance_samples,
            probes,
            stopping,
        )
        if rank == 0 and not left:
            trust += _measure_trust(model, shards.read_batch(0, min(ROUND_TRIPS, count)), seed)
    model.train(was_training)
    if sum_over_ranks(torch.tensor(float(left), device=model.device)):
        raise Stopped(f"the evaluation on {count:,} images was not finished.")
    log_prob, scored, labels, variance = sum_over_ranks(scores).cpu()
    if not bool((scored == 1).all()):
        missed = int((scored == 0).sum())
        raise DataError(f"Of {count} images {missed} were not scored, or some were twice.")
    bits = bits_per_dim(log_prob, model.dimensions)
    round_trip_error, prior_round_trip_error, solver_gap = sum_over_ranks(trust).tolist()
    trace_error = bits_per_dim(-variance.sum().sqrt() / count, model.dimensions)
    return Evaluation(
        bits_per_dim=float(bits.mean()),
        per_class=_per_class(bits, labels, shards.manifest.classes),
        standard_error=float(bits.std() / math.sqrt(count)) if count > 1 else None,
        images=count,
        importance_samples=importance_samples,
        probes=probes,
        trace_standard_error=float(trace_error) if model.is_solved and probes > 1 else None,
        solver_gap=solver_gap if model.is_solved else None,
        dequantization=model.dequantizer.name,
        image_shape=model.image_shape,
        grey_levels=model.grey_levels,
        seed=seed,
        fingerprint=shards.manifest.fingerprint,
        round_trip_error=round_trip_error,
        prior_round_trip_error=prior_round_trip_error,
    )


def _score_blocks(
    model: MultiscaleFlow,
    shards: ShardSet,
    scores: Tensor,
    blocks: list[range],
    seed: int,
    importance_samples: int,
    probes: int,
    stopping: Callable[[], bool],
) -> int:
    """Add each image's log p, 1, its label and log p's variance to scores (4, count).

    Returns how many blocks are left.
    Blocks are left where the process is asked to stop.
    """
    first = bool(blocks) and blocks[0].start == 0
    progress = tqdm(blocks, desc="evaluating", unit="block", disable=not first, leave=False)
    for done, indices in enumerate(progress):
        if stopping():
            return len(blocks) - done
        block = shards.read_batch(indices.start, indices.stop)
        log_prob, variance = _estimate_block(model, block, seed, importance_samples, probes)
        scores[0, block.ids] += log_prob
        scores[3, block.ids] += variance
        scores[1, block.ids] += 1
        scores[2, block.ids] += block.labels.to(model.device)
    return 0


def score_block(
    model: MultiscaleFlow, block: Batch, seed: int, importance_samples: int = 1, probes: int = 1
) -> Tensor:
    """The importance-weighted bound on log p of each image, float64 (B,), in nats."""
    return _estimate_block(model, block, seed, importance_samples, probes)[0]


def _estimate_block(
    model: MultiscaleFlow, block: Batch, seed: int, importance_samples: int, probes: int
) -> tuple[Tensor, Tensor]:
    """As `score_block`, and the variance due to the estimates of a continuous flow's trace."""
    device = model.device
    refuse_unlabelled(model, block)
    images, labels = block.images.to(device), block.labels.to(device)
    log_weights, variances = [], []
    for k in range(importance_samples):
        estimates = []
        for probe in range(probes):
            noise = model.draw_noise(_noise_keys(block, seed, k), probe).to(device)
            estimates.append(model(images, labels, noise).log_prob.double())
        log_weights.append(torch.stack(estimates).mean(0))
        spread = torch.stack(estimates).var(0) if probes > 1 else torch.zeros_like(estimates[0])
        variances.append(spread / probes)
    weights = torch.stack(log_weights)
    total = torch.logsumexp(weights, 0) - math.log(importance_samples)
    return total, (weights.softmax(0).square() * torch.stack(variances)).sum(0)


def _per_class(bits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """The mean over the images of each class that has any."""
    return {
        name: float(bits[labels == label].mean())
        for label, name in enumerate(classes)
        if bool((labels == label).any())
    }


def _measure_trust(model: MultiscaleFlow, block: Batch, seed: int) -> Tensor:
    """Round-trip errors of a block and of samples, and the solver's gap on the block: (3,)."""
    samples = _prior_samples(model, seed, ROUND_TRIPS)
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
    noise = model.draw_noise(_noise_keys(block, seed, 0)).to(model.device, model.dtype)
    noise = noise[:, : model.image_shape[0]]  # others are probes
    images, _ = model.dequantizer(block.images.to(model.device), noise)
    return images, block.labels.to(model.device)


def _prior_samples(model: MultiscaleFlow, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Continuous images that the model draws at temperature 1, and their labels."""
    indices = range(count)
    labels = torch.tensor(labels_of(model, indices, None), device=model.device)
    return model.decode(model.draw_latents(seed, indices), labels), labels


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


def check_fits(model: MultiscaleFlow, shards: ShardSet) -> None:
    """Refuse data of another shape or number of grey levels than the model's.

    Raises:
        DataError: if they differ.
    """
    manifest = shards.manifest
    found = (manifest.image_shape, manifest.grey_levels)
    if found != (model.image_shape, model.grey_levels):
        raise DataError(
            f"{shards.folder} holds images of shape {found[0]} with {found[1]} grey levels; the "
            f"model is for {model.image_shape} with {model.grey_levels}."
        )
    if model.classes not in (0, len(manifest.classes)):
        raise DataError(
            f"{shards.folder} has {len(manifest.classes)} classes; the model is conditional on "
            f"{model.classes}."
        )


def refuse_unlabelled(model: MultiscaleFlow, batch: Batch) -> None:
    """Refuse images without a label where the model is conditional on classes.

    Raises:
        DataError: if there are any.
    """
    if model.classes and bool((batch.labels < 0).any()):
        index = int(batch.ids[batch.labels < 0][0])
        raise DataError(f"Image {index} has no label, but the model is conditional on classes.")


def _noise_keys(block: Batch, seed: int, k: int) -> Iterator[tuple[int | str, ...]]:
    return ((seed, "evaluation", k, i) for i in block.ids.tolist())


def _blocks(shards: ShardSet, batch: int, count: int) -> Iterator[Batch]:
    for start in range(0, count, batch):
        yield shards.read_batch(start, min(start + batch, count))
