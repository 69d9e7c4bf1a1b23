"""The training loop: draw a global batch, update, and at set counts of images look and save."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from glowscale.bijections import initializing
from glowscale.checkpoint import load_tensors
from glowscale.config import Config, ConfigError
from glowscale.data import (
    Augmentation,
    DataError,
    Retry,
    ShardSet,
    Slice,
    check_lanes,
    open_cache,
    training_stream,
)
from glowscale.distributed import failing_together, refuse_disagreement, sum_over_ranks
from glowscale.errors import UserError
from glowscale.evaluation import Evaluation, check_fits, evaluate, refuse_unlabelled
from glowscale.files import join
from glowscale.jobs import say
from glowscale.models import MultiscaleFlow, build_model
from glowscale.pictures import save_curves
from glowscale.pretrained import load
from glowscale.randomness import derived_seed
from glowscale.sampling import BLOCK, NonFiniteSampleError, save_preview
from glowscale.training.diagnosis import Diagnosis
from glowscale.training.lock import RunLock, refuse_unshared
from glowscale.training.optimizer import build_optimizer
from glowscale.training.run_folder import RunFolder
from glowscale.training.state import TrainingState
from glowscale.training.trackers import log_picture, start_trackers
from glowscale.training.update import NonFiniteError, Updater


class RoundTripError(UserError):
    """A model whose inverse does not bring images back."""


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
        self.train_shards, self.held_out_shards = self._open_data()
        self.folder = RunFolder(config, self.train_shards.manifest)
        model = self._build_model()
        check_fits(model, self.held_out_shards)
        with ExitStack() as held:
            with failing_together():
                if self.is_main:
                    held.callback(RunLock(config.run.dir).release)
            refuse_unshared(config.run.dir)
            self.state = self._resume(model) or self._begin(model)
            with failing_together():
                start_trackers(accelerator, config, self.state.images)
            self._held = held.pop_all()
        self.update = Updater(
            config.train,
            config.data.lost_limit,
            config.run.seed,
            accelerator,
            accelerator.prepare(model),
            self.state,
            self._note_masked,
        )
        self._seconds = 0.0

    def train(self) -> Evaluation:
        """Train to `train.images`; return the averaged weights' held-out bits/dim.

        Raises:
            NonFiniteError: if the loss or its gradient blows up again and again; the updates
                that saw it are masked and never saved.
            RoundTripError: if the model's inverse is off by more than the config allows.
        """
        config = self.config
        if self.is_main:
            processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
            say(f"training on {processes} ({self.accelerator.device.type})")
        batches = self._stream(self.state.images, config.train.batch, config.data.workers)
        with self._held, self._progress() as progress:
            while self.state.images < config.train.images:
                started = time.perf_counter()
                gradient_norm = self.update(next(batches))
                self._seconds += time.perf_counter() - started
                progress.update(config.train.batch)
                self._look_and_save(gradient_norm, progress)
            return self._finish()

    def _look_and_save(self, gradient_norm: Tensor, progress: "tqdm[Any]") -> None:
        """Whatever is due after this many images; the checkpoint last, so that it covers all."""
        settings = self.config
        if self._due(settings.log.every):
            self._log(gradient_norm, progress)
        if self._due(settings.evaluate.every):
            self._log_evaluation(progress)
        if self._due(settings.samples.every):
            self._save_samples(f"samples/{self.state.images:012d}.png")
        if self._due(settings.checkpoint.every):
            self.update.settle()
            self._save(self.state)

    def _due(self, every: int) -> bool:
        """Whether this batch crossed a multiple of `every`, or was the last."""
        images, settings = self.state.images, self.config.train
        crossed = images // every > (images - settings.batch) // every
        return crossed or images >= settings.images

    def _log(self, gradient_norm: Tensor, progress: "tqdm[Any]") -> None:
        self.update.settle()
        bits, images, masked = self.state.window.tolist()
        self.state.window.zero_()
        mean = bits / images if images else None
        progress.set_postfix_str("not finite" if mean is None else f"{mean:.3f} bits/dim")
        speed = (images + masked * self.config.train.batch) / max(self._seconds, 1e-9)
        self._seconds = 0.0
        self._record(
            "train",
            {
                "bits_per_dim": mean,
                "gradient_norm": float(gradient_norm),
                "learning_rate": self.update.learning_rate(),
                "masked_updates": int(masked),
            },
            {"images_per_second": round(speed, 3)},
        )

    def _record(
        self, kind: str, values: dict[str, Any], times: dict[str, float] | None = None
    ) -> None:
        """A line of metrics, in the run folder and for the trackers."""
        with failing_together():
            if self.is_main:
                self.folder.log(kind, self.state.images, values, times or {})
                numbers = {
                    f"{kind}/{key}": value
                    for key, value in {**values, **(times or {})}.items()
                    if isinstance(value, (int, float)) and math.isfinite(value)
                }
                self.accelerator.log(numbers, step=self.state.images)

    def _note_masked(self, images: int, diagnosis: Diagnosis) -> None:
        self._record("masked", {"ids": diagnosis.ids, "place": diagnosis.place})

    def _log_evaluation(self, progress: "tqdm[Any]") -> None:
        result = self.evaluate(self.config.evaluate.images)
        if self.is_main:
            progress.write(f"{self.state.images:,} images: {result}", file=sys.stderr)
        figures = ("bits_per_dim", "standard_error", "round_trip_error", "prior_round_trip_error")
        self._record("held_out", {key: getattr(result, key) for key in figures})
        self._save_curves()
        self._refuse_round_trip(result)

    def _refuse_round_trip(self, result: Evaluation) -> None:
        limit = self.config.evaluate.round_trip_limit
        errors = {"images": result.round_trip_error, "samples": result.prior_round_trip_error}
        for what, error in errors.items():
            if limit is not None and not error <= limit:
                raise RoundTripError(
                    f"At image {self.state.images:,} the round trip of {what} is off by "
                    f"{error:.3g} grey levels, more than evaluate.round_trip_limit={limit:g}: the "
                    f"model's inverse cannot be trusted; lower train.optimizer.lr, bound "
                    f"model.scale, or allow more (null: anything)."
                )

    def evaluate(self, images: int | None = None) -> Evaluation:
        """Bits/dim of the averaged weights on the first so many held-out images, or on all."""
        self.update.settle()
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
        self._save_samples("samples.png")
        self._save_curves()
        with failing_together():
            if self.is_main:
                self.folder.save_evaluation(self.state.images, result)
        return result

    def _save_curves(self) -> None:
        with failing_together():
            if self.is_main:
                save_curves(self.folder.read_metrics(), self.folder.path / "curves.png")

    def _save_samples(self, name: str) -> None:
        """A grid of samples, if they are finite; a run does not end for a picture."""
        settings, path = self.config.samples, self.folder.path / name
        with failing_together():
            if not self.is_main:
                return
            try:
                save_preview(
                    self.state.ema.model,
                    path,
                    settings.count,
                    self.config.run.seed,
                    settings.temperature,
                    block=min(settings.count, BLOCK),
                )
            except NonFiniteSampleError as error:
                say(f"WARNING: {error} There is no picture {path}.")
            else:
                grid = np.asarray(Image.open(path))
                log_picture(self.accelerator, "samples", grid, self.state.images)

    def _open_data(self) -> tuple[ShardSet, ShardSet]:
        """Training and held-out data, the same on all processes."""
        data = self.config.data
        with failing_together():
            splits = (data.train_split, data.held_out_split)
            cache = open_cache(**data.cache.model_dump())
            retry = Retry(**data.transfer.model_dump())
            train, held_out = (ShardSet(join(data.dir, split), cache, retry) for split in splits)
        manifests = [train.manifest, held_out.manifest]
        seen = " and ".join(f"{m.fingerprint[:8]} in {m.offsets_sha256[:8]}" for m in manifests)
        refuse_disagreement("data", seen)
        return train, held_out

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
        """The state that checkpoint 0 holds: initialized from data, or another run's weights."""
        if self.config.train.warm_start:
            self._load_weights(model, self.config.train.warm_start)
        else:
            self._initialize(model)
        state = self._make_state(model)
        with failing_together():
            if self.is_main:
                self.folder.open(-1)
        self._save(state)
        return state

    def _load_weights(self, model: MultiscaleFlow, name: str) -> None:
        """Take over the weights of a run or a published model of the same architecture."""
        with failing_together():
            source = load(name)
            source.refuse_other_architecture(
                self.config.model.model_dump(mode="json"), self.train_shards.manifest.classes
            )
            load_tensors(model, source.flow.to(model.dtype).state_dict(), Path(name))
        if self.is_main:
            say(f"starting from the weights of {name}")

    def _initialize(self, model: MultiscaleFlow) -> None:
        """Initialize ActNorm from the stream's first images."""
        with failing_together():
            batch, failures = next(self._stream(0, self.config.train.init_images, workers=0))
            if failures and not self.config.data.lost_limit:
                raise DataError(failures[0].sentence)
        refuse_unlabelled(model, batch)
        seed = self.config.run.seed
        noise = model.draw_noise((seed, "initialization", i) for i in batch.ids.tolist())
        with torch.no_grad(), initializing(model, sum_over_ranks):
            model(*(x.to(model.device) for x in (batch.images, batch.labels, noise)))

    def _make_state(self, model: MultiscaleFlow) -> TrainingState:
        settings = self.config.train
        optimizer = build_optimizer(model, **settings.optimizer.model_dump())
        return TrainingState(model, optimizer, settings.ema_images)

    def _save(self, state: TrainingState) -> None:
        """Write a checkpoint; all ranks call it, the main one writes.

        Raises:
            NonFiniteError: if a tensor of it is not finite.
        """
        if bad := state.non_finite_tensor():
            raise NonFiniteError(
                f"At image {state.images:,} the tensor {bad} is not finite, so no checkpoint is "
                f"written; those in {self.folder.checkpoints} are from before."
            )
        with failing_together():
            if self.is_main:
                self.folder.save(state)

    def _stream(self, cursor: int, batch: int, workers: int) -> Iterator[Slice]:
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
            augmentation=Augmentation(**data.augment.model_dump()),
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
