"""What a run tells while it trains: metrics, held-out bits/dim, sample grids and curves."""

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from glowscale.bijections.roots import RootError
from glowscale.config import Config
from glowscale.data import ShardSet
from glowscale.distributed import failing_together
from glowscale.evaluation import Evaluation, evaluate, refuse_exploited_solver, refuse_untrusted
from glowscale.jobs import say
from glowscale.pictures import save_curves
from glowscale.report import write_report
from glowscale.sampling import BLOCK, NonFiniteSampleError, save_preview
from glowscale.training.diagnosis import Diagnosis
from glowscale.training.environment import describe_environment
from glowscale.training.run_folder import RunFolder
from glowscale.training.state import TrainingState
from glowscale.training.trackers import log_picture


class Reports:
    """Writes what people look at; all processes call its methods, the main one writes.

    Args:
        config: the run.
        accelerator: the processes.
        folder: of the run.
        state: what is trained.
        held_out: the images that are evaluated on.
        stopping: whether this process was asked to stop, which ends an evaluation.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        folder: RunFolder,
        state: TrainingState,
        held_out: ShardSet,
        stopping: Callable[[], bool],
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.folder = folder
        self.state = state
        self.held_out = held_out
        self.stopping = stopping

    def log(
        self,
        gradient_norm: Tensor,
        learning_rate: float,
        speed: float,
        progress: "tqdm[Any]",
    ) -> None:
        """A line of metrics about the updates since the last one, so many images a second."""
        bits, images, masked = self.state.window.tolist()
        self.state.window.zero_()
        mean = bits / images if images else None
        progress.set_postfix_str("not finite" if mean is None else f"{mean:.3f} bits/dim")
        self._record(
            "train",
            {
                "bits_per_dim": mean,
                "gradient_norm": float(gradient_norm),
                "learning_rate": learning_rate,
                "masked_updates": int(masked),
                **self.state.model.figures(),
            },
            {"images_per_second": round(speed, 3)},
        )

    def log_masked(self, diagnosis: Diagnosis) -> None:
        """A line of metrics about an update that was masked."""
        self._record("masked", {"ids": diagnosis.ids, "place": diagnosis.place})

    def log_evaluation(self, progress: "tqdm[Any]") -> None:
        """Held-out bits/dim so far, for people, the metrics and the curves.

        Raises:
            RoundTripError: if the model's inverse is off by more than the config allows.
            SolverGapError: if a continuous flow's figure, or its training's solver, is.
        """
        result = self.evaluate(self.config.evaluate.images)
        if self.is_main:
            progress.write(f"{self.state.images:,} images: {result}", file=sys.stderr)
        figures = ["bits_per_dim", "standard_error", "round_trip_error", "prior_round_trip_error"]
        if self.state.model.is_solved:
            figures += ["solver_gap", "training_solver_gap"]
        self._record("held_out", {key: getattr(result, key) for key in figures})
        self.save_curves()
        self.save_page()
        self._refuse_untrusted(result)
        refuse_exploited_solver(result, self.config.evaluate.solver_gap_limit)

    def evaluate(self, images: int | None = None) -> Evaluation:
        """Bits/dim of the averaged weights on the first so many held-out images, or on all."""
        settings = self.config.evaluate
        return evaluate(
            self.state.ema.model,
            self.held_out,
            seed=self.config.run.seed,
            batch=settings.batch,
            images=images,
            importance_samples=settings.importance_samples,
            probes=settings.probes,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            stopping=self.stopping,
        )

    def finish(self) -> Evaluation:
        """The figure over all held-out images, and the last pictures; raises as the above."""
        result = self.evaluate()
        self.save_samples("samples.png")
        self.save_curves()
        with failing_together():
            if self.is_main:
                self.folder.save_evaluation(self.state.images, result)
        self.save_page()
        self._refuse_untrusted(result)
        return result

    def save_environment(self) -> None:
        """Where the run is made."""
        with failing_together():
            if self.is_main:
                self.folder.save_environment(describe_environment(self.accelerator))

    def save_page(self) -> None:
        """All of it as a page."""
        with failing_together():
            if self.is_main:
                write_report(self.folder.path)

    def save_curves(self) -> None:
        """The metrics so far as a picture."""
        with failing_together():
            if self.is_main:
                save_curves(self.folder.read_metrics(), self.folder.path / "curves.png")

    def save_samples(self, name: str | None = None) -> None:
        """A grid of samples, if they are finite; a run does not end for a picture."""
        name = name or f"samples/{self.state.images:012d}.png"
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
            except (NonFiniteSampleError, RootError) as error:
                say(f"WARNING: {error} There is no picture {path}.")
            else:
                grid = np.asarray(Image.open(path))
                log_picture(self.accelerator, "samples", grid, self.state.images)

    def _refuse_untrusted(self, result: Evaluation) -> None:
        limits = self.config.evaluate
        refuse_untrusted(result, limits.round_trip_limit, limits.solver_gap_limit)

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
