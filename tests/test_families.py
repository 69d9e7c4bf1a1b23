"""Models of all families as users run them: trained, resumed, evaluated, sampled and guided."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from webdataset import WebDataset

from glowscale import load
from glowscale.bijections import Guidance, guiding
from glowscale.checkpoint import load_model
from glowscale.data.images import decode_png
from glowscale.errors import UserError
from glowscale.models.assembly import assemble
from glowscale.sampling import inverting
from tests.conftest import Runner, last_json, perturb

SQUEEZE: dict[str, Any] = {"kind": "squeeze"}
CAUSAL = {
    "kind": "autoregressive",
    "depth": 2,
    "transform": {"kind": "gaussian"},
    "network": {"kind": "causal_transformer", "hidden_channels": 8, "blocks": 1, "heads": 2},
}
MASKED = {
    **CAUSAL,
    "transform": {"kind": "mixture", "components": 3},
    "network": {"kind": "masked_convolutional", "hidden_channels": 6, "blocks": 1},
}
GATED = {
    "kind": "coupling",
    "mask": "checkerboard",
    "transform": {"kind": "mixture", "components": 2},
    "network": {"kind": "gated", "hidden_channels": 8, "blocks": 1},
}
TRANSFORMER = {
    **GATED,
    "mask": "channels",
    "transform": {"kind": "spline", "bins": 4},
    "network": {"kind": "transformer", "hidden_channels": 8, "blocks": 1, "heads": 2},
}
RECURSIVE = {
    "kind": "recursive",
    "recursions": 2,
    "transform": {"kind": "affine"},
    "network": {"kind": "convolutional", "hidden_channels": 8},
}
CONTINUOUS = {
    "kind": "continuous",
    "hidden_channels": [6],
    "gradient": "direct",
    "solver": {"method": "rk4", "steps": 2},
}


def config_of(config_dict: dict[str, Any], levels: list[Any], **model: object) -> dict[str, Any]:
    config = copy.deepcopy(config_dict)
    dequantization = config["model"]["dequantization"]
    config["model"] = {"family": "multiscale", "levels": levels, "dequantization": dequantization}
    config["model"] |= model
    config["train"]["optimizer"]["lr"] = 2e-3
    return config


def write(config: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def all_kinds(config_dict: dict[str, Any]) -> dict[str, Any]:
    levels = [[GATED, SQUEEZE, TRANSFORMER, RECURSIVE], [SQUEEZE, CAUSAL, MASKED, CONTINUOUS]]
    config = config_of(config_dict, levels)
    config["train"] |= {"images": 128, "schedule": {"decay": "constant"}}
    return config


def test_all_kinds_of_flow_train_in_one_model_and_resume_to_the_same_bits(
    all_kinds: dict[str, Any], tmp_path: Path, near_job: Runner
) -> None:
    path = write(all_kinds, tmp_path / "c.yaml")
    straight = last_json(near_job("train.py", path, "--json"))
    in_parts = [path, f"run.dir={tmp_path / 'parts'}"]
    near_job("train.py", *in_parts, "train.images=64")
    resumed = last_json(near_job("train.py", *in_parts, "--json"))
    assert resumed["bits_per_dim"] == straight["bits_per_dim"]
    one, other = (load_model(tmp_path / run)[0].state_dict() for run in ("run", "parts"))
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    scored = last_json(near_job("evaluate.py", tmp_path / "run", "--json"))
    assert scored["bits_per_dim"] == pytest.approx(straight["bits_per_dim"], abs=1e-6)
    assert scored["prior_round_trip_error"] < 0.1


@pytest.fixture
def guided_run(config_dict: dict[str, Any], tmp_path: Path, near_job: Runner) -> Path:
    """A small conditional transformer flow that knows images of no class."""
    model = {"class_channels": 4, "class_dropout": 0.2}
    config = config_of(config_dict, [[SQUEEZE, CAUSAL]], **model)
    config["train"]["images"] = 320
    near_job("train.py", write(config, tmp_path / "c.yaml"))
    return tmp_path / "run"


def test_samples_in_parallel_passes_are_the_sequential_ones_and_guidance_moves_them(
    guided_run: Path, tmp_path: Path, near_job: Runner
) -> None:
    def sample(name: str, *options: object) -> np.ndarray:
        result = near_job(
            "sample.py", guided_run, "--count", 20, "--out", tmp_path / name, "--json", *options
        )
        return read(last_json(result)["shards"])

    plain = sample("plain")
    difference = np.abs(plain - sample("jacobi", "--jacobi", 1e-6))
    assert (difference > 0).mean() < 0.01  # a value may stand on the boundary of a grey level
    assert difference.max() <= 1
    guided = sample("guided", "--guidance", 2.0)
    assert (np.abs(guided - plain) > 0).mean() > 0.01
    facade = load(guided_run).sample(20, guidance=Guidance(2.0)).numpy().astype(int)
    assert (facade == guided).all()
    both = sample("both", "--guidance", 2.0, "--jacobi", 1e-6)
    assert (np.abs(both - guided) > 0).mean() < 0.01
    assert (sample("idle", "--guidance", 0.0) == plain).all()
    refused = near_job(
        "sample.py", guided_run, "--count", 20, "--out", tmp_path / "plain", "--guidance", 2.0,
        check=False,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "holds other work: its guidance is None, not '2.0'" in refused.stderr


def test_what_cannot_be_guided_is_told(
    config_dict: dict[str, Any], tmp_path: Path, near_job: Runner
) -> None:
    config = config_of(config_dict, [[SQUEEZE, MASKED]])
    config["train"]["images"] = 16
    near_job("train.py", write(config, tmp_path / "c.yaml"))
    glow = {**config_dict, "run": {"dir": str(tmp_path / "glow")}}
    glow["train"] = {**glow["train"], "images": 16}
    near_job("train.py", write(glow, tmp_path / "glow.yaml"))

    def refusal(run: str, *options: object) -> str:
        arguments = (tmp_path / run, "--count", 1, "--out", tmp_path / "out", *options)
        return near_job("sample.py", *arguments, check=False).stderr.splitlines()[-1]

    assert "sampled in steps; this model has none" in refusal("glow", "--jacobi", 1e-5)
    assert "without classes needs a temperature" in refusal("run", "--guidance", 1)
    warm = refusal("run", "--guidance", 1, "--guidance-temperature", 1.5)
    assert "is for attention; this model has convolutions" in warm


def read(shards: list[str]) -> np.ndarray:
    """All images of shards."""
    samples = [s for shard in shards for s in WebDataset(shard, shardshuffle=False)]
    return np.stack([decode_png(sample["png"]) for sample in samples]).astype(int)


def test_a_flow_that_is_sampled_in_one_pass_is_not_guided() -> None:
    turned = {**CAUSAL, "inverse": True}
    model = assemble(
        (1, 4, 4), 16, levels=[[SQUEEZE, turned]], classes=3, class_channels=2, class_dropout=0.1
    )
    perturb(model)
    images, labels = 16 * torch.rand(2, 1, 4, 4), torch.tensor([0, 2])
    with torch.no_grad():
        density = model.log_density(images, labels)
        with guiding(model, Guidance(3.0)):
            assert torch.equal(model.log_density(images, labels), density)
    with pytest.raises(UserError, match="this model has none"), inverting(model, Guidance(3.0)):
        pass
