"""Bits per dimension of held-out images, the same figure on any number of processes."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from glowscale.data import Batch, DataError, ShardSet
from glowscale.distributed import sum_over_ranks
from glowscale.models import MultiscaleFlow


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
    dequantization: str
    image_shape: tuple[int, int, int]
    grey_levels: int
    seed: int
    """Of the dequantization noise."""
    fingerprint: str
    """Of the whole data set that the images are the first of."""
    reconstruction_error: float
    """Largest |decode(encode(x)) − x| over the first block, in grey levels."""

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        samples = "samples" if self.importance_samples > 1 else "sample"
        return (
            f"{self.bits_per_dim:.4f}{error} bits/dim ({self.images:,} held-out images, "
            f"{self.dequantization} dequantization, {self.importance_samples} importance "
            f"{samples}, data {self.fingerprint[:8]}, reconstruction error "
            f"{self.reconstruction_error:.1e})"
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def evaluate(
    model: MultiscaleFlow,
    shards: ShardSet,
    *,
    seed: int,
    batch: int = 250,
    images: int | None = None,
    importance_samples: int = 1,
    rank: int = 0,
    world_size: int = 1,
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
        rank: this process.
        world_size: number of processes; all must call this.

    Raises:
        DataError: if the model is for images of another shape or number of grey levels, or if
            not every image was scored exactly once.
    """
    check_fits(model, shards)
    available = shards.manifest.samples
    count = available if images is None else min(images, available)
    starts = range(0, count, batch)[rank::world_size]
    device = model.device
    totals = torch.zeros(3, count, dtype=torch.float64, device=device)
    error = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for start in tqdm(starts, desc="evaluating", unit="block", disable=rank > 0, leave=False):
            block = shards.read_batch(start, min(start + batch, count))
            totals[0, block.ids] += score_block(model, block, seed, importance_samples)
            totals[1, block.ids] += 1
            totals[2, block.ids] += block.labels.to(device)
            if start == 0:
                error += reconstruction_error(model, block, seed)
    model.train(was_training)
    log_prob, scored, labels = sum_over_ranks(totals).cpu()
    if not bool((scored == 1).all()):
        missed = int((scored == 0).sum())
        raise DataError(f"Of {count} images {missed} were not scored, or some were twice.")
    bits = bits_per_dim(log_prob, model.dimensions)
    return Evaluation(
        bits_per_dim=float(bits.mean()),
        per_class={
            name: float(bits[labels == label].mean())
            for label, name in enumerate(shards.manifest.classes)
            if bool((labels == label).any())
        },
        standard_error=float(bits.std() / math.sqrt(count)) if count > 1 else None,
        images=count,
        importance_samples=importance_samples,
        dequantization=model.dequantizer.name,
        image_shape=model.image_shape,
        grey_levels=model.grey_levels,
        seed=seed,
        fingerprint=shards.manifest.fingerprint,
        reconstruction_error=float(sum_over_ranks(error)),
    )


def score_block(
    model: MultiscaleFlow, block: Batch, seed: int, importance_samples: int = 1
) -> Tensor:
    """The importance-weighted bound on log p of each image, float64 (B,), in nats."""
    device = model.device
    refuse_unlabelled(model, block)
    images, labels = block.images.to(device), block.labels.to(device)
    total = torch.full((len(images),), -math.inf, dtype=torch.float64, device=device)
    for k in range(importance_samples):
        noise = model.draw_noise(_noise_keys(block, seed, k)).to(device)
        log_weight = model(images, labels, noise).log_prob.double()
        total = torch.logaddexp(total, log_weight)
    return total - math.log(importance_samples)


def reconstruction_error(model: MultiscaleFlow, block: Batch, seed: int) -> Tensor:
    """Largest |decode(encode(x)) − x| over dequantized images x, in grey levels."""
    noise = model.draw_noise(_noise_keys(block, seed, 0)).to(model.device, model.dtype)
    images, labels = block.images.to(model.device), block.labels.to(model.device)
    continuous, _ = model.dequantizer(images, noise)
    latents, _ = model.encode(continuous, labels)
    return (model.decode(latents, labels) - continuous).abs().max().double()


def histogram_bits_per_dim(
    train: ShardSet, held_out: ShardSet, most: int = 60_000, batch: int = 1000
) -> float:
    """Held-out bits/dim of a histogram for every pixel, counted (plus one) on the training set.

    The simplest honest model of discrete pixels: what a flow must beat to have learned anything
    about how pixels depend on one another.

    Args:
        train: what is counted.
        held_out: what is scored.
        most: count at most the first so many training images, which lie in random order.
        batch: images that are read at once.
    """
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
