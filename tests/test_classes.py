"""Class conditioning: labels reach couplings and top prior, figures and samples are per class."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
import yaml
from accelerate import Accelerator
from torch import Tensor

from glowscale.checkpoint import load_model
from glowscale.config import ConfigError, parse_config
from glowscale.data import DataError, ShardSet
from glowscale.data.images import decode_png
from glowscale.data.sources import Sample, Split
from glowscale.data.writer import pack_split
from glowscale.evaluation import score_block
from glowscale.models import Glow
from glowscale.training import Trainer
from tests.conftest import Runner, last_json, perturb

BRIGHTNESS = {"dark": 2, "middle": 8, "bright": 13}


@pytest.fixture(scope="module")
def bright_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose class is their brightness."""
    folder = tmp_path_factory.mktemp("bright")

    def sample(i: int) -> Sample:
        rng = np.random.default_rng(i)
        level = list(BRIGHTNESS.values())[i % 3]
        image = np.clip(rng.normal(level, 0.7, (1, 8, 8)).round(), 0, 15).astype(np.uint8)
        return Sample(f"{i:05d}", image, i % 3)

    for name, size in (("train", 120), ("test", 30)):
        split = Split(name, "brightness", (1, 8, 8), 16, tuple(BRIGHTNESS), size, sample)
        pack_split(split, folder / name, 50)
    return folder


@pytest.fixture
def conditional(config_dict: dict[str, Any], bright_dir: Path) -> dict[str, Any]:
    config_dict["data"]["dir"] = str(bright_dir)
    config_dict["model"]["class_channels"] = 4
    config_dict["train"]["images"] = 3200
    return config_dict


def conditional_glow() -> Glow:
    model = Glow(
        (1, 4, 4), 4, levels=1, depth=2, hidden_channels=8, classes=3, class_channels=4
    ).double()
    perturb(model)
    return model


def test_every_label_has_a_density_of_its_own_with_the_right_log_det() -> None:
    model = conditional_glow()
    x = 4 * torch.rand(1, 1, 4, 4, dtype=torch.float64)
    densities = []
    for label in range(3):
        labels = torch.tensor([label])

        def encode(v: Tensor, labels: Tensor = labels) -> Tensor:
            latents, _ = model.encode(v.view(1, 1, 4, 4), labels)
            return torch.cat([z.flatten() for z in latents])

        latents, log_det = model.encode(x, labels)
        jacobian = torch.autograd.functional.jacobian(encode, x.flatten())
        expected = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(log_det[0], expected, rtol=0, atol=1e-8)
        torch.testing.assert_close(model.decode(latents, labels), x, rtol=0, atol=1e-9)
        densities.append(log_det.item())
    assert len({round(density, 6) for density in densities}) == 3


def test_gradients_reach_the_classes_features() -> None:
    model = conditional_glow()
    labels = torch.tensor([0, 2])
    noise = torch.rand(2, 1, 4, 4)
    model(torch.randint(0, 4, (2, 1, 4, 4)), labels, noise).log_prob.sum().backward()
    assert model.class_features is not None
    moved = model.class_features.weight.grad.abs().sum(1) > 0  # type: ignore[union-attr]
    assert moved.tolist() == [True, False, True]
    with pytest.raises(ValueError, match="conditional on 3 classes; give labels"):
        model(torch.randint(0, 4, (2, 1, 4, 4)))


def test_a_class_is_learned_scored_and_sampled(
    conditional: dict[str, Any], tmp_path: Path, near_job: Runner
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(conditional))
    config, run = tmp_path / "c.yaml", tmp_path / "run"
    result = last_json(near_job("train.py", config, "--json"))
    assert result["per_class"].keys() == BRIGHTNESS.keys()
    mean = sum(result["per_class"].values()) / 3  # ten images of each
    assert mean == pytest.approx(result["bits_per_dim"], abs=1e-9)
    model, _ = load_model(run)
    block = ShardSet(Path(conditional["data"]["dir"]) / "test").read_batch(0, 30)
    with torch.no_grad():
        right = score_block(model, block, seed=0)
        wrong_labels = score_block(model, block._replace(labels=(block.labels + 1) % 3), seed=0)
    assert float((right > wrong_labels).float().mean()) > 0.9
    options = ["--count", 8, "--temperature", 0.7]
    for name in ("dark", "bright"):
        out = tmp_path / name
        near_job("sample.py", run, *options, "--out", out, "--class", name)
        assert mean_brightness(out) == pytest.approx(BRIGHTNESS[name], abs=2)
    wrong = near_job("sample.py", run, *options, "--out", out, "--class", "dusk", check=False)
    assert "no class 'dusk'; it has dark, middle, bright" in wrong.stderr
    other = near_job("sample.py", run, *options, "--out", out, "--class", "dark", check=False)
    assert "its label is 2, not 0" in other.stderr


def mean_brightness(folder: Path) -> float:
    dataset = webdataset.WebDataset(str(folder / "shard-000000.tar"), shardshuffle=False)
    images = [decode_png(sample["png"]) for sample in dataset]
    assert len(images) == 8
    return float(np.stack(images).mean())


def test_data_without_the_models_classes_are_refused(
    conditional: dict[str, Any], tmp_path: Path
) -> None:
    def sample(label: int | None, i: int) -> Sample:
        return Sample(f"{i:03d}", np.full((1, 8, 8), i % 16, np.uint8), label)

    def train_on(name: str, classes: tuple[str, ...], label: int | None) -> None:
        conditional["data"]["dir"] = str(tmp_path / name)
        for part in ("train", "test"):
            split = Split(part, name, (1, 8, 8), 16, classes, 64, lambda i: sample(label, i))
            pack_split(split, tmp_path / name / part, 64)
        Trainer(parse_config(conditional), Accelerator(cpu=True))

    with pytest.raises(ConfigError, match="conditional on classes, but the images have none"):
        train_on("none", (), None)
    with pytest.raises(DataError, match=r"Image \d+ has no label"):
        train_on("missing", ("a", "b"), None)
    with pytest.raises(DataError, match=r"Image '\d+' has the label 2; it must be from 0 to 1\."):
        train_on("beyond", ("a", "b"), 2)
    assert ShardSet(tmp_path / "none" / "train").read_batch(0, 2).labels.tolist() == [-1, -1]
