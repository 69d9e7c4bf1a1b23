"""Training as users run it: killed, resumed, on several processes, always the same weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from glowscale.config import ConfigError, parse_config
from glowscale.distributed import LaunchError, start_accelerator
from glowscale.models import MultiscaleFlow
from glowscale.training import Trainer
from glowscale.training.ema import EMA
from glowscale.training.optimizer import learning_rate
from glowscale.training.update import DriftError
from tests.conftest import (
    Runner,
    final_tensors,
    tiny_glow,
)


@pytest.fixture
def config_path(tmp_path: Path, config_dict: dict[str, Any]) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_dict))
    return path


def test_a_longer_run_continues_a_finished_one(
    config_path: Path, tmp_path: Path, near_job: Runner
) -> None:
    constant = "train.schedule.decay=constant"
    whole, longer = f"run.dir={tmp_path / 'whole'}", f"run.dir={tmp_path / 'longer'}"
    near_job("train.py", config_path, whole, constant, "train.images=128")
    near_job("train.py", config_path, longer, constant, "train.images=64")
    near_job("train.py", config_path, longer, constant, "train.images=128")
    a, b = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "longer")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_two_processes_train_as_one(
    config_path: Path, tmp_path: Path, run_job: Runner, near_job: Runner
) -> None:
    runs = {n: tmp_path / f"processes_{n}" for n in (1, 2)}
    options = ["train.precision=float64", "log.every=16", "checkpoint.keep=99"]
    near_job("train.py", config_path, f"run.dir={runs[1]}", *options)
    run_job("train.py", config_path, f"run.dir={runs[2]}", *options, processes=2)
    lines = {
        n: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for n, run in runs.items()
    }
    steps = [line for line in lines[1] if line["kind"] == "train"]
    assert len(steps) == 20
    for one, two in zip(lines[1], lines[2], strict=True):
        assert one.pop("kind") == two.pop("kind")
        assert one == pytest.approx(two, rel=0, abs=1e-8)
    for images in (0, 320):  # ActNorm's parameters after their initialization; the end
        one, two = (
            load_file(runs[n] / "checkpoints" / f"images-{images:012d}" / "model.safetensors")
            for n in (1, 2)
        )
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-8, msg=key)


def test_inverting_on_two_processes_trains_as_storing_on_one(
    config_dict: dict[str, Any], tmp_path: Path, run_job: Runner, near_job: Runner
) -> None:
    config_dict["model"]["class_channels"] = 4
    config_dict["train"] |= {"precision": "float64", "images": 160}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    runs = [tmp_path / "stored", tmp_path / "inverted"]
    near_job("train.py", tmp_path / "c.yaml", f"run.dir={runs[0]}")
    options = ["train.activations=invert", "train.micro_batch=3", "log.every=16"]
    run_job("train.py", tmp_path / "c.yaml", f"run.dir={runs[1]}", *options, processes=2)
    one, other = map(final_tensors, runs)
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=1e-8, msg=key)
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    drifts = [line["drift"] for line in lines if line["kind"] == "train"]
    assert all(0 < drift < 1e-10 for drift in drifts)


def test_activations_that_drift_end_the_run_before_they_reach_the_weights(
    config_dict: dict[str, Any], tmp_path: Path
) -> None:
    config_dict["train"] |= {"activations": "invert", "drift_limit": 1e-12}
    trainer = Trainer(parse_config(config_dict), start_accelerator())
    before = {key: x.clone() for key, x in trainer.state.model.state_dict().items()}
    with pytest.raises(DriftError, match=r"At image 16 the input of levels\.1\.bijections\.[12] "):
        trainer.train()
    for key, value in trainer.state.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    content = json.loads(json.dumps(config_dict))
    content["model"] = {"family": "ffjord", "levels": 1, "hidden_channels": [4]}
    content["run"]["dir"] = str(tmp_path / "continuous")
    with pytest.raises(ConfigError, match=r"train\.activations must be 'store', not 'invert'"):
        Trainer(parse_config(content), start_accelerator())


def test_a_run_may_go_on_with_another_number_of_processes(
    config_path: Path, tmp_path: Path, run_job: Runner, near_job: Runner
) -> None:
    options = ["train.precision=float64", "train.schedule.decay=constant", "log.every=16"]
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    near_job("train.py", config_path, f"run.dir={whole}", *options)
    for processes, images in ((2, 96), (1, 208), (2, 320)):
        command = [config_path, f"run.dir={changed}", *options, f"train.images={images}"]
        run_job("train.py", *command, processes=processes)
    one, other = (final_tensors(run) for run in (whole, changed))
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=1e-8, msg=key)
    steps = [
        [
            x
            for x in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            if x.pop("kind") == "train"
        ]
        for run in (whole, changed)
    ]
    assert len(steps[0]) == 20
    for a, b in zip(*steps, strict=True):
        assert a == pytest.approx(b, rel=0, abs=1e-8)


def test_accumulation_gives_the_gradients_of_the_whole_batch(
    config_dict: dict[str, Any], tmp_path: Path
) -> None:
    def train(micro_batch: int | None) -> MultiscaleFlow:
        content = json.loads(json.dumps(config_dict))
        content["run"]["dir"] = str(tmp_path / f"micro_{micro_batch}")
        content["train"] |= {"micro_batch": micro_batch, "precision": "float64", "images": 80}
        trainer = Trainer(parse_config(content), Accelerator(cpu=True))
        trainer.train()
        return trainer.state.model

    whole, parts = train(None), train(3)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=name)


def test_bf16_trains_networks_in_bf16_and_keeps_float32_weights(
    config_dict: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config_dict["train"] |= {"precision": "bf16", "images": 64}
    with pytest.raises(ConfigError, match=r"train\.precision is 'bf16', but Accelerate"):
        Trainer(parse_config(config_dict), Accelerator(cpu=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(parse_config(config_dict), start_accelerator("bf16"))
    dtypes: set[torch.dtype] = set()
    network = trainer.state.model.levels[0].bijections[1].bijections[2].network
    run = network.differentiate

    def note(x: Tensor, context: Tensor | None = None) -> Any:  # noqa: ANN401
        y, pullback = run(x, context)
        dtypes.add(y.dtype)
        return y, pullback

    monkeypatch.setattr(network, "differentiate", note)
    evaluation = trainer.train()
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in trainer.state.model.parameters()} == {torch.float32}
    assert 0 < evaluation.bits_per_dim < 8


def test_training_learns(config_dict: dict[str, Any]) -> None:
    config_dict["train"] |= {"images": 1600}
    trainer = Trainer(parse_config(config_dict), Accelerator(cpu=True))
    before = trainer.reports.evaluate().bits_per_dim
    after = trainer.train().bits_per_dim
    assert after < before - 0.3


def test_a_changed_config_is_refused_by_key(
    config_path: Path, near_job: Runner, tmp_path: Path
) -> None:
    near_job("train.py", config_path, "train.images=16")
    changed = near_job("train.py", config_path, "model.depth=3", check=False)
    assert changed.returncode == 1
    assert "'model.depth' was 2 when the run began and is 3 now" in changed.stderr
    assert "Traceback" not in changed.stderr


def test_other_data_on_resume_are_refused(
    config_dict: dict[str, Any], data_dir: Path, tmp_path: Path
) -> None:
    config_dict["train"]["images"] = 16
    Trainer(parse_config(config_dict), Accelerator(cpu=True)).train()
    config_dict["data"]["train_split"] = "test"
    with pytest.raises(ConfigError, match=r"'data\.train_split' was 'train'"):
        Trainer(parse_config(config_dict), Accelerator(cpu=True))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train").symlink_to(data_dir / "test")
    (tmp_path / "other" / "test").symlink_to(data_dir / "test")
    config_dict["data"] |= {"train_split": "train", "dir": str(tmp_path / "other")}
    with pytest.raises(ConfigError, match="was trained on the data"):
        Trainer(parse_config(config_dict), Accelerator(cpu=True))


def test_a_process_count_that_does_not_fit_is_refused_before_the_folder_is_touched(
    config_path: Path, tmp_path: Path, run_job: Runner
) -> None:
    result = run_job("train.py", config_path, "data.lanes=1", processes=2, check=False)
    assert result.returncode != 0
    assert "2 processes cannot share 1 lanes evenly" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_launcher_whose_processes_do_not_join_is_refused(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_job: Runner
) -> None:
    Accelerator(cpu=True)  # this process is alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match=r"2 processes \(WORLD_SIZE\), but Accelerate joined 1"):
        start_accelerator()
    result = run_job("train.py", config_path, check=False)  # and none of a launcher's addresses
    assert result.returncode == 1
    assert "Error: Accelerate cannot start with WORLD_SIZE=2" in result.stderr
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_a_shard_reaches_the_user_through_workers(
    config_path: Path, config_dict: dict[str, Any], tmp_path: Path, run_job: Runner
) -> None:
    shutil.copytree(config_dict["data"]["dir"], tmp_path / "data")
    shard = tmp_path / "data" / "train" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:9000])
    overrides = [f"data.dir={tmp_path / 'data'}", "data.workers=2"]
    result = run_job("train.py", config_path, *overrides, check=False)
    assert result.returncode == 1
    sentence = f"Error: {shard} has 9000 bytes; the manifest says "
    assert result.stderr.splitlines()[-1].startswith(sentence)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_the_learning_rate_depends_on_images_alone(decay: str) -> None:
    def rate(images: int) -> float:
        return learning_rate(images, 1000, 0.1, 200, decay, 0.5)

    assert [rate(n) for n in (50, 100, 200)] == pytest.approx([0.025, 0.05, 0.1])
    assert rate(600) == pytest.approx(0.1 if decay == "constant" else 0.075)
    assert rate(1000) == pytest.approx(0.1 if decay == "constant" else 0.05)
    assert learning_rate(10, 1000, 0.1, 0, decay, 0.5) == pytest.approx(0.1, rel=1e-3)


def test_the_average_forgets_by_images_not_by_steps() -> None:
    def average(batch: int) -> float:
        model = tiny_glow()
        ema = EMA(model, images=1000)
        with torch.no_grad():
            before = model.prior.mean.clone()
            model.prior.mean += 1
            for seen in range(100_000, 100_000 + 2000, batch):
                ema.update(batch, seen)
        return float((ema.model.prior.mean - before).mean())

    assert average(10) == pytest.approx(1 - 2.718281828**-2, abs=1e-4)
    assert average(500) == pytest.approx(average(10), abs=1e-4)
