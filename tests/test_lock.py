"""The lock of a run folder, held and lost by real processes."""

import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from glowscale.training.lock import LOCK, LockedError, RunLock
from tests.conftest import Runner, job_command, job_environment

HOLD = """
import sys, time
from pathlib import Path
from glowscale.training.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_live_holder_is_named_and_a_killed_one_is_recognised_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(
        LockedError, match=f"{tmp_path} is being trained in by process {holder.pid}"
    ):
        RunLock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    started = time.monotonic()
    lock = RunLock(tmp_path)
    assert time.monotonic() - started < 2
    lock.release()
    assert not (tmp_path / LOCK).exists()


def test_a_reused_process_number_does_not_hold_a_dead_ones_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.release()
    (tmp_path / LOCK).write_text(json.dumps(lock.identity | {"started": 1.0, "token": "old"}))
    taken = RunLock(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text()) == taken.identity
    taken.release()


def test_another_hosts_lock_counts_by_its_heartbeat(tmp_path: Path) -> None:
    foreign = {"host": "elsewhere", "process": 7, "started": 1.0, "token": "x"}
    path = tmp_path / LOCK
    path.write_text(json.dumps(foreign))
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            path.touch()

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(LockedError, match="process 7 on elsewhere"):
        RunLock(tmp_path, stale_seconds=2)
    stop.set()
    thread.join()
    RunLock(tmp_path, stale_seconds=0.5).release()


def test_only_one_of_many_takes_over_a_dead_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(
        json.dumps({"host": "elsewhere", "process": 7, "started": 1.0, "token": "x"})
    )

    def attempt(_: int) -> RunLock | None:
        try:
            return RunLock(tmp_path, stale_seconds=0.3)
        except LockedError:
            return None

    with ThreadPoolExecutor(8) as pool:
        locks = [lock for lock in pool.map(attempt, range(8)) if lock]
    assert len(locks) == 1
    assert json.loads((tmp_path / LOCK).read_text())["token"] == locks[0].identity["token"]
    locks[0].release()


def test_a_second_trainer_is_kept_out_of_a_run(
    config_dict: dict[str, Any], tmp_path: Path, run_job: Runner
) -> None:
    config_dict["train"]["images"] = 160_000
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    command = [*job_command("train.py"), str(tmp_path / "c.yaml")]
    first = subprocess.Popen(command, env=job_environment(), stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "run" / "checkpoints" / "latest.json").exists():
            assert first.poll() is None
            time.sleep(0.05)
        second = run_job("train.py", tmp_path / "c.yaml", processes=2, check=False)
        assert second.returncode != 0
        assert f"is being trained in by process {first.pid} on" in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
