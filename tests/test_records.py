"""Evaluations that are kept: interrupted, continued, compared; every image has its line."""

import csv
import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from glowscale.data import ShardSet
from glowscale.data.sources import Sample, Split
from glowscale.data.writer import pack_split
from glowscale.dequantization import NoiseAugmentation, VariationalDequantizer
from glowscale.evaluation import (
    ComparisonError,
    Records,
    codec_bits_per_dim,
    compare,
    evaluate,
    score_block,
)
from glowscale.files import ClaimError
from glowscale.models import MultiscaleFlow
from glowscale.stopping import STOPPED, Stopped
from tests.conftest import Runner, job_command, job_environment, last_json, perturb, tiny_glow


@pytest.fixture
def held_out(data_dir: Path) -> ShardSet:
    return ShardSet(data_dir / "test")


@pytest.fixture
def model() -> MultiscaleFlow:
    model = tiny_glow((1, 8, 8), 16, levels=2)
    model.dequantizer = VariationalDequantizer((1, 8, 8), 16, 2, 8, 4)
    perturb(model.dequantizer, 0.2)
    return model


def lines_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "images.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_every_image_has_its_line(
    model: MultiscaleFlow, held_out: ShardSet, tmp_path: Path
) -> None:
    records = Records(tmp_path / "one", {"data": "these"})
    result = evaluate(
        model, held_out, seed=0, batch=10, importance_samples=4, records=records, more=lambda: {}
    )
    lines = lines_of(tmp_path / "one")
    assert [int(line["image"]) for line in lines] == list(range(37))
    block = held_out.read_batch(0, 37)
    with torch.inference_mode():
        nats = score_block(model, block, seed=0, importance_samples=4)
    expected = -nats / (64 * math.log(2))
    found = torch.tensor([float(line["bits_per_dim"]) for line in lines], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert [line["class"] for line in lines] == ["abc"[label] for label in block.labels.tolist()]
    single = [float(line["single_sample_bits_per_dim"]) for line in lines]
    assert result.single_sample_bits_per_dim == pytest.approx(sum(single) / 37)
    alone = evaluate(model, held_out, seed=0, batch=10)
    assert result.single_sample_bits_per_dim == pytest.approx(alone.bits_per_dim, abs=1e-6)
    told = json.loads((tmp_path / "one" / "result.json").read_bytes())
    assert told["bits_per_dim"] == result.bits_per_dim
    assert told["format"] == "glowscale evaluation 1"
    assert not [*(tmp_path / "one").glob("block-*")]


def test_a_stopped_evaluation_goes_on_after_its_last_block(
    model: MultiscaleFlow, held_out: ShardSet, tmp_path: Path
) -> None:
    passes = 0

    def stops_within_the_third_block() -> bool:
        nonlocal passes
        passes += 1
        return passes > 2 * 4 + 2

    options: dict[str, Any] = {"seed": 0, "batch": 10, "importance_samples": 4}
    records = Records(tmp_path, {"data": "these"})
    with pytest.raises(Stopped):
        evaluate(
            model, held_out, **options, stopping=stops_within_the_third_block, records=records
        )
    assert records.blocks == 2
    passes = -100
    result = evaluate(
        model, held_out, **options, stopping=stops_within_the_third_block, records=records
    )
    assert passes == -100 + 2 * 4  # of four blocks two were there
    assert result == evaluate(model, held_out, **options)
    with pytest.raises(ClaimError, match="its data is 'these', not 'others'"):
        Records(tmp_path, {"data": "others"})


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]
)
def test_a_killed_job_goes_on(
    config_dict: dict[str, Any], tmp_path: Path, near_job: Runner, how: signal.Signals
) -> None:
    config_dict["train"]["images"] = 16
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    near_job("train.py", tmp_path / "c.yaml")
    run, out = tmp_path / "run", tmp_path / "evaluation"
    options = ["--batch", "5", "--importance-samples", "50", "--json"]
    command = [*job_command("evaluate.py"), str(run), "--out", str(out), *options]
    process = subprocess.Popen(command, env=job_environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while len(before := [*out.glob("block-*.safetensors")]) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, how)
    assert process.wait() == (STOPPED if how == signal.SIGTERM else -how)
    written = {path: path.stat().st_mtime_ns for path in before}
    assert not (out / "result.json").exists()
    again = subprocess.Popen(command, env=job_environment(), stderr=subprocess.DEVNULL)
    while again.poll() is None:  # blocks that are there stay as they are until all is done
        for path, time_written in written.items():
            if path.exists():
                assert path.stat().st_mtime_ns == time_written
        time.sleep(0.05)
    assert again.returncode == 0
    result = json.loads((out / "result.json").read_bytes())
    whole = last_json(near_job("evaluate.py", run, *options, "--out", tmp_path / "whole"))
    assert result["bits_per_dim"] == whole["bits_per_dim"]
    assert lines_of(out) == lines_of(tmp_path / "whole")


