"""One update: the gradient of a global batch, the masked step, and what was wrong with it."""

import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from glowscale.config.schema import Train
from glowscale.data import Batch
from glowscale.distributed import LateFlag, sum_over_ranks
from glowscale.errors import UserError
from glowscale.evaluation import bits_per_dim, refuse_unlabelled
from glowscale.training.diagnosis import Diagnosis, first_non_finite, non_finite_gradient
from glowscale.training.optimizer import learning_rate
from glowscale.training.state import TrainingState

SHOWN = 8
"""Images that a message names at most."""


class NonFiniteError(UserError):
    """A loss or gradient that is not finite, again and again."""


class Updater:
    """Updates a training state by global batches.

    An update whose loss or gradient is not finite is masked: on all processes together, on the
    device, so that neither weights nor the optimizer's state see it. One step later, when the
    host knows without waiting, the images and the layer are named; so many in a row end the run.

    Args:
        settings: the config's section `train`.
        seed: of the dequantization noise.
        accelerator: the processes.
        parallel_model: the state's model, wrapped for them.
        state: what is updated.
        note: told of every masked update: images seen, and what was wrong.
    """

    def __init__(
        self,
        settings: Train,
        seed: int,
        accelerator: Accelerator,
        parallel_model: nn.Module,
        state: TrainingState,
        note: Callable[[int, Diagnosis], None],
    ) -> None:
        self.settings = settings
        self.seed = seed
        self.accelerator = accelerator
        self.parallel_model = parallel_model
        self.state = state
        self.note = note
        self._masked = LateFlag()
        self._last: Batch | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """One step on this process's part of a global batch; return the gradient's norm.

        The loss is the sum of bits/dim (and the model's penalties, if any) over the global batch,
        divided by its number of images; DDP averages gradients over the processes, hence the
        factor `num_processes`.

        Raises:
            NonFiniteError: if too many updates in a row had to be masked.
        """
        settings, state = self.settings, self.state
        parts = micro_batches(batch, settings.micro_batch)
        weight = self.accelerator.num_processes / settings.batch
        total = torch.zeros((), dtype=torch.float64, device=state.window.device)
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.parallel_model):
                bits, penalty = self._score(self.parallel_model, part)
                self.accelerator.backward((bits + penalty) * weight)
            total += bits.detach()
        self.settle()  # before the weights change, so that the last batch can be looked at again
        total = sum_over_ranks(total)
        state.images += settings.batch
        norm = torch.nn.utils.get_total_norm(self._gradients(), foreach=True)
        masked = ~(total.isfinite() & norm.isfinite())
        self._step(norm, masked)
        state.ema.update(state.model, settings.batch, state.images)
        seen = torch.full_like(total, settings.batch)
        none, one = torch.zeros_like(total), torch.ones_like(total)
        taken, left = torch.stack([total, seen, none]), torch.stack([none, none, one])
        state.window += taken.where(~masked, left)
        self._masked.put(masked)
        self._last = batch
        return norm

    def settle(self) -> None:
        """Learn whether the last update was masked, and say why; all processes call it."""
        masked = self._masked.take()
        if masked is None or self._last is None:
            return
        if not masked:
            self.state.masked_in_a_row = 0
            return
        self.state.masked_in_a_row += 1
        diagnosis = self._diagnose(self._last)
        self.note(self.state.images, diagnosis)
        what = describe(diagnosis)
        if self.state.masked_in_a_row >= self.settings.masked_limit:
            raise NonFiniteError(
                f"{self.state.masked_in_a_row} updates in a row were not finite "
                f"(train.masked_limit), the last at image {self.state.images:,}{what}; lower "
                f"train.optimizer.lr, raise train.schedule.warmup_images, set train.clip, or "
                f"bound model.scale."
            )
        if self.accelerator.is_main_process:
            print(
                f"WARNING: the update at image {self.state.images:,} was not finite and is "
                f"masked{what}.",
                file=sys.stderr,
            )

    def learning_rate(self) -> float:
        """The rate of the last update."""
        return learning_rate(
            self.state.images,
            self.settings.images,
            self.settings.optimizer.lr,
            **self.settings.schedule.model_dump(),
        )

    def _score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sums of bits/dim and of penalties, under the noise of the samples' ids and epochs."""
        output = model(*self._inputs(batch))
        bits = bits_per_dim(output.log_prob, self.state.model.dimensions).sum()
        return bits, sum((x.sum() for x in output.penalties.values()), torch.zeros_like(bits))

    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Images, labels and noise, on the device."""
        rows = zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True)
        noise = self.state.model.draw_noise((self.seed, "dequantization", *row) for row in rows)
        refuse_unlabelled(self.state.model, batch)
        inputs = (batch.images, batch.labels, noise)
        return tuple(x.to(self.accelerator.device, non_blocking=True) for x in inputs)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.state.model.parameters() if p.grad is not None]

    def _step(self, norm: Tensor, masked: Tensor) -> None:
        """Clip, set the learning rate, update the weights unless masked."""
        if self.settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.state.model.parameters(), self.settings.clip, norm, foreach=True
            )
        optimizer = self.state.optimizer
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate()
        # Neither optimizer nor schedule is prepared: Accelerate would step them by its own count.
        optimizer.found_inf = masked.float()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _diagnose(self, batch: Batch) -> Diagnosis:
        """What was not finite in a global batch; every process looks at its part."""
        ids: list[int] = []
        places: list[str] = []
        for part in micro_batches(batch, self.settings.micro_batch):
            model = self.state.model
            with self.accelerator.autocast(), first_non_finite(model) as layers:
                output = model(*self._inputs(part))
            ids += part.ids[~output.log_prob.isfinite().cpu()].tolist()
            loss = output.log_prob.sum()
            places += layers[:1] or [non_finite_gradient(loss, model)]
        found: list[tuple[list[int], list[str]]] = gather_object([(ids, places)])
        every_place = [place for _, places in found for place in places if place]
        every_id = sorted({identity for ids, _ in found for identity in ids})
        return Diagnosis(every_id, every_place[0] if every_place else "")


def micro_batches(batch: Batch, most: int | None) -> list[Batch]:
    """Cut a process's part of a batch into pieces of at most so many images."""
    count = len(batch.ids)
    size = min(most or count, count)
    return [Batch(*(x[i : i + size] for x in batch)) for i in range(0, count, size)]


def describe(diagnosis: Diagnosis) -> str:
    """A diagnosis as the end of a sentence."""
    ids, place = diagnosis
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    images = f" for the training images {', '.join(map(str, ids[:SHOWN]))}{more}" if ids else ""
    return f"{images}{f', first in {place}' if place else ''}"
