"""Bits per dimension: every image once, the same figure whatever the processes and blocks."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator

from glowscale.bijections import Sequential, roots
from glowscale.checkpoint import load_model
from glowscale.config import parse_config
from glowscale.data import Batch, DataError, ShardSet
from glowscale.data.sources import Sample, Split
from glowscale.data.writer import pack_split
from glowscale.dequantization import (
    NoiseAugmentation,
    UniformDequantizer,
    VariationalDequantizer,
)
from glowscale.errors import UserError
from glowscale.evaluation import bits_per_dim, evaluate, histogram_bits_per_dim, score_block
from glowscale.models import MultiscaleFlow
from glowscale.models.assembly import assemble
from glowscale.training import Trainer
from tests.conftest import Runner, UniformFlow, last_json, perturb, tiny_glow


@pytest.fixture
def held_out(data_dir: Path) -> ShardSet:
    return ShardSet(data_dir / "test")


@pytest.fixture
def model() -> MultiscaleFlow:
    return tiny_glow((1, 8, 8), 16, levels=2)


def test_blocks_do_not_change_the_figure(model: MultiscaleFlow, held_out: ShardSet) -> None:
    expected = evaluate(model, held_out, seed=1, batch=37)
    for batch in (1, 5, 36, 100):
        result = evaluate(model, held_out, seed=1, batch=batch)
        assert result.images == 37
        assert result.bits_per_dim == pytest.approx(expected.bits_per_dim, abs=1e-6)
    assert evaluate(model, held_out, seed=2).bits_per_dim != expected.bits_per_dim


def test_probes_of_what_is_not_estimated_are_one(
    model: MultiscaleFlow, held_out: ShardSet
) -> None:
    result = evaluate(model, held_out, seed=1, probes=5)
    assert result.probes == 1
    assert result.bits_per_dim == evaluate(model, held_out, seed=1).bits_per_dim


def test_an_inverse_that_is_not_found_is_infinitely_far_off(
    held_out: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roots, "LIMIT", 1)
    coupling = {
        "kind": "coupling",
        "transform": {"kind": "mixture", "components": 2},
        "network": {"kind": "convolutional", "hidden_channels": 8},
    }
    model = assemble((1, 8, 8), 16, levels=[[{"kind": "squeeze"}, coupling]])
    perturb(model)
    result = evaluate(model, held_out, seed=0)
    assert result.round_trip_error == result.prior_round_trip_error == math.inf


def test_a_rank_that_is_missing_is_noticed(model: MultiscaleFlow, held_out: ShardSet) -> None:
    with pytest.raises(DataError, match="Of 37 images 17 were not scored"):
        evaluate(model, held_out, seed=0, batch=20, rank=0, world_size=2)


def test_mean_and_standard_error_are_those_of_the_images(
    model: MultiscaleFlow, held_out: ShardSet
) -> None:
    block = held_out.read_batch(0, 37)
    with torch.no_grad():
        bits = -score_block(model, block, seed=0) / (64 * math.log(2))
    result = evaluate(model, held_out, seed=0)
    assert result.bits_per_dim == pytest.approx(float(bits.mean()), abs=1e-6)
    assert result.standard_error == pytest.approx(float(bits.std()) / 37**0.5, abs=1e-6)
    assert result.fingerprint == held_out.manifest.fingerprint
    first = evaluate(model, held_out, seed=0, images=10)
    assert first.bits_per_dim == pytest.approx(float(bits[:10].mean()), abs=1e-6)


def test_more_importance_samples_tighten_the_bound(
    model: MultiscaleFlow, held_out: ShardSet
) -> None:
    model.dequantizer = VariationalDequantizer((1, 8, 8), 16, 2, 8, 4)
    perturb(model.dequantizer, 0.2)  # far from the posterior, so that there is much to gain
    scores = [evaluate(model, held_out, seed=0, importance_samples=k) for k in (1, 8, 64)]
    assert scores[1].bits_per_dim < scores[0].bits_per_dim - 0.01
    assert scores[2].bits_per_dim < scores[1].bits_per_dim - 0.005
    assert scores[2].importance_samples == 64


def test_importance_sampling_averages_the_weights_of_independent_noise(
    model: MultiscaleFlow, held_out: ShardSet
) -> None:
    block = held_out.read_batch(5, 8)
    with torch.no_grad():
        bound = score_block(model, block, seed=1, importance_samples=5)
        keys = [[(1, "evaluation", k, i) for i in (5, 6, 7)] for k in range(5)]
        noises = [model.draw_noise(row) for row in keys]
        weights = torch.stack([model(block.images, None, n).log_prob for n in noises]).double()
    assert len({float(noise.sum()) for noise in noises}) == 5
    expected = weights.exp().mean(0).log()
    torch.testing.assert_close(bound, expected, rtol=0, atol=1e-4)


def test_importance_samples_of_noise_are_refused(
    model: MultiscaleFlow, held_out: ShardSet
) -> None:
    model.dequantizer = NoiseAugmentation(std=2.0)
    assert not evaluate(model, held_out, seed=0).is_bound
    with pytest.raises(UserError, match=r"importance_samples is 2, .* no bound to tighten"):
        evaluate(model, held_out, seed=0, importance_samples=2)


def test_the_figure_of_noisy_images_stands_alone(
    config_dict: dict[str, Any], tmp_path: Path, near_job: Runner
) -> None:
    config_dict["train"]["images"] = 16
    config_dict["model"]["dequantization"] = {"kind": "noise", "std": 1.5}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    several = "evaluate.importance_samples=2"
    refused = near_job("train.py", tmp_path / "c.yaml", several, check=False)
    assert "importance_samples is 2, but" in refused.stderr
    assert not (tmp_path / "run").exists()
    trained = near_job("train.py", tmp_path / "c.yaml", "--json")
    assert "histogram" not in trained.stderr
    assert last_json(trained)["histogram_bits_per_dim"] is None
    run = tmp_path / "run"
    refused = near_job("evaluate.py", run, "--importance-samples", 2, check=False)
    assert (refused.returncode, refused.stderr.count("importance_samples is 2, but")) == (1, 1)
    assert not (run / "evaluations").exists()
    uniform = ("--dequantization", "uniform", "--importance-samples", 2, "--json")
    assert last_json(near_job("evaluate.py", run, *uniform))["is_bound"]
    page = (run / "report.html").read_text()
    assert "37 held-out images, noisy ones: no bound on the pixels&#x27;." in page
    assert page.count("<td>noise (no bound)</td>") == page.count("<td>uniform</td>") == 1


def test_data_of_another_kind_are_refused(held_out: ShardSet) -> None:
    with pytest.raises(DataError, match=r"\(1, 8, 8\) with 16 grey levels; .* \(1, 8, 8\) with 4"):
        evaluate(tiny_glow((1, 8, 8), 4), held_out, seed=0)


def test_the_histogram_is_the_entropy_of_independent_pixels(tmp_path: Path) -> None:
    # A pixel of row i is uniform over 2^(i+1) values: it costs i + 1 bits.
    def sample(i: int) -> Sample:
        rng = np.random.default_rng(i)
        image = np.stack([rng.integers(0, 2 ** (row + 1), 4) for row in range(4)])
        return Sample(f"{i:05d}", image[None].astype(np.uint8), None)

    for name, size in (("train", 3000), ("test", 500)):
        pack_split(Split(name, "dice", (1, 4, 4), 16, (), size, sample), tmp_path / name, 1000)
    bits = histogram_bits_per_dim(ShardSet(tmp_path / "train"), ShardSet(tmp_path / "test"))
    assert bits == pytest.approx((1 + 2 + 3 + 4) / 4, abs=0.01)


def test_the_job_gives_the_trained_runs_figure_on_any_number_of_processes(
    config_dict: dict[str, Any], tmp_path: Path, run_job: Runner, near_job: Runner
) -> None:
    config_dict["train"]["images"] = 64
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    trained = last_json(near_job("train.py", tmp_path / "c.yaml", "--json"))
    run = tmp_path / "run"
    one = last_json(near_job("evaluate.py", run, "--json"))
    two = last_json(run_job("evaluate.py", run, "--json", "--batch", 10, processes=2))
    assert one["images"] == two["images"] == 37
    assert one["bits_per_dim"] == pytest.approx(trained["bits_per_dim"], abs=1e-6)
    assert two["bits_per_dim"] == pytest.approx(trained["bits_per_dim"], abs=1e-6)
    assert one["dequantization"] == "variational"
    uniform = last_json(near_job("evaluate.py", run, "--json", "--dequantization", "uniform"))
    model, _ = load_model(run)
    model.dequantizer = UniformDequantizer()
    held_out = ShardSet(Path(config_dict["data"]["dir"], "test"))
    expected = evaluate(model, held_out, seed=config_dict["run"].get("seed", 0))
    assert uniform["dequantization"] == expected.dequantization == "uniform"
    assert uniform["bits_per_dim"] == pytest.approx(expected.bits_per_dim, abs=1e-6)
    wrong = near_job("evaluate.py", tmp_path / "nowhere", check=False)
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1].startswith("Error: ")
    assert "neither a checkpoint nor the folder of a run" in wrong.stderr


@pytest.mark.long
def test_four_processes_give_the_figure_of_one(
    config_dict: dict[str, Any], tmp_path: Path, run_job: Runner, near_job: Runner
) -> None:
    config_dict["train"]["images"] = 64
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    near_job("train.py", tmp_path / "c.yaml")
    options = [tmp_path / "run", "--json", "--batch", 5, "--importance-samples", 3]
    one = last_json(near_job("evaluate.py", *options, "--out", tmp_path / "one"))
    four = last_json(run_job("evaluate.py", *options, "--out", tmp_path / "four", processes=4))
    assert one["images"] == four["images"] == 37
    assert four["bits_per_dim"] == pytest.approx(one["bits_per_dim"], abs=1e-6)


def test_a_trained_model_reconstructs_its_images(config_dict: dict[str, Any]) -> None:
    trainer = Trainer(parse_config(config_dict), Accelerator(cpu=True))
    assert trainer.train().round_trip_error < 1e-4


def test_the_bound_rises_with_its_samples_to_the_exact_log_likelihood() -> None:
    # The density on [0, L]^D is uniform, so an image has exactly log2 L bits a dimension, however
    # far the dequantizer's q is from the posterior, which is uniform too.
    model = UniformFlow((1, 4, 4), 8, [Sequential([])])
    model.dequantizer = VariationalDequantizer((1, 4, 4), 8, 2, 8, 4)
    perturb(model.dequantizer, 0.1)
    images = torch.randint(0, 8, (64, 1, 4, 4), dtype=torch.uint8)
    numbers = torch.arange(64)
    block = Batch(images, torch.full_like(numbers, -1), numbers, torch.zeros_like(numbers))
    counts = (1, 4, 16, 64, 256, 1024)
    with torch.inference_mode():
        scores = [score_block(model, block, seed=0, importance_samples=k) for k in counts]
    bits = [bits_per_dim(x, model.dimensions) for x in scores]
    for fewer, more in pairwise(bits):
        gain = fewer - more
        assert gain.mean() > -2 * gain.std() / 8
    assert bits[0].mean() > 3.03
    error = bits[-1].std() / 8
    assert abs(bits[-1].mean() - 3) < 3 * error + 1e-3
    assert error < 0.002
