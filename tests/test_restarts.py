"""Jobs that a scheduler starts again and again."""

from pathlib import Path

import pytest

from glowscale.restarts import LIMIT, StandstillError, refuse_standstill, restarts


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, count: int, progress: int) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))
    assert restarts() == count
    refuse_standstill(folder, progress, "images")


def test_a_job_gives_up_where_it_stood_too_often(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    course = [0, 100, 100, 100, 200, 200, 200]
    for count, progress in enumerate(course):
        start(monkeypatch, tmp_path, count, progress)
    with pytest.raises(
        StandstillError, match=rf"Job 17 was started {LIMIT} times with 200 images"
    ):
        start(monkeypatch, tmp_path, len(course), 200)
    # Another job, and one that nobody restarts, begin anew.
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    refuse_standstill(tmp_path, 200, "images")
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    for _ in range(2 * LIMIT):
        refuse_standstill(tmp_path, 200, "images")
