"""How far a model's inverse, and a continuous flow's solver, can be trusted."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from glowscale.bijections.roots import RootError
from glowscale.data import Batch
from glowscale.errors import UserError
from glowscale.evaluation.bits import bits_per_dim
from glowscale.evaluation.result import Evaluation
from glowscale.evaluation.scoring import noise_keys, score_block
from glowscale.models import MultiscaleFlow
from glowscale.sampling import draw_continuous

ROUND_TRIPS = 8
"""Images, and samples, whose round trip is measured."""


class UntrustedError(UserError):
    """A figure that the model's own numerics cannot stand for."""


class RoundTripError(UntrustedError):
    """A model whose inverse does not bring images back."""


class SolverGapError(UntrustedError):
    """A continuous flow whose bits/dim, or whose loss, are its solver's doing."""


def refuse_untrusted(
    result: Evaluation, round_trip_limit: float | None, solver_gap_limit: float | None
) -> None:
    """Refuse a figure that its model's inverse or its solver cannot stand for.

    Args:
        result: what was measured.
        round_trip_limit: of both round trips, in grey levels; None allows anything.
        solver_gap_limit: of a continuous flow's distance to a tight solve, in bits/dim; likewise.

    Raises:
        RoundTripError: if the round trip of images or of samples is off by more.
        SolverGapError: if a tight solve gives another figure by more.
    """
    errors = {"images": result.round_trip_error, "samples": result.prior_round_trip_error}
    for what, error in errors.items():
        if _exceeds(error, round_trip_limit):
            raise RoundTripError(
                f"The round trip of {what} is off by {error:.3g} grey levels, more than "
                f"evaluate.round_trip_limit={round_trip_limit:g}: the model's inverse cannot be "
                f"trusted; lower train.optimizer.lr, bound the transforms' scale, or allow more "
                f"(null: anything)."
            )
    gap = result.solver_gap
    if _exceeds(gap, solver_gap_limit):
        raise SolverGapError(
            f"The solver's bits/dim differ by {gap:+.3g} from those of a tight solve, more than "
            f"evaluate.solver_gap_limit={solver_gap_limit:g}: give evaluation_solver more steps "
            f"or a smaller tolerance, raise model.frobenius, or allow more (null: anything)."
        )


def refuse_exploited_solver(result: Evaluation, limit: float | None) -> None:
    """Refuse to go on with a training whose loss is low by its solver's error.

    On a coarse grid, what is minimized need not be a likelihood: a flow may learn dynamics of
    which the grid alone thinks well.

    Args:
        result: what was measured.
        limit: of the distance between the training's solver and a tight one, in bits/dim; None
            allows anything.

    Raises:
        SolverGapError: if a tight solve gives another figure by more.
    """
    gap = result.training_solver_gap
    if _exceeds(gap, limit):
        raise SolverGapError(
            f"The training's solver is off by {gap:+.3g} bits/dim from a tight solve, more than "
            f"evaluate.solver_gap_limit={limit:g}: what is trained is no likelihood any more; "
            f"give solver more steps or a smaller tolerance, raise model.frobenius, lower "
            f"train.optimizer.lr, or allow more (null: anything)."
        )


def _exceeds(figure: float | None, limit: float | None) -> bool:
    """Whether a figure is beyond its limit, or no number; not where either is missing."""
    return figure is not None and limit is not None and not abs(figure) <= limit


def measure_trust(model: MultiscaleFlow, block: Batch, seed: int) -> Tensor:
    """Round-trip errors of a block and of samples, and both solvers' gaps on the block: (4,)."""
    figures = [
        _round_trip_of(model, lambda: _dequantized(model, block, seed)),
        _round_trip_of(
            model, lambda: draw_continuous(model, seed, range(ROUND_TRIPS)), clamp=True
        ),
        *_solver_gaps(model, block, seed),
    ]
    return torch.stack(figures)


def _solver_gaps(model: MultiscaleFlow, block: Batch, seed: int) -> Tensor:
    """Mean bits/dim of a block as scored and as trained on, less those of a tight solve: (2,).

    Infinite where the tight solve was given up and done again on a grid, which says nothing.
    """
    if not model.is_solved:
        return torch.zeros(2, dtype=torch.float64, device=model.device)
    scored = score_block(model, block, seed)
    with model.solving_as("training"):
        trained_on = score_block(model, block, seed)
    model.take_troubles()  # of these; both are figures of the grid that stands in
    with model.solving_as("tight"):
        tight = score_block(model, block, seed)
    if model.take_troubles():
        return torch.full((2,), math.inf, dtype=torch.float64, device=model.device)
    return bits_per_dim(torch.stack([scored, trained_on]) - tight, model.dimensions).mean(1)


def _round_trip_of(
    model: MultiscaleFlow, draw: Callable[[], tuple[Tensor, Tensor]], clamp: bool = False
) -> Tensor:
    """Largest |decode(encode(x)) − x| over continuous images x, in grey levels, or infinity.

    `draw` gives the images, and their labels. Where `clamp` is set, both sides are seen as pixels
    are: no value is beyond the grey levels.
    """
    try:
        images, labels = draw()
        latents, _ = model.encode(images, labels)
        decoded = model.decode(latents, labels)
    except RootError:
        return torch.full((), math.inf, dtype=torch.float64, device=model.device)
    if clamp:
        images, decoded = (x.clamp(0, model.grey_levels) for x in (images, decoded))
    return (decoded - images).abs().max().double().nan_to_num(nan=math.inf, posinf=math.inf)


def _dequantized(model: MultiscaleFlow, block: Batch, seed: int) -> tuple[Tensor, Tensor]:
    """Continuous images of a block, and their labels."""
    noise = model.draw_noise(noise_keys(block, seed, 0)).to(model.device, model.dtype)
    noise = noise[:, : model.image_shape[0]]  # others are probes
    images, _ = model.dequantizer(block.images.to(model.device), noise)
    return images, block.labels.to(model.device)
