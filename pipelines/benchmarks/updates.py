"""Trainers whose updates are timed on one batch."""

import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from glowscale.config import parse_config
from glowscale.data import Slice
from glowscale.training import Trainer


class Updates:
    """Updates of a trainer on one fixed batch, and their time.

    Args:
        model: the `model` section of a config.
        train: its `train` section, but for the length of the run.
        data: folder of the packed images.
        run: the run's folder.
        accelerator: the processes.
    """

    def __init__(
        self,
        model: dict[str, Any],
        train: dict[str, Any],
        data: Path,
        run: Path,
        accelerator: Accelerator,
    ) -> None:
        config = {
            "run": {"dir": str(run)},
            "data": {"dir": str(data), "lanes": accelerator.num_processes},
            "model": model,
            "train": {"images": 10**9, "init_images": 16, **train},
        }
        self.trainer = Trainer(parse_config(config), accelerator)
        share = train["batch"] // accelerator.num_processes
        start = share * accelerator.process_index
        self.part = Slice(self.trainer.train_shards.read_batch(start, start + share), [])

    def seconds(self, count: int) -> float:
        """The time of so many updates."""
        started = time.perf_counter()
        for _ in range(count):
            self.trainer.update(self.part)
        return time.perf_counter() - started

    def seconds_to_save(self) -> float:
        """How long the start of a save keeps the training waiting."""
        started = time.perf_counter()
        self.trainer.save()
        return time.perf_counter() - started

    def seconds_to_finish_saving(self) -> float:
        """How long the training would wait for the end of a save."""
        started = time.perf_counter()
        self.trainer.finish_saving()
        return time.perf_counter() - started
