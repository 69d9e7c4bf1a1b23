"""The run folder: its config, metrics, pictures and checkpoints."""

import json
import math
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from glowscale.checkpoint import Checkpoint, resume_checkpoint, save_checkpoint
from glowscale.config import Config, ConfigError, differences, parse_config
from glowscale.data import Manifest
from glowscale.evaluation import Evaluation
from glowscale.files import naming, read_lines, sync, write_atomically
from glowscale.training.saver import Parts

FREE_KEYS = (
    "run.dir",
    "data.dir",  # the fingerprint tells whether the images are the same
    "data.source",
    "data.shard_size",
    "data.workers",
    "data.cache",
    "data.transfer",
    "data.lost_limit",
    "train.images",
    "train.micro_batch",
    "train.masked_limit",
    "train.stiff_limit",
    "log",
    "evaluate",
    "samples",
    "checkpoint",
)
"""Config keys, or whole sections, that may change when a run is resumed."""


EVALUATION = "evaluation.json"


def is_finished(config: Config) -> bool:
    """Whether a run has its final figure, after all the images that its config asks for."""
    path = config.run.dir / EVALUATION
    return path.exists() and json.loads(path.read_bytes())["trained_images"] >= config.train.images


class RunFolder:
    """Paths and files of a run. Only the main process writes.

    Args:
        config: the run; its `run.dir` is the folder.
        manifest: the training data.
    """

    def __init__(self, config: Config, manifest: Manifest) -> None:
        self.config = config
        self.manifest = manifest
        self.path = config.run.dir
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.times = self.path / "times.jsonl"
        self._started = time.perf_counter()

    def open(self, images: int, due: Collection[str] = ()) -> None:
        """Make the folder, save the resolved config, drop metrics from after `images`.

        And those kinds of metrics from then that are due again.
        """
        (self.path / "samples").mkdir(parents=True, exist_ok=True)
        content = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        write_atomically(self.path / "config.yaml", content.encode())
        self._rewind(images, due)

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None where there never was one.

        Raises:
            ConfigError: if it is of a run with another config, with one that this version does not
                know any more, or with other data.
            CheckpointError: if there are checkpoints but none verifies.
        """
        checkpoint = resume_checkpoint(self.checkpoints)
        if checkpoint is not None:
            begun = self._complete(checkpoint.state["config"])
            _refuse_changed_config(begun, self.config.model_dump(mode="json"))
            self._refuse_other_data(checkpoint.state["fingerprint"])
        return checkpoint

    def save(self, tensors: Parts, counters: dict[str, Any]) -> None:
        """Write a checkpoint, from which alone the model can be built, and prune older ones."""
        if self.metrics.exists():
            sync(self.metrics)  # a checkpoint covers its metrics
        description = {
            "config": self.config.model_dump(mode="json"),
            "image_shape": self.manifest.image_shape,
            "grey_levels": self.manifest.grey_levels,
            "classes": self.manifest.classes,
            "fingerprint": self.manifest.fingerprint,
            "memory_format": "channels_last",
        }
        save_checkpoint(
            self.checkpoints,
            counters["images"],
            tensors,
            {**counters, **description},
            self.config.checkpoint.keep,
            self.config.checkpoint.keep_every,
        )

    def log(self, kind: str, images: int, values: dict[str, Any], times: dict[str, float]) -> None:
        """Append a line of metrics, which holds no times, and one of times beside it."""
        _append(self.metrics, {"kind": kind, "images": images, **values})
        seconds = round(time.perf_counter() - self._started, 3)
        _append(
            self.times, {"kind": kind, "images": images, "seconds_since_start": seconds, **times}
        )

    def save_evaluation(self, images: int, evaluation: Evaluation) -> None:
        """Write the figure over all held-out images, and after how many training images."""
        content = json.dumps({"trained_images": images, **evaluation.to_dict()}, indent=1)
        write_atomically(self.path / EVALUATION, content.encode())

    def save_environment(self, environment: dict[str, Any]) -> None:
        """Write where the run is made."""
        write_atomically(
            self.path / "environment.json", json.dumps(environment, indent=1).encode()
        )

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics."""
        return read_lines(self.metrics)

    def _rewind(self, images: int, due: Collection[str]) -> None:
        """Drop metrics of work that a kill has undone, so that they read as never interrupted."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # else a kill has cut it short
                record = json.loads(line)
                at, again = record["images"], record["kind"] in due
                if at < images or (at == images and not again):
                    kept.append(line)
        write_atomically(self.metrics, "".join(kept).encode())

    def _complete(self, begun: dict[str, Any]) -> dict[str, Any]:
        """The config that the run began with, and the defaults of keys that are newer than it."""
        try:
            return parse_config(begun).model_dump(mode="json")
        except ConfigError as error:
            first = str(error).partition("\n")[0]
            raise ConfigError(
                f"The run in {self.path} began with a config that this version does not know: "
                f"{first} Go on with the version that began it, or choose another run.dir."
            ) from None

    def _refuse_other_data(self, fingerprint: str) -> None:
        if fingerprint != self.manifest.fingerprint:
            raise ConfigError(
                f"The run in {self.path} was trained on the data {fingerprint[:8]}, but data.dir "
                f"({self.config.data.dir}) holds {self.manifest.fingerprint[:8]}; restore it, or "
                f"choose another run.dir."
            )


def _refuse_changed_config(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to resume under a config that would make it another run; ConfigError."""
    for key, (before, now) in differences(old, new).items():
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS):
            raise ConfigError(
                f"The config key {key!r} was {before!r} when the run began and is {now!r} now; "
                f"restore it or choose another run.dir. On resume only these may change: "
                f"{', '.join(FREE_KEYS)}."
            )


def _append(path: Path, record: dict[str, Any]) -> None:
    """Append a JSON line; numbers that are not finite, which JSON lacks, are null."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    with naming(path), path.open("a") as file:
        file.write(json.dumps(plain) + "\n")
