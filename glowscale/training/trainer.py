"""The training loop: draw a global batch, update, and at set counts of images look and save."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from glowscale.bijections import initializing
from glowscale.config import Config, ConfigError
from glowscale.data import Batch, ShardSet, check_lanes, training_stream
from glowscale.distributed import sum_over_ranks
from glowscale.errors import UserError
from glowscale.evaluation import Evaluation, bits_per_dim, check_fits, evaluate
from glowscale.models import MultiscaleFlow, build_model
from glowscale.pictures import save_curves
from glowscale.randomness import derived_seed
from glowscale.sampling import save_preview
from glowscale.training.checkpoint import (
    Checkpoint,
    load_tensors,
    resume_checkpoint,
    save_checkpoint,
)
from glowscale.training.ema import EMA
from glowscale.training.optimizer import (
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
)
from glowscale.training.run_folder import RunFolder, refuse_changed_config


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
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.is_main = accelerator.is_main_process
        check_lanes(config.data.lanes, config.train.batch, self.world_size)
        self.train_shards = ShardSet(config.data.dir / config.data.train_split)
        self.held_out_shards = ShardSet(config.data.dir / config.data.held_out_split)
        self.folder = RunFolder(config.run.dir)
        self.model = self._build_model()
        check_fits(self.model, self.held_out_shards)
        self.images = 0
        self.window = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        self.optimizer = build_optimizer(self.model, **config.train.optimizer.model_dump())
        self._resume_or_initialize()
        self.parallel_model = accelerator.prepare(self.model)

    def train(self) -> Evaluation:
        """Train to `train.images`; return the averaged weights' held-out bits/dim."""
        batches = self._stream(self.images)
        with self._progress() as progress:
            while self.images < self.config.train.images:
                gradient_norm = self.update(next(batches))
                progress.update(self.config.train.batch)
                self._look_and_save(gradient_norm, progress)
        return self._finish()

    def update(self, batch: Batch) -> Tensor:
        """One step on this process's part of a global batch; return the gradient's norm.

        The loss is the sum of bits/dim over the global batch, divided by its number of images;
        DDP averages gradients over the processes, hence the factor `world_size`.
        """
        settings = self.config.train
        parts = _micro_batches(batch, settings.micro_batch)
        weight = self.world_size / settings.batch
        total = torch.zeros((), dtype=torch.float64, device=self.window.device)
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.parallel_model):
                bits = self._bits_per_dim(part).sum()
                self.accelerator.backward(bits * weight)
            total += bits.detach()
        self.images += settings.batch
        norm = self._step()
        self.ema.update(self.model, settings.batch, self.images)
        seen = torch.full_like(total, settings.batch)
        self.window += torch.stack([sum_over_ranks(total), seen])
        return norm

    def _bits_per_dim(self, batch: Batch) -> Tensor:
        """Bits/dim (B,) of a part of a batch, with the noise of its samples' ids and epochs."""
        seed = self.config.run.seed
        rows = zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True)
        noise = self.model.draw_noise((seed, "dequantization", *row) for row in rows)
        device = self.accelerator.device
        images, noise = (x.to(device, non_blocking=True) for x in (batch.images, noise))
        output = self.parallel_model(images, None, noise)
        return bits_per_dim(output.log_prob, self.model.dimensions)

    def _step(self) -> Tensor:
        """Clip, set the learning rate, update the weights."""
        settings = self.config.train
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.model.parameters(), settings.clip, norm, foreach=True
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        # Neither optimizer nor schedule is prepared: Accelerate would step them by its own count.
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _learning_rate(self) -> float:
        settings = self.config.train
        return learning_rate(
            self.images,
            settings.images,
            settings.optimizer.lr,
            **settings.schedule.model_dump(),
        )

    def _look_and_save(self, gradient_norm: Tensor, progress: "tqdm[Any]") -> None:
        """Whatever is due after this many images; the checkpoint last, so that it covers all."""
        if self._due(self.config.log.every):
            self._log(gradient_norm, progress)
        if self._due(self.config.evaluate.every):
            self._evaluate(self.config.evaluate.images, progress)
        if self._due(self.config.samples.every) and self.is_main:
            self._save_samples(f"samples/{self.images:012d}.png")
        if self._due(self.config.checkpoint.every):
            self._save()

    def _due(self, every: int) -> bool:
        """Whether this batch crossed a multiple of `every`, or was the last."""
        crossed = self.images // every > (self.images - self.config.train.batch) // every
        return crossed or self.images >= self.config.train.images

    def _log(self, gradient_norm: Tensor, progress: "tqdm[Any]") -> None:
        bits, images = self.window.tolist()
        self._refuse_non_finite()
        self.window.zero_()
        progress.set_postfix_str(f"{bits / images:.3f} bits/dim")
        if self.is_main:
            self.folder.log(
                "train",
                self.images,
                bits_per_dim=bits / images,
                gradient_norm=float(gradient_norm),
                learning_rate=self._learning_rate(),
            )

    def _evaluate(self, images: int | None, progress: "tqdm[Any] | None" = None) -> Evaluation:
        settings = self.config.evaluate
        result = evaluate(
            self.ema.model,
            self.held_out_shards,
            seed=self.config.run.seed,
            batch=settings.batch,
            images=images,
            importance_samples=settings.importance_samples,
            rank=self.rank,
            world_size=self.world_size,
        )
        if progress is not None and self.is_main:
            progress.write(f"{self.images:,} images: {result}", file=sys.stderr)
            self.folder.log(
                "held_out",
                self.images,
                bits_per_dim=result.bits_per_dim,
                standard_error=result.standard_error,
                reconstruction_error=result.reconstruction_error,
            )
            save_curves(self.folder.read_metrics(), self.folder.path / "curves.png")
        return result

    def _finish(self) -> Evaluation:
        """The figure over all held-out images, and the last pictures."""
        result = self._evaluate(None)
        if self.is_main:
            self._save_samples("samples.png")
            save_curves(self.folder.read_metrics(), self.folder.path / "curves.png")
        self.accelerator.wait_for_everyone()
        return result

    def _save_samples(self, name: str) -> None:
        settings = self.config.samples
        save_preview(
            self.ema.model,
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
                self.config.model.model_dump(), manifest.image_shape, manifest.grey_levels
            )
        except ValueError as error:
            raise ConfigError(
                f"The model does not fit {self.train_shards.folder}: {error}"
            ) from None
        if self.config.train.precision == "float64":
            model.double()
        return model.to(self.accelerator.device).to(memory_format=torch.channels_last)

    def _resume_or_initialize(self) -> None:
        checkpoint = resume_checkpoint(self.folder.checkpoints)
        self.accelerator.wait_for_everyone()  # all have looked before anyone writes
        if checkpoint is not None:
            self._restore(checkpoint)
        if self.is_main:
            self.folder.open(self.config)
            self.folder.rewind(self.images if checkpoint else -1)
        if checkpoint is None:
            self._initialize()

    def _initialize(self) -> None:
        """ActNorm from the first images of the stream, the averages, and checkpoint 0."""
        settings = self.config.train
        batch = next(self._stream(0, settings.init_images))
        with torch.no_grad(), initializing(self.model, sum_over_ranks):
            noise = self._initial_noise(batch)
            self.model(batch.images.to(self.accelerator.device), None, noise)
        self.ema = EMA(self.model, settings.ema_images)
        self._save()

    def _initial_noise(self, batch: Batch) -> Tensor:
        seed = self.config.run.seed
        noise = self.model.draw_noise((seed, "initialization", i) for i in batch.ids.tolist())
        return noise.to(self.accelerator.device)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Continue where a checkpoint stands."""
        state = checkpoint.state
        refuse_changed_config(state["config"], self.config.model_dump(mode="json"))
        fingerprint = self.train_shards.manifest.fingerprint
        if state["fingerprint"] != fingerprint:
            raise ConfigError(
                f"The run was trained on the data {state['fingerprint'][:8]}, but "
                f"{self.train_shards.folder} holds {fingerprint[:8]}; set data.dir to the former."
            )
        path = checkpoint.path
        load_tensors(self.model, checkpoint.tensors["model"], path / "model.safetensors")
        self.ema = EMA(self.model, self.config.train.ema_images)
        load_tensors(self.ema.model, checkpoint.tensors["ema"], path / "ema.safetensors")
        load_optimizer_tensors(self.optimizer, self.model, checkpoint.tensors["optimizer"])
        self.images = state["images"]
        self.window += torch.tensor(state["window"], dtype=torch.float64)

    def _save(self) -> None:
        """Write a checkpoint; all ranks call it, the main one writes."""
        self._refuse_non_finite()
        if self.is_main:
            manifest = self.train_shards.manifest
            state = {
                "images": self.images,  # the stream's cursor
                "window": self.window.tolist(),
                "config": self.config.model_dump(mode="json"),
                "image_shape": manifest.image_shape,
                "grey_levels": manifest.grey_levels,
                "fingerprint": manifest.fingerprint,
                "memory_format": "channels_last",
            }
            tensors = {
                "model": self.model.state_dict(),
                "ema": self.ema.model.state_dict(),
                "optimizer": optimizer_tensors(self.optimizer, self.model),
            }
            name = f"images-{self.images:012d}"
            save_checkpoint(
                self.folder.checkpoints, name, tensors, state, self.config.checkpoint.keep
            )
        self.accelerator.wait_for_everyone()

    def _refuse_non_finite(self) -> None:
        bits = float(self.window[0])
        if not torch.isfinite(self.window[0]):
            raise NonFiniteError(
                f"The loss became {bits} within {int(self.window[1]):,} images before image "
                f"{self.images:,}; lower train.optimizer.lr, raise train.schedule.warmup_images, "
                f"or set train.clip. The checkpoints in {self.folder.checkpoints} are from before."
            )

    def _stream(self, cursor: int, batch: int | None = None) -> Iterator[Batch]:
        data = self.config.data
        return training_stream(
            self.train_shards,
            seed=self.config.run.seed,
            lanes=data.lanes,
            batch=batch or self.config.train.batch,
            shuffle_block=data.shuffle_block,
            cursor=cursor,
            rank=self.rank,
            world_size=self.world_size,
            workers=0 if batch else data.workers,
        )

    def _progress(self) -> "tqdm[Any]":
        return tqdm(
            total=self.config.train.images,
            initial=self.images,
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
