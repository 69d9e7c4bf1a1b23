"""The run folder: its config, metrics, pictures and checkpoints."""

import json
import time
from pathlib import Path
from typing import Any

import yaml

from glowscale.config import Config, ConfigError, differences
from glowscale.files import sync, write_atomically

FREE_KEYS = (
    "run.dir",
    "data.dir",  # the fingerprint tells whether the images are the same
    "data.source",
    "data.shard_size",
    "data.workers",
    "train.images",
    "train.micro_batch",
    "log",
    "evaluate",
    "samples",
    "checkpoint",
)
"""Config keys, or whole sections, that may change when a run is resumed."""


class RunFolder:
    """Paths and files of a run. Only the main process writes.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.times = path / "times.jsonl"
        self._started = time.perf_counter()

    def open(self, config: Config) -> None:
        """Make the folder and save the resolved config."""
        (self.path / "samples").mkdir(parents=True, exist_ok=True)
        content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        write_atomically(self.path / "config.yaml", content.encode())

    def log(self, kind: str, images: int, **values: float | None) -> None:
        """Append a line of metrics, which holds no times, and one of times beside it."""
        _append(self.metrics, {"kind": kind, "images": images, **values})
        seconds = round(time.perf_counter() - self._started, 3)
        _append(self.times, {"kind": kind, "images": images, "seconds_since_start": seconds})

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    def rewind(self, images: int) -> None:
        """Drop metrics of work that a kill has undone, so that they read as never interrupted."""
        if self.metrics.exists():
            lines = self.metrics.read_text().splitlines(keepends=True)
            # A line that a kill cut short has no line end.
            kept = [x for x in lines if x.endswith("\n") and json.loads(x)["images"] <= images]
            write_atomically(self.metrics, "".join(kept).encode())

    def sync(self) -> None:
        """Make the metrics durable, before a checkpoint that covers them."""
        if self.metrics.exists():
            sync(self.metrics)


def refuse_changed_config(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to resume under a config that would make it another run; ConfigError."""
    for key, (before, now) in differences(old, new).items():
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS):
            raise ConfigError(
                f"The config key {key!r} was {before!r} when the run began and is {now!r} now; "
                f"restore it or choose another run.dir. On resume only these may change: "
                f"{', '.join(FREE_KEYS)}."
            )


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