def test_differences_are_paired_and_other_data_refused(
    model: MultiscaleFlow, held_out: ShardSet, data_dir: Path, tmp_path: Path
) -> None:
    def keep(name: str, shards: ShardSet, **options: int) -> Path:
        records = Records(tmp_path / name, {"weights": "ema"})
        evaluate(model, shards, seed=0, records=records, **options)
        return tmp_path / name

    one, many = keep("one", held_out), keep("many", held_out, importance_samples=16)
    found = compare(many, one)
    values = [[float(line["bits_per_dim"]) for line in lines_of(folder)] for folder in (many, one)]
    differences = np.subtract(*values)
    assert found.difference == pytest.approx(differences.mean())
    assert found.standard_error == pytest.approx(differences.std(ddof=1) / 37**0.5)
    assert found.difference < -2 * found.standard_error
    assert "importance_samples 16 and 1" in str(found)
    other = keep("other", ShardSet(data_dir / "train"))
    with pytest.raises(ComparisonError, match="not on the same images: their data is"):
        compare(one, other)
    with pytest.raises(ComparisonError, match="number of images is 37 and 20"):
        compare(one, keep("first", held_out, images=20))
    with pytest.raises(ComparisonError, match="no finished evaluation"):
        compare(one, tmp_path)


def test_figures_of_which_one_bounds_nothing_are_not_compared(
    model: MultiscaleFlow, held_out: ShardSet, tmp_path: Path
) -> None:
    def keep(name: str) -> Path:
        evaluate(model, held_out, seed=0, records=Records(tmp_path / name, {"weights": "ema"}))
        return tmp_path / name

    bound = keep("bound")
    model.dequantizer = NoiseAugmentation(std=2.0)
    noisy, again = keep("noisy"), keep("again")
    sentence = f"{noisy} scores images with noise added, which bounds nothing"
    for pair in ((bound, noisy), (noisy, bound)):
        with pytest.raises(ComparisonError, match=sentence):
            compare(*pair)
    assert compare(noisy, again).difference == 0
    older = json.loads((bound / "result.json").read_bytes())
    del older["is_bound"]
    (bound / "result.json").write_text(json.dumps(older))
    assert compare(bound, bound).difference == 0
    with pytest.raises(ComparisonError, match="cannot be compared"):
        compare(bound, noisy)


def test_codecs_need_what_noise_holds_and_little_for_flat_images(tmp_path: Path) -> None:
    def noise(i: int) -> Sample:
        pixels = np.random.default_rng(i).integers(0, 256, (3, 32, 32), dtype=np.uint8)
        return Sample(f"{i:04d}", pixels, None)

    def flat(i: int) -> Sample:
        return Sample(f"{i:04d}", np.full((3, 32, 32), i, np.uint8), None)

    for name, sample in (("noise", noise), ("flat", flat)):
        pack_split(Split("test", name, (3, 32, 32), 256, (), 20, sample), tmp_path / name, 20)
    noisy = codec_bits_per_dim(ShardSet(tmp_path / "noise"), 10)
    assert set(noisy) == {"png", "webp"}
    assert all(8 < bits < 8.5 for bits in noisy.values())
    assert all(bits < 0.4 for bits in codec_bits_per_dim(ShardSet(tmp_path / "flat"), 10).values())
