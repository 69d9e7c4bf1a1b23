"""SIGKILL at random moments of sampling: every image once, whole, whoever made it."""

import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import webdataset
import yaml

from glowscale.data.tar import read_samples
from tests.conftest import Caller, Runner, job_command, job_environment


@pytest.fixture
def trained(config_dict: dict[str, Any], tmp_path: Path, call_job: Caller) -> Path:
    config_dict["train"]["images"] = 16
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    assert call_job("train.py", tmp_path / "c.yaml")[0] == 0
    return tmp_path / "run"


def images_of(out: Path) -> dict[str, bytes]:
    """PNGs by key, of shards that are whole; no key twice."""
    shards = sorted(out.glob("*.tar"))
    found: dict[str, bytes] = {}
    for shard in shards:
        with shard.open("rb") as file:
            keys = [sample.key for sample in read_samples(file, shard.name)]
        assert not found.keys() & set(keys)
        dataset = webdataset.WebDataset(str(shard), shardshuffle=False)
        found |= {sample["__key__"]: sample["png"] for sample in dataset}
    return found


def kill_and_finish(run: Path, out: Path, count: int, size: int, kills: int) -> int:
    """Sample with so many kills on the way; return how many hit the job at work."""
    arguments = ["--count", str(count), "--shard-size", str(size), "--out", str(out)]
    command = [*job_command("sample.py"), str(run), *arguments]
    rng, hits = random.Random(kills), 0

    def start() -> "subprocess.Popen[bytes]":
        return subprocess.Popen(command, env=job_environment(), stderr=subprocess.DEVNULL)

    while hits < kills:
        process = start()
        shards = len([*out.glob("*.tar")])
        while len([*out.glob("*.tar")]) == shards and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        hits += process.poll() is None
        process.kill()
        process.wait()
        images_of(out)  # what is there is whole
        if process.returncode == 0:
            break
    assert start().wait() == 0
    return hits


@pytest.mark.long
def test_sampling_killed_at_twenty_moments_makes_every_image_once(
    trained: Path, tmp_path: Path, near_job: Runner
) -> None:
    near_job("sample.py", trained, "--count", 6000, "--out", tmp_path / "whole")
    hits = kill_and_finish(trained, tmp_path / "killed", 6000, 30, kills=20)
    assert hits == 20
    assert images_of(tmp_path / "killed") == images_of(tmp_path / "whole")
    assert not [*(tmp_path / "killed").glob("*.partial")]


@pytest.mark.long
def test_a_thousand_images_are_the_same_however_the_work_is_shared(
    trained: Path, tmp_path: Path, run_job: Runner, near_job: Runner
) -> None:
    common = ["--count", 1000, "--shard-size", 100, "--seed", 5]
    near_job("sample.py", trained, *common, "--out", tmp_path / "one")
    run_job("sample.py", trained, *common, "--out", tmp_path / "two", processes=2)
    out = tmp_path / "array"
    for part in (0, 1, 3):
        near_job("sample.py", trained, *common, "--out", out, "--part", part, "--parts", 4)
    command = [*job_command("sample.py"), str(trained), "--out", str(out), "--part", "2"]
    command += ["--parts", "4", *map(str, common)]
    process = subprocess.Popen(command, env=job_environment(), stderr=subprocess.DEVNULL)
    while not (out / "shard-000002.tar").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    near_job("sample.py", trained, *common, "--out", out, "--part", 2, "--parts", 4)
    images = [images_of(tmp_path / name) for name in ("one", "two", "array")]
    assert sorted(images[0]) == [f"{i:09d}" for i in range(1000)]
    assert images[0] == images[1] == images[2]
