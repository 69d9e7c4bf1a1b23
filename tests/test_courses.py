"""Several runs in one picture, over the time that was spent on updates."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from glowscale.courses import read_course
from glowscale.errors import UserError
from tests.conftest import Caller


def write(path: Path, *lines: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_minutes_are_those_of_the_updates_that_count(tmp_path: Path) -> None:
    bits = {600: 5.0, 1200: None, 1500: 4.0}
    train = [{"kind": "train", "images": n, "bits_per_dim": b} for n, b in bits.items()]
    held_out = {"kind": "held_out", "images": 1200, "bits_per_dim": 9.0}
    write(tmp_path / "metrics.jsonl", *train[:2], held_out, train[2])
    speeds = [(600, 10.0), (1200, 99.0), (1200, 5.0), (1500, 2.5)]  # 1200 was done again
    times = [{"kind": "train", "images": n, "images_per_second": v} for n, v in speeds]
    write(tmp_path / "times.jsonl", *times, {"kind": "held_out", "images": 1200})
    assert read_course(tmp_path) == [(1.0, 5.0), (1 + 2 + 2, 4.0)]


def test_a_kill_between_the_two_files_is_borne(tmp_path: Path) -> None:
    line = {"kind": "train", "images": 60, "bits_per_dim": 5.0}
    write(tmp_path / "metrics.jsonl", line, {**line, "images": 120})
    (tmp_path / "times.jsonl").write_text(
        '{"kind": "train", "images": 60, "images_per_second": 1.0}\n{"kind": "tr'
    )
    assert read_course(tmp_path) == [(1.0, 5.0)]


def test_runs_are_drawn_by_their_names_and_others_refused(
    config_dict: dict[str, Any], tmp_path: Path, call_job: Caller
) -> None:
    config_dict["train"]["images"] = 64
    config_dict["log"] = {"every": 16}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    runs = [tmp_path / name for name in ("one", "other")]
    for seed, folder in enumerate(runs):
        changes = (f"run.dir={folder}", f"run.seed={seed}")
        assert call_job("train.py", tmp_path / "c.yaml", *changes)[0] == 0
    courses = [read_course(folder) for folder in runs]
    assert all(0 < minutes[-1][0] < 10 for minutes in courses)
    assert call_job("courses.py", *runs, "--out", tmp_path / "both.png")[0] == 0
    assert call_job("courses.py", runs[0], "--out", tmp_path / "one.png")[0] == 0
    both, one = (np.asarray(Image.open(tmp_path / f"{x}.png")) for x in ("both", "one"))
    assert both.shape == one.shape
    assert (both != one).any()
    with pytest.raises(UserError, match=r"holds no course of a training"):
        read_course(tmp_path)
    status, _, told = call_job("courses.py", tmp_path, "--out", tmp_path / "x.png")
    assert (status, told.count("\n")) == (1, 0)
    assert not (tmp_path / "x.png").exists()
