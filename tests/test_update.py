"""Updates that are not finite: masked on all processes, told by image and layer, and counted."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn

from glowscale.checkpoint import find_checkpoint
from glowscale.config import parse_config
from glowscale.data import ShardSet, Slice
from glowscale.training import NonFiniteError, Trainer
from tests.conftest import Runner, job_command, job_environment

POISONED = """
import sys
from pathlib import Path
import torch
from glowscale.config import load_config
from glowscale.distributed import start_accelerator
from glowscale.training import Trainer

def poison(layer, args, output):
    z, log_det = output
    bright = args[0].flatten(1).mean(1) > 7.8
    return z, torch.where(bright, torch.inf, log_det)

config = load_config(Path(sys.argv[1]), sys.argv[2:])
trainer = Trainer(config, start_accelerator(config.train.precision))
trainer.state.model.preprocessing.register_forward_hook(poison)
trainer.train()
"""


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def weights_of(run: Path) -> dict[str, Tensor]:
    return load_file(find_checkpoint(run) / "model.safetensors")


def assert_finite_checkpoint(run: Path) -> None:
    for part in ("model", "ema", "optimizer"):
        for value in load_file(find_checkpoint(run) / f"{part}.safetensors").values():
            assert bool(value.isfinite().all())


def test_images_that_break_the_loss_are_masked_alike_on_one_and_two_processes(
    tmp_path: Path, config_dict: dict[str, Any]
) -> None:
    config_dict["train"] |= {"precision": "float64", "masked_limit": 100}
    config_dict["log"]["every"] = 16
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    (tmp_path / "job.py").write_text(POISONED)
    runs = {n: tmp_path / f"processes_{n}" for n in (1, 2)}
    for processes, run in runs.items():
        command = job_command(str(tmp_path / "job.py"), processes)
        result = subprocess.run(
            [*command, str(tmp_path / "c.yaml"), f"run.dir={run}"],
            env=job_environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert "is masked for the training images" in result.stderr
        assert "first in preprocessing (AffinePixels)." in result.stderr
    masked = {n: lines_of(run, "masked") for n, run in runs.items()}
    assert 0 < len(masked[1]) < 15
    assert masked[1] == masked[2]
    images = {line["images"] for line in masked[1]}
    ids = {i for line in masked[1] for i in line["ids"]}
    shards = ShardSet(Path(config_dict["data"]["dir"]) / "train")
    pixels = shards.read_batch(0, 200).images.double().flatten(1).mean(1)
    surely = set(torch.nonzero(pixels > 7.4).flatten().tolist())  # of 7.8, half of it noise
    maybe = set(torch.nonzero(pixels > 6.8).flatten().tolist())
    assert 0 < len(surely) < 20
    assert surely <= ids <= maybe
    for one, two in zip(*(lines_of(run, "train") for run in runs.values()), strict=True):
        assert one["masked_updates"] == two["masked_updates"] == int(one["images"] in images)
        assert (one["bits_per_dim"] is None) == (one["images"] in images)
        if one["bits_per_dim"] is not None:
            assert one["bits_per_dim"] == pytest.approx(two["bits_per_dim"], abs=1e-8)
    one, two = map(weights_of, runs.values())
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=0, atol=1e-8, msg=key)
    assert_finite_checkpoint(runs[2])


def test_an_unstable_setting_shows_its_masked_updates_and_ends_by_their_number(
    config_dict: dict[str, Any], tmp_path: Path, near_job: Runner
) -> None:
    """Unbounded scales, a high rate, no warm-up and no clipping: known to blow up."""
    config_dict["model"] |= {"scale": "exponential", "dequantization": {"kind": "uniform"}}
    config_dict["train"] |= {
        "images": 3200,
        "clip": None,
        "masked_limit": 5,
        "optimizer": {"kind": "adamw", "lr": 0.5},
        "schedule": {"warmup_images": 0, "decay": "constant"},
    }
    config_dict["evaluate"]["every"] = 3200
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    result = near_job("train.py", tmp_path / "c.yaml", check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: 5 updates in a row were not finite (train.masked_limit)")
    assert "for the training images" in last
    assert "first in levels.0." in last
    assert last.endswith("or bound the transforms' scale (tanh, sigmoid).")
    run = tmp_path / "run"
    assert len(lines_of(run, "masked")) >= 5
    assert_finite_checkpoint(run)
    bounded = [f"run.dir={tmp_path / 'bounded'}", "model.scale=tanh", "train.optimizer.lr=5e-3"]
    near_job("train.py", tmp_path / "c.yaml", *bounded, "train.images=320")
    assert not lines_of(tmp_path / "bounded", "masked")


def break_gradients(trainer: Trainer) -> None:
    """Make a gradient infinite although every loss is finite."""
    parameter = trainer.state.model.prior.mean
    assert isinstance(parameter, nn.Parameter)
    parameter.register_hook(lambda gradient: gradient * float("inf"))


def test_masked_updates_leave_weights_and_optimizer_alone(
    config_dict: dict[str, Any], tmp_path: Path
) -> None:
    config_dict["checkpoint"] = {"every": 16, "keep": 1}
    config_dict["train"]["masked_limit"] = 5
    trainer = Trainer(parse_config(config_dict), Accelerator(cpu=True))
    before = {key: value.clone() for key, value in trainer.state.tensors()["model"].items()}
    break_gradients(trainer)
    with pytest.raises(NonFiniteError, match=r"first in the gradient of prior\.mean"):
        trainer.train()
    assert trainer.state.images == 80  # the fifth masked one is known a step later
    after = trainer.state.tensors()
    assert all(torch.equal(before[key], value) for key, value in after["model"].items())
    assert not any(value.any() for value in after["optimizer"].values())
    assert_finite_checkpoint(tmp_path / "run")


def test_the_count_in_a_row_goes_on_after_a_restart(
    config_dict: dict[str, Any], tmp_path: Path
) -> None:
    config_dict["train"] |= {"masked_limit": 5, "images": 48}
    config_dict["checkpoint"] = {"every": 48, "keep": 1}
    trainer = Trainer(parse_config(config_dict), Accelerator(cpu=True))
    break_gradients(trainer)
    trainer.train()  # three masked updates
    AcceleratorState._reset_state(reset_partial_state=True)
    config_dict["train"]["images"] = 320
    resumed = Trainer(parse_config(config_dict), Accelerator(cpu=True))
    break_gradients(resumed)
    with pytest.raises(NonFiniteError, match=r"5 updates in a row .* the last at image 80,"):
        resumed.train()


def test_weights_that_are_not_finite_are_never_saved(
    config_dict: dict[str, Any], tmp_path: Path
) -> None:
    trainer = Trainer(parse_config(config_dict), Accelerator(cpu=True))
    with torch.no_grad():
        trainer.state.model.prior.mean.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"tensor model/prior\.mean is not finite"):
        trainer.train()
    assert_finite_checkpoint(tmp_path / "run")
    assert lines_of(tmp_path / "run", "masked")[0]["place"] == "prior (Gaussian)"


def test_the_loss_is_weighted_by_the_images_that_are_there(
    config_dict: dict[str, Any], tmp_path: Path
) -> None:
    """A batch of 16 with four holes gives the update of a batch of 12."""
    config_dict["train"] |= {
        "precision": "float64",
        "clip": None,
        "schedule": {"decay": "constant"},
    }
    config_dict["data"]["lost_limit"] = 1
    shards = ShardSet(Path(config_dict["data"]["dir"]) / "train")
    weights, norms = [], []
    for batch in (16, 12):
        config_dict["run"]["dir"] = str(tmp_path / f"batch_{batch}")
        config_dict["train"]["batch"] = batch
        trainer = Trainer(parse_config(config_dict), Accelerator(cpu=True))
        norms.append(float(trainer.update(Slice(shards.read_batch(0, 12), []))))
        weights.append(trainer.state.model.state_dict())
        assert trainer.state.window[1] == 12
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=0, atol=1e-12, msg=key)


def test_a_batch_of_holes_alone_changes_nothing(config_dict: dict[str, Any]) -> None:
    config_dict["data"]["lost_limit"] = 1
    trainer = Trainer(parse_config(config_dict), Accelerator(cpu=True))
    before = {key: value.clone() for key, value in trainer.state.model.state_dict().items()}
    shards = ShardSet(Path(config_dict["data"]["dir"]) / "train")
    trainer.update(Slice(shards.batch([], [], []), []))
    after = trainer.state.model.state_dict()
    assert all(torch.equal(before[key], value) for key, value in after.items())
    assert trainer.state.images == 16
