"""The training loop: draw a global batch, update, and at set counts of images look and save."""

import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
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
from glowscale.evaluation import Evaluation, UntrustedError, check_fits, refuse_unlabelled
from glowscale.files import join
from glowscale.jobs import say
from glowscale.models import MultiscaleFlow, build_model
from glowscale.randomness import derived_seed
from glowscale.stopping import Stopped, StopRequest
from glowscale.training.lock import RunLock, refuse_unshared
from glowscale.training.optimizer import build_optimizer
from glowscale.training.reports import Reports
from glowscale.training.run_folder import RunFolder
from glowscale.training.saver import Saver
from glowscale.training.state import TrainingState
from glowscale.training.trackers import start_trackers
from glowscale.training.update import NonFiniteError, Updater


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
        self._saver = Saver(self.folder.save)
        self._saved = -1  # images of the last state that was saved or resumed
        with ExitStack() as held:
            with failing_together():
                if self.is_main:
                    held.callback(RunLock(config.run.dir).release)
            refuse_unshared(config.run.dir)
            resumed = self._resume(model)
            self.state = resumed or self._begin(model)
            with failing_together():
                start_trackers(accelerator, config, self.state.images)
            self._stop = StopRequest()
            self.reports = Reports(
                config, accelerator, self.folder, self.state, self.held_out_shards, self._stop
            )
            self.update = Updater(
                config.train,
                config.data.lost_limit,
                config.run.seed,
                accelerator,
                accelerator.prepare(model),
                self.state,
                self.reports.log_masked,
                self._stop,
            )
            if resumed is None:
                self.save()
                self.finish_saving()
            self._held = held.pop_all()

    def train(self) -> Evaluation:
        """Train to `train.images`; return the averaged weights' held-out bits/dim.

        Raises:
            NonFiniteError: if the loss or its gradient blows up again and again; the updates
                that saw it are masked and never saved.
            RoundTripError: if the model's inverse is off by more than the config allows; the state
                is saved.
            SolverGapError: if a continuous flow's evaluations are; likewise.
            Stopped: if SIGTERM or SIGUSR1 asked any process to stop; the state is saved.
        """
        if self.is_main:
            processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
            say(f"training on {processes} ({self.accelerator.device.type})")
        self.reports.save_environment()
        with self._held, self._stop, self._saver, self._progress() as progress:
            try:
                self._update_to_the_end(progress)
                result = self.reports.finish()
            except UntrustedError:  # evaluate.round_trip_limit may change on a resume
                self.save()
                self.finish_saving()
                raise
            except Stopped as stopped:
                self.save()
                self.finish_saving()
                raise Stopped(self._describe_stop()) from stopped
            self.finish_saving()
            return result

    def save(self) -> None:
        """Begin to write a checkpoint of the state; all processes call it, the main one writes.

        Raises:
            NonFiniteError: if a tensor of it is not finite.
            CheckpointError: if the one before could not be written.
        """
        self.update.settle()
        state = self.state
        if state.images == self._saved:
            return
        if bad := state.non_finite_tensor():
            raise NonFiniteError(
                f"At image {state.images:,} the tensor {bad} is not finite, so no checkpoint is "
                f"written; those in {self.folder.checkpoints} are from before."
            )
        with failing_together():
            if self.is_main:
                self._saver.start(state.tensors(), state.counters())
        self._saved = state.images

    def finish_saving(self) -> None:
        """Return, on all processes, when the checkpoint is written."""
        with failing_together():
            self._saver.wait()

    def _update_to_the_end(self, progress: "tqdm[Any]") -> None:
        """All updates that are left, with looks and checkpoints where they are due.

        Raises:
            Stopped: as soon as the processes have agreed to, with the state after whole updates.
        """
        settings = self.config
        seconds, since = 0.0, self.state.images
        self._look(progress)
        workers = settings.data.workers
        with closing(self._stream(self.state.images, settings.train.batch, workers)) as batches:
            while self.state.images < settings.train.images:
                started = time.perf_counter()
                gradient_norm = self.update(next(batches))
                seconds += time.perf_counter() - started
                progress.update(settings.train.batch)
                if self._due(settings.log.every):
                    self.update.settle()
                    rate = self.update.learning_rate()
                    speed = (self.state.images - since) / max(seconds, 1e-9)
                    self.reports.log(gradient_norm, rate, speed, progress)
                    seconds, since = 0.0, self.state.images
                    with failing_together():
                        self._saver.refuse_failed()
                looks = {"held_out": settings.evaluate.every, "samples": settings.samples.every}
                self.state.due = [kind for kind, every in looks.items() if self._due(every)]
                self._look(progress)
                if self._due(settings.checkpoint.every):
                    self.save()

    def _look(self, progress: "tqdm[Any]") -> None:
        """Whatever is due to be looked at; raises Stopped before it if that is agreed."""
        if self.state.due:
            self.update.settle()
        if self.update.stop_agreed:
            raise Stopped
        while self.state.due:
            if self.state.due[0] == "held_out":
                self.reports.log_evaluation(progress)
            else:
                self.reports.save_samples()
            self.state.due.pop(0)

    def _due(self, every: int) -> bool:
        """Whether this batch crossed a multiple of `every`, or was the last."""
        images, settings = self.state.images, self.config.train
        crossed = images // every > (images - settings.batch) // every
        return crossed or images >= settings.images

    def _describe_stop(self) -> str:
        asked = self._stop.name or "a signal to another process"
        return (
            f"{asked} asked for it at image {self.state.images:,} of "
            f"{self.config.train.images:,}; all is saved in {self.folder.checkpoints}, and the "
            f"same command goes on."
        )

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
                self.config.train.activations,
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
        self._saved = state.images
        if self.is_main:
            self.folder.open(state.images, state.due)
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
        return state

    def _load_weights(self, model: MultiscaleFlow, name: str) -> None:
        """Take over the weights of a run or a published model of the same architecture."""
        from glowscale.pretrained import load  # with all of the hub behind it

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

    def _stream(self, cursor: int, batch: int, workers: int) -> Generator[Slice]:
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
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a log needs fewer lines
        )
