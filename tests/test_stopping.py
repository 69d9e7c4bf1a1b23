"""Asked to stop by a signal: saved at an agreed step, told by the status, the same run after."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from glowscale.checkpoint import images_reached
from glowscale.stopping import STOPPED
from tests.conftest import Runner, assert_same_run, job_command, job_environment

LINES = "log.every=16"  # a line of metrics every step


@pytest.fixture
def config_path(tmp_path: Path, config_dict: dict[str, Any]) -> Path:
    config_dict["checkpoint"] = {"every": 10_000}  # none but those of stops, and the last
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_dict))
    return path


def metrics(run: Path) -> str:
    path = run / "metrics.jsonl"
    return path.read_text() if path.exists() else ""


def start(config: Path, run: Path, *options: object, processes: int = 1) -> subprocess.Popen[str]:
    """Start a training in a process group of its own."""
    return subprocess.Popen(
        [*job_command("train.py", processes), str(config), f"run.dir={run}", *map(str, options)],
        env=job_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def stop_when(
    ready: Callable[[], bool], process: subprocess.Popen[str], send: Callable[[], None]
) -> tuple[int, str]:
    """Signal a training when something is so; its status and what it said."""
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    send()
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.parametrize(
    ("number", "to_group", "workers"),
    [(signal.SIGUSR1, False, 0), (signal.SIGTERM, True, 2)],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    number: signal.Signals,
    to_group: bool,
    workers: int,
    config_path: Path,
    tmp_path: Path,
    near_job: Runner,
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "stopped"
    near_job("train.py", config_path, f"run.dir={whole}", LINES)
    process = start(config_path, run, LINES, f"data.workers={workers}")
    status, said = stop_when(
        lambda: '"images": 48' in metrics(run),
        process,
        lambda: (os.killpg if to_group else os.kill)(process.pid, number),
    )
    assert status == STOPPED, said
    sentence = rf"Stopped: {number.name} asked for it at image (\d+) of 320; all is saved in "
    found = re.search(sentence + re.escape(str(run)), said)
    assert found, said
    assert 48 <= int(found[1]) == images_reached(run) < 320
    assert not (run / "lock.json").exists()
    near_job("train.py", config_path, f"run.dir={run}", LINES)
    assert_same_run(whole, run)


def test_a_stop_within_an_evaluation_repeats_it(
    config_path: Path, tmp_path: Path, near_job: Runner
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "stopped"
    slow = ["evaluate.batch=1", "evaluate.importance_samples=10", "data.workers=0"]
    near_job("train.py", config_path, f"run.dir={whole}", LINES, *slow)
    process = start(config_path, run, LINES, *slow)

    def evaluating() -> bool:
        return '"images": 160' in metrics(run)  # its own line comes when it is over

    status, said = stop_when(evaluating, process, lambda: process.send_signal(signal.SIGUSR1))
    assert status == STOPPED
    assert "at image 160 of 320" in said
    assert '"held_out"' not in metrics(run)
    near_job("train.py", config_path, f"run.dir={run}", LINES, *slow)
    assert '"held_out"' in metrics(run)
    assert_same_run(whole, run)
    name = "samples/000000000160.png"
    assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_processes_agree_where_one_of_them_is_asked(
    config_path: Path, tmp_path: Path, run_job: Runner
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "stopped"
    run_job("train.py", config_path, f"run.dir={whole}", LINES, processes=2)
    process = start(config_path, run, LINES, processes=2)

    def ask_the_last() -> None:
        ranks = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(ranks[-1]), signal.SIGUSR1)

    status, said = stop_when(lambda: '"images": 48' in metrics(run), process, ask_the_last)
    assert status == 1  # the launcher's own; those of the processes are in what it says
    assert re.search(r"exitcode +: 75", said)
    assert "Stopped: " in said
    assert 48 <= images_reached(run) < 320
    run_job("train.py", config_path, f"run.dir={run}", LINES, processes=2)
    assert_same_run(whole, run)


def test_a_launcher_that_is_terminated_lets_its_processes_save(
    config_path: Path, tmp_path: Path
) -> None:
    run = tmp_path / "stopped"
    process = start(config_path, run, LINES, processes=2)
    status, said = stop_when(
        lambda: '"images": 48' in metrics(run), process, lambda: process.terminate()
    )
    assert status != 0
    assert "Stopped: SIGTERM asked for it" in said
    assert 48 <= images_reached(run) < 320


def test_before_the_first_step_a_signal_ends_the_process_as_ever(
    config_path: Path, tmp_path: Path
) -> None:
    run = tmp_path / "stopped"
    process = start(config_path, run)
    status, _ = stop_when((run / "lock.json").exists, process, process.terminate)
    assert status in (-signal.SIGTERM, STOPPED)  # it may just have begun
