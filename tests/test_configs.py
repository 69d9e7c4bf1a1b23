"""Every config of the repository: it parses, builds and takes a step."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from glowscale.config import Config, load_config
from glowscale.data.writer import pack_split
from glowscale.distributed import start_accelerator
from glowscale.models import build_model
from glowscale.training import Trainer
from tests.conftest import ROOT, random_split

SHAPES: dict[str, tuple[tuple[int, int, int], int]] = {
    "quickstart": ((1, 8, 8), 17),
    "fashion_mnist": ((1, 28, 28), 256),
    "cifar10_glow": ((3, 32, 32), 256),
}
"""Image shape and grey levels of each config's data."""

PATHS = sorted((ROOT / "configs").glob("*.yaml"))


def test_every_config_is_known_here() -> None:
    assert {path.stem for path in PATHS} == set(SHAPES)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_config_takes_one_step_at_full_width(path: Path, tmp_path: Path) -> None:
    shape, grey_levels = SHAPES[path.stem]
    for name in ("train", "test"):
        pack_split(random_split(name, 32, shape, grey_levels), tmp_path / "data" / name, 16)
    lanes = load_config(path).data.lanes
    config = load_config(
        path,
        [
            f"run.dir={tmp_path / 'run'}",
            f"data.dir={tmp_path / 'data'}",
            "model.depth=1",
            f"train.batch={lanes}",
            f"train.images={lanes}",
            f"train.init_images={lanes}",
            "train.micro_batch=null",
            "evaluate.images=4",
            "samples.count=2",
        ],
    )
    trainer = Trainer(config, start_accelerator(config.train.precision))
    parameters = list(trainer.state.model.parameters())
    before = [p.clone() for p in parameters]
    evaluation = trainer.train()
    assert torch.isfinite(torch.tensor(evaluation.bits_per_dim))
    moved = [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]
    # A network's inner layers wait until its zero-initialized last one has moved.
    assert sum(moved) > len(moved) / 3


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_header_states_what_to_expect(path: Path) -> None:
    lines = path.read_text().splitlines()
    header = " ".join(line for line in lines if line.startswith("#"))
    assert re.search(r"(Expect about|Published:) \d\.\d+ bits/dim", header)


def test_cifar10_is_the_papers_architecture() -> None:
    config: Config = load_config(ROOT / "configs" / "cifar10_glow.yaml")
    found: dict[str, Any] = config.model.model_dump()
    expected = {"levels": 3, "depth": 32, "hidden_channels": 512, "coupling": "affine"}
    assert {key: found[key] for key in expected} == expected
    with torch.device("meta"):
        model = build_model(found | {"matrix": "plain"}, (3, 32, 32), 256)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == pytest.approx(44e6, rel=0.01)


def test_launch_configs_are_of_the_kind_that_starts_more_than_one_process() -> None:
    for path in (ROOT / "configs" / "accelerate").glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        assert content["distributed_type"] == "MULTI_GPU"  # MULTI_CPU would start one process
        assert content["num_processes"] >= 2
