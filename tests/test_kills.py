"""SIGKILL at random moments: whenever it comes, the run ends as if it had never come."""

import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from glowscale.checkpoint import images_reached, resume_checkpoint
from tests.conftest import Runner, assert_same_run, job_command, job_environment

AFTER_A_STEP, IN_A_SAVE, ANYWHERE = "after a step", "in a save", "anywhere"


def config_of(
    config_dict: dict[str, Any], folder: Path, images: int, optimizer: str = "adamw"
) -> Path:
    """A run that saves and logs so often that a kill is always near something."""
    config_dict["train"] |= {"images": images}
    config_dict["train"]["optimizer"] |= {"kind": optimizer}
    config_dict["checkpoint"] = {"every": 64, "keep": 2, "keep_every": 640}
    config_dict["log"] = {"every": 16}
    config_dict["evaluate"] |= {"every": images // 2}
    config_dict["samples"] |= {"every": images // 2}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config_dict))
    return path


@contextmanager
def training(config: Path, run: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A training that is killed at the end of the block."""
    process = subprocess.Popen(
        [*job_command("train.py"), str(config), f"run.dir={run}"],
        env=job_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def kill_once(config: Path, run: Path, moment: str, rng: random.Random) -> str:
    """Start the training, kill it, and tell where that was; "finished" if it came too late."""
    checkpoints, metrics = run / "checkpoints", run / "metrics.jsonl"
    reached = images_reached(run)

    def stepped() -> bool:
        """Whether this process has made a step of its own: a line beyond the checkpoint's."""
        lines = metrics.read_bytes().splitlines() if metrics.exists() else []
        return bool(lines) and int(lines[-1].split(b'"images": ')[1].split(b",")[0]) > reached

    with training(config, run) as process:
        if moment == ANYWHERE:
            time.sleep(rng.uniform(0.0, 6.0))
            return ANYWHERE if process.poll() is None else "finished"
        while not stepped():
            if process.poll() is not None:
                return "finished"
            time.sleep(0.001)
        if moment == AFTER_A_STEP:
            time.sleep(rng.uniform(0.0, 0.5))
            return AFTER_A_STEP if process.poll() is None else "finished"
        while not any(checkpoints.glob("*.partial")):
            if process.poll() is not None:
                return "finished"
        time.sleep(rng.uniform(0.0, 0.004))
    # What the save left behind tells that it was killed within it.
    return IN_A_SAVE if any(checkpoints.glob("*.partial")) else AFTER_A_STEP


def survive(config: Path, folder: Path, wanted: dict[str, int], run_job: Runner) -> dict[str, int]:
    """Kill a run that often at each kind of moment, let it end, compare; how often it was."""
    whole, run = folder / "whole", folder / "killed"
    run_job("train.py", config, f"run.dir={whole}")
    rng = random.Random(0)
    seen = dict.fromkeys(wanted, 0)
    begun = False
    while any(seen[moment] < count for moment, count in wanted.items()):
        moment = rng.choice([m for m, count in wanted.items() if seen[m] < count])
        where = kill_once(config, run, moment, rng)
        assert where != "finished", f"the run is too short: {seen}"
        seen[where] += 1
        newest = resume_checkpoint(run / "checkpoints")
        assert newest is not None or not begun, "there was a valid checkpoint, and is none"
        begun = newest is not None
    assert images_reached(run) < images_reached(whole)
    run_job("train.py", config, f"run.dir={run}", "data.workers=2")
    assert_same_run(whole, run)
    assert (run / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()
    names = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (whole, run)]
    assert names[0] == names[1]
    return seen


def test_killed_runs_end_as_the_uninterrupted_one(
    config_dict: dict[str, Any], tmp_path: Path, run_job: Runner
) -> None:
    config = config_of(config_dict, tmp_path, 1280)
    survive(config, tmp_path, {IN_A_SAVE: 2, AFTER_A_STEP: 2}, run_job)


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["adamw", "adamax"])
def test_fifty_kills(
    optimizer: str, config_dict: dict[str, Any], tmp_path: Path, run_job: Runner
) -> None:
    """Of both halves together 50, 40 of them after the first new step and 10 within a save."""
    config = config_of(config_dict, tmp_path, 12_800, optimizer)
    wanted = {ANYWHERE: 5, AFTER_A_STEP: 15, IN_A_SAVE: 5}
    print(optimizer, survive(config, tmp_path, wanted, run_job))
