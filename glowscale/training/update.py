"""One update: the gradient of a global batch, the masked step, and what was wrong with it."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from glowscale.bijections.solvers import StiffError
from glowscale.config.schema import Train
from glowscale.data import Batch, DataError, Failure, Slice
from glowscale.distributed import LateWord, sum_over_ranks
from glowscale.errors import UserError
from glowscale.evaluation import bits_per_dim, refuse_unlabelled
from glowscale.jobs import say
from glowscale.training.diagnosis import Diagnosis, first_non_finite, non_finite_gradient
from glowscale.training.optimizer import learning_rate
from glowscale.training.state import TrainingState

SHOWN = 8
"""Images that a message names at most."""


class NonFiniteError(UserError):
    """A loss or gradient that is not finite, again and again."""


class DriftError(UserError):
    """Activations that were rebuilt from a layer's output, and are not what they were."""


class LostDataError(DataError):
    """More shards than the config tolerates could not be read."""


class Updater:
    """Updates a training state by global batches.

    Each step reduces one word over the processes, [bits, valid images, new failures of data,
    stiff solves, asked to stop, activations that drifted], and the host reads what follows from
    it a step later, without waiting. An update whose loss or gradient is not finite is masked: on
    all processes together, on the device, so that neither weights nor the optimizer's state see
    it. Then the images and the layer are named, and so many in a row end the run; so do more
    unreadable shards than are tolerated, and solves that pass their limits, on every process. An
    update whose activations drifted while they were rebuilt is masked too, and ends the run.

    Args:
        settings: the config's section `train`.
        lost_limit: shards that may be unreadable; their images are missing from the batches.
        seed: of the dequantization noise.
        accelerator: the processes.
        parallel_model: the state's model, wrapped for them.
        state: what is updated.
        note: told of every masked update what was wrong.
        stopping: whether this process was asked to stop.
    """

    def __init__(
        self,
        settings: Train,
        lost_limit: int,
        seed: int,
        accelerator: Accelerator,
        parallel_model: nn.Module,
        state: TrainingState,
        note: Callable[[Diagnosis], None],
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.settings = settings
        self.lost_limit = lost_limit
        self.seed = seed
        self.accelerator = accelerator
        self.parallel_model = parallel_model
        self.state = state
        self.note = note
        self.stopping = stopping
        self.stop_agreed = False
        """Whether some process was asked to stop; known on all of them at the same step."""
        self._parameters = [*state.model.parameters()]
        self._word = LateWord()
        self._last: Slice | None = None
        self._last_troubles: list[str] = []

    def __call__(self, part: Slice) -> Tensor:
        """One step on this process's part of a global batch; return the gradient's norm.

        The loss is the sum of bits/dim (and the model's penalties, if any) over the global batch,
        divided by its number of valid images; DDP averages gradients over the processes, hence
        the factor `num_processes`.

        Raises:
            NonFiniteError: if too many updates in a row had to be masked.
            LostDataError: if too many shards cannot be read.
        """
        settings, state = self.settings, self.state
        part = self._without_unlabelled(part)
        weight = self.accelerator.num_processes / settings.batch
        self.state.model.reset_figures()
        bits = self._backward(part.batch, weight)
        self.settle()  # before the weights change, so that the last batch can be looked at again
        found = self.state.model.take_troubles()
        counts = (
            len(part.batch.ids),
            len(part.failures),
            len(found),
            int(self.stopping()),
        )
        drifted = self._drifted().to(bits)
        local = torch.stack([bits, *(torch.full_like(bits, n) for n in counts), drifted])
        total, valid, failures, troubles, stops, drifted = sum_over_ranks(local)
        state.images += settings.batch
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if self.lost_limit:  # the sum was divided by the whole batch
            torch._foreach_mul_(gradients, settings.batch / valid.clamp(min=1))
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        masked = ~(total.isfinite() & norm.isfinite() & (valid > 0) & (drifted == 0))
        self._step(norm, masked)
        state.ema.update(settings.batch, state.images)
        none, one = torch.zeros_like(total), torch.ones_like(total)
        taken, left = torch.stack([total, valid, none]), torch.stack([none, none, one])
        state.window += taken.where(~masked, left)
        drifted = drifted * total.isfinite()  # what is not finite drifts of itself
        self._word.put(torch.stack([masked.to(total), failures, troubles, stops, drifted]))
        self._last, self._last_troubles = part, found
        return norm

    def settle(self) -> None:
        """Learn what became of the last update, and say so; all processes call it."""
        word = self._word.take()
        if word is None or self._last is None:
            return
        masked, failures, troubles, stops, drifted = word
        self.stop_agreed = self.stop_agreed or bool(stops)
        if failures:
            self._count_lost(self._last.failures)
        if drifted:
            self._refuse_drift()
        if masked:
            self._count_masked(self._last.batch)
        else:
            self.state.masked_in_a_row = 0
        if troubles:
            self._count_stiff()
        else:
            self.state.stiff_in_a_row = 0

    def _drifted(self) -> Tensor:
        """Whether activations that were rebuilt are off by more than they may, 1 or 0."""
        drifts = [*self.state.model.drifts().values()]
        if not drifts:
            return torch.zeros((), device=self.state.window.device)
        return (torch.stack(drifts).amax() > self.settings.drift_limit).float()

    def _refuse_drift(self) -> None:
        """Name the layer, the last of the model that is off: from there on backwards all are."""
        limit = self.settings.drift_limit
        drifts = [*self.state.model.drifts().items()]
        own = [(name, float(drift)) for name, drift in drifts if not float(drift) <= limit]
        found: list[list[tuple[str, float]]] = gather_object([own[-1:]])
        name, drift = next(layers[0] for layers in found if layers)
        raise DriftError(
            f"At image {self.state.images:,} the input of {name} was rebuilt from its output off "
            f"by {drift:.3g}, more than train.drift_limit={limit:g}: its inverse is not exact "
            f"enough; set train.activations=recompute, or bound the transforms' scale."
        )

    def _without_unlabelled(self, part: Slice) -> Slice:
        """Images without the label that the model needs are as good as unreadable."""
        try:
            refuse_unlabelled(self.state.model, part.batch)
        except DataError as error:
            known = part.batch.labels >= 0
            batch = Batch(*(x[known] for x in part.batch))
            return Slice(batch, [*part.failures, Failure("images without a label", str(error))])
        return part

    def _backward(self, batch: Batch, weight: float) -> Tensor:
        """Accumulate the gradient; return the sum of bits/dim."""
        parts = micro_batches(batch, self.settings.micro_batch)
        total = torch.zeros((), dtype=torch.float64, device=self.state.window.device)
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.parallel_model):
                bits, penalty = self._score(part)
                self.accelerator.backward((bits + penalty) * weight)
            total += bits.detach()
        return total

    def _count_lost(self, failures: list[Failure]) -> None:
        """Note shards that some process could not read; end the run where there are too many."""
        found: list[Failure] = gather_object(failures)
        for failure in found:
            if failure.shard in self.state.lost_shards:
                continue
            self.state.lost_shards.append(failure.shard)
            count = len(self.state.lost_shards)
            if count > self.lost_limit:
                raise LostDataError(
                    f"{failure.sentence.rstrip('.')}; data.lost_limit tolerates "
                    f"{self.lost_limit} unreadable shards."
                )
            if self.accelerator.is_main_process:
                say(f"WARNING: {failure.sentence} Lost shards: {count}, of {self.lost_limit}.")

    def _count_stiff(self) -> None:
        """Say which solves passed their limits; end the run where it happens again and again."""
        self.state.stiff_in_a_row += 1
        found: list[str] = gather_object(self._last_troubles)
        if self.state.stiff_in_a_row >= self.settings.stiff_limit:
            raise StiffError(
                f"In {self.state.stiff_in_a_row} updates in a row (train.stiff_limit), the last "
                f"at image {self.state.images:,}, solves passed their limits: {found[0]}"
            )
        if self.accelerator.is_main_process:
            say(
                f"WARNING: at image {self.state.images:,} {len(found)} solves were done again on "
                f"a grid: {found[0]}"
            )

    def _count_masked(self, batch: Batch) -> None:
        """Say what was not finite; end the run where it happens again and again."""
        self.state.masked_in_a_row += 1
        diagnosis = self._diagnose(batch)
        self.note(diagnosis)
        what = describe(diagnosis)
        if self.state.masked_in_a_row >= self.settings.masked_limit:
            raise NonFiniteError(
                f"{self.state.masked_in_a_row} updates in a row were not finite "
                f"(train.masked_limit), the last at image {self.state.images:,}{what}; lower "
                f"train.optimizer.lr, raise train.schedule.warmup_images, set train.clip, or "
                f"bound the transforms' scale (tanh, sigmoid)."
            )
        if self.accelerator.is_main_process:
            say(
                f"WARNING: the update at image {self.state.images:,} was not finite and is "
                f"masked{what}."
            )

    def learning_rate(self) -> float:
        """The rate of the last update."""
        return learning_rate(
            self.state.images,
            self.settings.images,
            self.settings.optimizer.lr,
            **self.settings.schedule.model_dump(),
        )

    def _score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sums of bits/dim and of penalties, under the noise of the samples' ids and epochs."""
        output = self.parallel_model(*self._inputs(batch))
        bits = bits_per_dim(output.log_prob, self.state.model.dimensions).sum()
        return bits, sum((x.sum() for x in output.penalties.values()), torch.zeros_like(bits))

    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Images, labels and noise, on the device."""
        rows = [*zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True)]
        model = self.state.model
        noise = model.draw_noise((self.seed, "dequantization", *row) for row in rows)
        labels = model.drop_labels(batch.labels, ((self.seed, "label", *row) for row in rows))
        inputs = (batch.images, labels, noise)
        return tuple(x.to(self.accelerator.device, non_blocking=True) for x in inputs)

    def _step(self, norm: Tensor, masked: Tensor) -> None:
        """Clip, set the learning rate, update the weights unless masked."""
        if self.settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self._parameters, self.settings.clip, norm, foreach=True
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
    if not count:
        return [batch]  # its holes are all that there is; the other processes still wait
    size = min(most or count, count)
    return [Batch(*(x[i : i + size] for x in batch)) for i in range(0, count, size)]


def describe(diagnosis: Diagnosis) -> str:
    """A diagnosis as the end of a sentence."""
    ids, place = diagnosis
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    images = f" for the training images {', '.join(map(str, ids[:SHOWN]))}{more}" if ids else ""
    return f"{images}{f', first in {place}' if place else ''}"
