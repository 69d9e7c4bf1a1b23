"""The training loop: draw a global batch, update, and at set counts of images look and save."""

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from glowscale.bijections import initializing
from glowscale.config import Config, ConfigError
from glowscale.data import Batch, ShardSet, check_lanes, training_stream
from glowscale.distributed import failing_together, refuse_disagreement, sum_over_ranks
from glowscale.errors import UserError
from glowscale.evaluation import (
    Evaluation,
    bits_per_dim,
    check_fits,
    evaluate,
    refuse_unlabelled,
)
from glowscale.jobs import say
from glowscale.models import MultiscaleFlow, build_model
from glowscale.pictures import save_curves
from glowscale.randomness import derived_seed
from glowscale.sampling import save_preview
from glowscale.training.lock import RunLock
from glowscale.training.optimizer import build_optimizer, learning_rate
from glowscale.training.run_folder import RunFolder
from glowscale.training.state import TrainingState


class NonFiniteError(UserError):
    """A loss or gradient that is not finite."""


class Trainer:
    """Trains a model as a config says, in a run folder that it resumes if there is a checkpoint.

    Args:
        config: the run.
        accelerator: the processes; every one of them builds a Trainer.

    Raises:
        ConfigError: where the config and the processes, or an earlier start's config, disagree.
        DataError: where the data are missing or are not what the model is for.
        CheckpointError: where there are checkpoints but none can be read.
        LockedError: where another trainer works in the run folder.
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.is_main = accelerator.is_main_process
        if (config.train.precision == "bf16") != (accelerator.mixed_precision == "bf16"):
            raise ConfigError(
                f"train.precision is {config.train.precision!r}, but Accelerate was started with "
                f"mixed_precision={accelerator.mixed_precision!r}; see start_accelerator."
            )
        check_lanes(config.data.lanes, config.train.batch, self.world_size)
        self.train_shards = ShardSet(config.data.dir / config.data.train_split)
        self.held_out_shards = ShardSet(config.data.dir / config.data.held_out_split)
        self.folder = RunFolder(config, self.train_shards.manifest)
        model = self._build_model()
        check_fits(model, self.held_out_shards)
        with ExitStack() as held:
            with failing_together():
                if self.is_main:
                    held.callback(RunLock(config.run.dir).release)
            self.state = self._resume(model) or self._begin(model)
            self._held = held.pop_all()
        self.parallel_model = accelerator.prepare(model)

    def train(self) -> Evaluation:
        """Train to `train.images`; return the averaged weights' held-out bits/dim.

        Raises:
            NonFiniteError: if the loss or its gradient blows up; that is never saved.
        """
        config = self.config
        batches = self._stream(self.state.images, config.train.batch, config.data.workers)
        with self._held, self._progress() as progress:
            while self.state.images < config.train.images:
                gradient_norm = self.update(next(batches))
                progress.update(config.train.batch)
                self._look_and_save(gradient_norm, progress)
            return self._finish()

    def update(self, batch: Batch) -> Tensor:
        """One step on this process's part of a global batch; return the gradient's norm.

        The loss is the sum of bits/dim (and the model's penalties, if any) over the global batch,
        divided by its number of images; DDP averages gradients over the processes, hence the
        factor `world_size`.
        """
        settings, state = self.config.train, self.state
        parts = _micro_batches(batch, settings.micro_batch)
        weight = self.world_size / settings.batch
        total = torch.zeros((), dtype=torch.float64, device=state.window.device)
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.parallel_model):
                bits, penalty = self._score(part)
                self.accelerator.backward((bits + penalty) * weight)
            total += bits.detach()
        state.images += settings.batch
        norm = self._step()
        state.ema.update(state.model, settings.batch, state.images)
        seen = torch.full_like(total, settings.batch)
        state.window += torch.stack([sum_over_ranks(total), seen, ~norm.isfinite()])
        return norm

    def _score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sums of bits/dim and of penalties, under the noise of the samples' ids and epochs."""
        seed = self.config.run.seed
        rows = zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True)
        noise = self.state.model.draw_noise((seed, "dequantization", *row) for row in rows)
        refuse_unlabelled(self.state.model, batch)
        inputs = (batch.images, batch.labels, noise)
        output = self.parallel_model(
            *(x.to(self.accelerator.device, non_blocking=True) for x in inputs)
        )
        bits = bits_per_dim(output.log_prob, self.state.model.dimensions).sum()
        return bits, sum((x.sum() for x in output.penalties.values()), torch.zeros_like(bits))

    def _step(self) -> Tensor:
        """Clip, set the learning rate, update the weights."""
        settings = self.config.train
        gradients = [p.grad for p in self.state.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.state.model.parameters(), settings.clip, norm, foreach=True
            )
        for group in self.state.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        # Neither optimizer nor schedule is prepared: Accelerate would step them by its own count.
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)
        return norm

    def _learning_rate(self) -> float:
        settings = self.config.train
        return learning_rate(
            self.state.images,
            settings.images,
            settings.optimizer.lr,
            **settings.schedule.model_dump(),
        )

    def _look_and_save(self, gradient_norm: Tensor, progress: "tqdm[Any]") -> None:
        """Whatever is due after this many images; the checkpoint last, so that it covers all."""
        if self._due(self.config.log.every):
            self._log(gradient_norm, progress)
        if self._due(self.config.evaluate.every):
            self._log_evaluation(progress)
        if self._due(self.config.samples.every) and self.is_main:
            self._save_samples(f"samples/{self.state.images:012d}.png")
        if self._due(self.config.checkpoint.every):
            self._save(self.state)

    def _due(self, every: int) -> bool:
        """Whether this batch crossed a multiple of `every`, or was the last."""
        images, settings = self.state.images, self.config.train
        crossed = images // every > (images - settings.batch) // every
        return crossed or images >= settings.images

    def _log(self, gradient_norm: Tensor, progress: "tqdm[Any]") -> None:
        self._refuse_non_finite(self.state)
        bits, images, _ = self.state.window.tolist()
        self.state.window.zero_()
        progress.set_postfix_str(f"{bits / images:.3f} bits/dim")
        if self.is_main:
            self.folder.log(
                "train",
                self.state.images,
                bits_per_dim=bits / images,
                gradient_norm=float(gradient_norm),
                learning_rate=self._learning_rate(),
            )

    def _log_evaluation(self, progress: "tqdm[Any]") -> None:
        result = self.evaluate(self.config.evaluate.images)
        if self.is_main:
            progress.write(f"{self.state.images:,} images: {result}", file=sys.stderr)
            self.folder.log(
                "held_out",
                self.state.images,
                bits_per_dim=result.bits_per_dim,
                standard_error=result.standard_error,
                reconstruction_error=result.reconstruction_error,
            )
            save_curves(self.folder.read_metrics(), self.folder.path / "curves.png")

    def evaluate(self, images: int | None = None) -> Evaluation:
        """Bits/dim of the averaged weights on the first so many held-out images, or on all."""
        self._refuse_non_finite(self.state)
        settings = self.config.evaluate
        return evaluate(
            self.state.ema.model,
            self.held_out_shards,
            seed=self.config.run.seed,
            batch=settings.batch,
            images=images,
            importance_samples=settings.importance_samples,
            rank=self.rank,
            world_size=self.world_size,
        )

    def _finish(self) -> Evaluation:
        """The figure over all held-out images, and the last pictures."""
        result = self.evaluate()
        if self.is_main:
            self._save_samples("samples.png")
            save_curves(self.folder.read_metrics(), self.folder.path / "curves.png")
        self.accelerator.wait_for_everyone()
        return result

    def _save_samples(self, name: str) -> None:
        settings = self.config.samples
        save_preview(
            self.state.ema.model,
            self.folder.path / name,
            settings.count,
            self.config.run.seed,
            settings.temperature,
        )

    def _build_model(self) -> MultiscaleFlow:
        manifest = self.train_shards.manifest
        torch.manual_seed(derived_seed(self.config.run.seed, "weights") % 2**63)
        try:
            model = build_model(
                self.config.model.model_dump(),
                manifest.image_shape,
                manifest.grey_levels,
                len(manifest.classes),
            )
        except ValueError as error:
            raise ConfigError(
                f"The model does not fit {self.train_shards.folder}: {error}"
            ) from None
        if self.config.train.precision == "float64":
            model.double()
        return model.to(self.accelerator.device).to(memory_format=torch.channels_last)

    def _resume(self, model: MultiscaleFlow) -> TrainingState | None:
        """The state of the newest checkpoint, or None in a folder without one."""
        checkpoint = self.folder.newest_checkpoint()
        # All have looked before anyone writes.
        refuse_disagreement("checkpoints", checkpoint.digest if checkpoint else "none")
        if checkpoint is None:
            return None
        state = self._make_state(model)
        state.restore(checkpoint)
        if self.is_main:
            self.folder.open(state.images)
            say(f"resumed at {state.images:,} images from {checkpoint.path}")
        return state

    def _begin(self, model: MultiscaleFlow) -> TrainingState:
        """Initialize ActNorm from the stream's first images; the state that checkpoint 0 holds."""
        batch = next(self._stream(0, self.config.train.init_images, workers=0))
        refuse_unlabelled(model, batch)
        seed = self.config.run.seed
        noise = model.draw_noise((seed, "initialization", i) for i in batch.ids.tolist())
        with torch.no_grad(), initializing(model, sum_over_ranks):
            model(*(x.to(model.device) for x in (batch.images, batch.labels, noise)))
        state = self._make_state(model)
        with failing_together():
            if self.is_main:
                self.folder.open(-1)
        self._save(state)
        return state

    def _make_state(self, model: MultiscaleFlow) -> TrainingState:
        settings = self.config.train
        optimizer = build_optimizer(model, **settings.optimizer.model_dump())
        return TrainingState(model, optimizer, settings.ema_images)

    def _save(self, state: TrainingState) -> None:
        """Write a checkpoint; all ranks call it, the main one writes."""
        self._refuse_non_finite(state)
        with failing_together():
            if self.is_main:
                self.folder.save(state)

    def _refuse_non_finite(self, state: TrainingState) -> None:
        bits, images, broken = state.window.tolist()
        if broken or not math.isfinite(bits):
            raise NonFiniteError(
                f"The loss or its gradient became infinite or no number ({bits / images:.3g} "
                f"bits/dim) within {int(images):,} images before image {state.images:,}; lower "
                f"train.optimizer.lr, raise train.schedule.warmup_images, or set train.clip. The "
                f"checkpoints in {self.folder.checkpoints} are from before."
            )

    def _stream(self, cursor: int, batch: int, workers: int) -> Iterator[Batch]:
        data = self.config.data
        return training_stream(
            self.train_shards,
            seed=self.config.run.seed,
            lanes=data.lanes,
            batch=batch,
            shuffle_block=data.shuffle_block,
            cursor=cursor,
            rank=self.rank,
            world_size=self.world_size,
            workers=workers,
        )

    def _progress(self) -> "tqdm[Any]":
        return tqdm(
            total=self.config.train.images,
            initial=self.state.images,
            desc="training",
            unit="img",
            unit_scale=True,
            disable=not self.is_main,
        )


def _micro_batches(batch: Batch, most: int | None) -> list[Batch]:
    """Cut a process's part of a batch into pieces of at most so many images."""
    count = len(batch.ids)
    size = min(most or count, count)
    return [Batch(*(x[i : i + size] for x in batch)) for i in range(0, count, size)]
