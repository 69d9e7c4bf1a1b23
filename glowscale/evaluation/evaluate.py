"""Bits per dimension of held-out images, the same figure on any number of processes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from glowscale.data import DataError, ShardSet
from glowscale.distributed import failing_together, sum_over_ranks
from glowscale.errors import UserError
from glowscale.evaluation.bits import bits_per_dim
from glowscale.evaluation.fit import check_fits
from glowscale.evaluation.records import Records
from glowscale.evaluation.result import Evaluation
from glowscale.evaluation.scoring import Scores, estimate_block
from glowscale.evaluation.trust import ROUND_TRIPS, measure_trust
from glowscale.models import MultiscaleFlow
from glowscale.stopping import Stopped


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
    records: Records | None = None,
    more: Callable[[], dict[str, Any]] = dict,
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
        stopping: whether this process was asked to stop; asked before every pass of the model.
        records: where blocks are kept, and at the end every image's score and the result.
        more: what the result holds besides, made by the main process at the end.

    Raises:
        Stopped: on all processes, if one of them was asked to stop before it was through.
        DataError: if the model is for images of another shape or number of grey levels, or if
            not every image was scored exactly once.
        UserError: if K is above 1 where there is no bound, see `refuse_idle_samples`.
    """
    check_fits(model, shards)
    refuse_idle_samples(model.dequantizer.is_bound, importance_samples)
    probes = probes if model.is_solved else 1  # all would be equal
    available = shards.manifest.samples
    count = available if images is None else min(images, available)
    blocks = [range(i, min(i + batch, count)) for i in range(0, count, batch)]

    def score(indices: range) -> Scores | None:
        found = records.read(indices) if records else None
        if found is None:
            block = shards.read_batch(indices.start, indices.stop)
            found = estimate_block(model, block, seed, importance_samples, probes, stopping)
            if records and found:
                records.write(indices, found)
        return found

    was_training = model.training
    model.eval()
    with failing_together(), torch.inference_mode():
        table = torch.zeros(len(Scores._fields) + 1, count, dtype=torch.float64)
        left = _fill(table, blocks[rank::world_size], score)
        trust = torch.zeros(4, dtype=torch.float64, device=model.device)
        if rank == 0 and not left:
            trust += measure_trust(model, shards.read_batch(0, min(ROUND_TRIPS, count)), seed)
    model.train(was_training)
    if sum_over_ranks(torch.tensor(float(left), device=model.device)):
        raise Stopped(f"the evaluation on {count:,} images was not finished.")
    *columns, scored = sum_over_ranks(table.to(model.device)).cpu()
    if not bool((scored == 1).all()):
        missed = int((scored == 0).sum())
        raise DataError(f"Of {count} images {missed} were not scored, or some were twice.")
    scores = Scores(*columns)
    settings = {"importance_samples": importance_samples, "probes": probes, "seed": seed}
    result = _summarize(model, shards, scores, sum_over_ranks(trust).tolist(), settings)
    with failing_together():
        if rank == 0 and records:
            records.finish(scores, list(shards.manifest.classes), result, more())
    return result


def refuse_idle_samples(is_bound: bool, importance_samples: int) -> None:
    """Refuse several importance samples where there is no bound for them to tighten.

    Args:
        is_bound: of the model's dequantizer.
        importance_samples: K.

    Raises:
        UserError: if K is above 1 all the same.
    """
    if importance_samples > 1 and not is_bound:
        raise UserError(
            f"importance_samples is {importance_samples}, but the model is of images with noise "
            f"added (dequantization: noise), where there is no bound to tighten; it must be 1."
        )


def _fill(table: Tensor, blocks: Sequence[range], score: Callable[[range], Scores | None]) -> int:
    """Add blocks' scores, and 1, to a table (5, images); return how many blocks are left."""
    first = bool(blocks) and blocks[0].start == 0
    progress = tqdm(blocks, desc="evaluating", unit="block", disable=not first, leave=False)
    for done, indices in enumerate(progress):
        scores = score(indices)
        if scores is None:
            return len(blocks) - done
        rows = torch.stack([*scores, torch.ones_like(scores.log_prob)]).cpu()
        table[:, indices.start : indices.stop] += rows
    return 0


def _summarize(
    model: MultiscaleFlow,
    shards: ShardSet,
    scores: Scores,
    trust: Sequence[float],
    settings: dict[str, int],
) -> Evaluation:
    """The outcome of the scores of all images."""
    count = len(scores.log_prob)
    bits = bits_per_dim(scores.log_prob, model.dimensions)
    single = bits_per_dim(scores.single_sample_log_prob, model.dimensions)
    trace_error = bits_per_dim(-scores.trace_variance.sum().sqrt() / count, model.dimensions)
    round_trip_error, prior_round_trip_error, solver_gap, training_solver_gap = trust
    return Evaluation(
        bits_per_dim=float(bits.mean()),
        per_class=_per_class(bits, scores.labels, shards.manifest.classes),
        standard_error=float(bits.std() / math.sqrt(count)) if count > 1 else None,
        images=count,
        single_sample_bits_per_dim=float(single.mean()),
        trace_standard_error=(float(trace_error) if settings["probes"] > 1 else None),
        solver_gap=solver_gap if model.is_solved else None,
        training_solver_gap=training_solver_gap if model.is_solved else None,
        dequantization=model.dequantizer.name,
        is_bound=model.dequantizer.is_bound,
        image_shape=model.image_shape,
        grey_levels=model.grey_levels,
        fingerprint=shards.manifest.fingerprint,
        round_trip_error=round_trip_error,
        prior_round_trip_error=prior_round_trip_error,
        **settings,
    )


def _per_class(bits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """The mean over the images of each class that has any."""
    return {
        name: float(bits[labels == label].mean())
        for label, name in enumerate(classes)
        if bool((labels == label).any())
    }
