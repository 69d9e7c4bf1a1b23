"""The continuous model: its noise, its figures, and its training as users run it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from glowscale.bijections import ActNorm
from glowscale.bijections.continuous import ContinuousFlow
from glowscale.bijections.solvers import Solver
from glowscale.config import parse_config
from glowscale.data import ShardSet
from glowscale.distributed import start_accelerator
from glowscale.errors import UserError
from glowscale.evaluation import SolverGapError, evaluate, refuse_untrusted
from glowscale.models import Ffjord, solved
from glowscale.training import Trainer
from tests.conftest import Runner, final_tensors, perturb


def tiny_ffjord(**arguments: object) -> Ffjord:
    options = {
        "levels": 2,
        "depth": 1,
        "hidden_channels": [8],
        "solver": {"method": "rk4", "steps": 2},
        **arguments,
    }
    model = Ffjord((1, 8, 8), 16, **options)  # type: ignore[arg-type]
    perturb(model, 0.2)
    return model


def test_the_model_brings_images_back_and_tells_what_it_took() -> None:
    model = tiny_ffjord(
        gradient="direct", evaluation_solver={"tolerance": 1e-6}, kinetic=0.1, frobenius=0.01
    ).eval()
    images = torch.rand(3, 1, 8, 8) * 16
    latents, _ = model.encode(images)
    torch.testing.assert_close(model.decode(latents), images, rtol=0, atol=1e-2)
    model.train()
    model.reset_figures()
    noise = model.draw_noise([(0, i) for i in range(3)])
    assert noise.shape == (3, 2, 8, 8)
    assert set(noise[:, 1].unique().tolist()) == {-1.0, 1.0}
    output = model(images.to(torch.uint8), noise=noise)
    assert set(output.penalties) == {"kinetic", "frobenius"}
    figures = model.figures()
    assert figures["forward_evaluations"] == 3 * 2 * 4
    output.log_prob.sum().backward()
    assert model.figures()["backward_evaluations"] == (
        0 if model.flows[0].gradient == "adjoint" else 3 * 2 * 4
    )
    assert figures["kinetic"] > 0
    torch.testing.assert_close(
        output.penalties["kinetic"].mean(), torch.tensor(0.1 * figures["kinetic"])
    )


def test_estimates_are_a_function_of_their_key() -> None:
    model = tiny_ffjord()
    images = torch.randint(0, 16, (4, 1, 8, 8), dtype=torch.uint8)
    keys = [(0, i) for i in range(4)]
    whole = model(images, noise=model.draw_noise(keys)).log_prob
    one = model(images[2:3], noise=model.draw_noise(keys[2:3])).log_prob
    torch.testing.assert_close(whole[2:3], one, rtol=1e-5, atol=1e-3)
    other = model(images, noise=model.draw_noise(keys, probe=1)).log_prob
    assert (whole - other).abs().min() > 0


def test_an_evaluation_averages_probes_and_tells_their_error(data_dir: Path) -> None:
    shards = ShardSet(data_dir / "test")
    model = tiny_ffjord().eval()
    one = evaluate(model, shards, seed=0)
    many = evaluate(model, shards, seed=0, probes=16)
    assert one.trace_standard_error is None
    assert many.trace_standard_error is not None
    assert 0 < many.trace_standard_error < 0.1
    spread = 4 * math.sqrt(17) * many.trace_standard_error
    assert abs(one.bits_per_dim - many.bits_per_dim) < spread
    assert many.solver_gap is not None
    assert abs(many.solver_gap) < 0.05
    assert many.training_solver_gap == many.solver_gap  # by the same solver
    assert "16 probes ±" in str(many)
    # Independent of the block, on a grid.
    blocks = evaluate(model, shards, seed=0, batch=7)
    assert blocks.bits_per_dim == pytest.approx(one.bits_per_dim, abs=1e-5)


def test_the_solver_that_trains_is_measured_as_if_it_scored(data_dir: Path) -> None:
    shards = ShardSet(data_dir / "test")
    coarse, fine = {"method": "euler", "steps": 1}, {"method": "rk4", "steps": 8}
    both = tiny_ffjord(solver=coarse, evaluation_solver=fine)
    alone = tiny_ffjord(solver=coarse)
    alone.load_state_dict(both.state_dict())
    result, expected = (evaluate(model, shards, seed=0, images=16) for model in (both, alone))
    assert result.training_solver_gap == expected.solver_gap
    assert result.training_solver_gap is not None
    assert result.solver_gap is not None
    assert abs(result.training_solver_gap) > 100 * abs(result.solver_gap)
    assert both.flows[0].evaluation_solver.steps == 8


def test_a_tight_solve_that_is_given_up_vouches_for_nothing(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solved, "TIGHT", Solver("dopri5", tolerance=1e-6, evaluation_limit=5))
    result = evaluate(tiny_ffjord(), ShardSet(data_dir / "test"), seed=0, images=16)
    assert result.solver_gap == result.training_solver_gap == math.inf
    with pytest.raises(SolverGapError, match=r"differ by \+inf"):
        refuse_untrusted(result, 0.5, 0.1)


def test_flows_may_leave_the_larger_image_and_what_is_linear_to_others() -> None:
    model = tiny_ffjord(unsqueezed_depth=0, matrix="lu", depth=2).eval()
    shapes: list[tuple[int, ...]] = []
    for flow in model.flows:
        flow.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[1:])))
    images = torch.rand(2, 1, 8, 8) * 16
    latents, _ = model.encode(images)
    assert shapes == [(4, 4, 4)] * 2 + [(2, 4, 4)] * 2
    assert sum(isinstance(layer, ActNorm) for layer in model.modules()) == 4
    torch.testing.assert_close(model.decode(latents), images, rtol=0, atol=1e-2)


@pytest.fixture
def ffjord_dict(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A run of a tiny continuous flow on a grid."""
    config_dict["model"] = {
        "family": "ffjord",
        "levels": 2,
        "depth": 1,
        "hidden_channels": [8],
        "matrix": "lu",
        "solver": {"method": "rk4", "steps": 2},
        "evaluation_solver": {"method": "rk4", "steps": 2},
        "kinetic": 0.05,
        "frobenius": 0.05,
        "dequantization": config_dict["model"]["dequantization"],
    }
    config_dict["train"] |= {"images": 96}
    config_dict["evaluate"] = {"every": 1000, "batch": 20}
    config_dict["samples"] = {"every": 1000, "count": 4}
    return config_dict


@pytest.mark.parametrize("gradient", ["adjoint", pytest.param("direct", marks=pytest.mark.long)])
def test_processes_and_restarts_train_the_same_model(
    ffjord_dict: dict[str, Any], tmp_path: Path, run_job: Runner, gradient: str
) -> None:
    ffjord_dict["model"]["gradient"] = gradient
    ffjord_dict["train"] |= {"precision": "float64", "schedule": {"decay": "constant"}}
    ffjord_dict["checkpoint"]["keep"] = 9
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def train(run: Path, images: int) -> None:
        train = {**ffjord_dict["train"], "images": images}
        content = {**ffjord_dict, "run": {"dir": str(run)}, "train": train}
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(content))
        if images < 96:
            run_job("train.py", config, processes=2)
        else:
            Trainer(parse_config(content), start_accelerator()).train()

    train(whole, 96)
    train(parts, 48)
    train(parts, 96)
    one, other = (final_tensors(run) for run in (whole, parts))
    begun = load_file(whole / "checkpoints" / "images-000000000000" / "model.safetensors")
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=1e-8, msg=key)
    for key, value in begun.items():
        if "velocity" in key:
            assert not torch.equal(value, one[f"model/{key}"]), f"{key} was not trained"


def test_bf16_runs_the_velocities_low_and_metrics_tell_what_solving_took(
    ffjord_dict: dict[str, Any],
) -> None:
    ffjord_dict["model"] |= {"gradient": "adjoint", "solver": {"tolerance": 1e-2}}
    ffjord_dict["train"] |= {"precision": "bf16", "images": 48}
    trainer = Trainer(parse_config(ffjord_dict), start_accelerator("bf16"))
    seen: set[torch.dtype] = set()
    for layer in trainer.state.model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda _m, _a, out: seen.add(out.dtype))
    trainer.train()
    assert torch.bfloat16 in seen
    assert {p.dtype for p in trainer.state.model.parameters()} == {torch.float32}
    lines = [json.loads(x) for x in (trainer.folder.path / "metrics.jsonl").open()]
    told = next(line for line in lines if line["kind"] == "train")
    for key in ("forward_evaluations", "backward_evaluations", "kinetic", "frobenius"):
        assert told[key] > 0


def test_a_field_that_cannot_be_solved_ends_a_run_with_the_level_and_what_to_change(
    ffjord_dict: dict[str, Any],
) -> None:
    ffjord_dict["model"]["solver"] = {"tolerance": 1e-6, "evaluation_limit": 20}
    ffjord_dict["train"] |= {"stiff_limit": 3}
    trainer = Trainer(parse_config(ffjord_dict), start_accelerator())
    flow = next(m for m in trainer.state.model.modules() if isinstance(m, ContinuousFlow))
    with pytest.raises(UserError) as told:
        trainer.train()
    for part in (
        flow.name,
        "dopri5 at the tolerance 1e-06",
        "more than 20 evaluations",
        "allow a",
    ):
        assert part in str(told.value)


def test_a_figure_that_is_the_solvers_doing_ends_a_run(ffjord_dict: dict[str, Any]) -> None:
    ffjord_dict["model"]["evaluation_solver"] = {"method": "euler", "steps": 1}
    ffjord_dict["evaluate"] |= {"every": 16, "solver_gap_limit": 1e-9}
    trainer = Trainer(parse_config(ffjord_dict), start_accelerator())
    with pytest.raises(SolverGapError, match=r"differ by [+-]\S+ from those of a tight solve"):
        trainer.train()
    lines = [json.loads(x) for x in (trainer.folder.path / "metrics.jsonl").open()]
    assert abs(next(x for x in lines if x["kind"] == "held_out")["solver_gap"]) > 1e-9


def test_a_loss_that_is_the_solvers_doing_ends_a_run(ffjord_dict: dict[str, Any]) -> None:
    ffjord_dict["model"]["solver"] = {"method": "euler", "steps": 1}
    ffjord_dict["model"]["evaluation_solver"] = {"method": "rk4", "steps": 16}
    ffjord_dict["evaluate"] |= {"every": 16, "solver_gap_limit": 1e-5}
    trainer = Trainer(parse_config(ffjord_dict), start_accelerator())
    with pytest.raises(SolverGapError, match=r"training's solver is off by [+-]\S+ bits/dim"):
        trainer.train()
    lines = [json.loads(x) for x in (trainer.folder.path / "metrics.jsonl").open()]
    held_out = next(x for x in lines if x["kind"] == "held_out")
    assert abs(held_out["training_solver_gap"]) > 1e-5 > abs(held_out["solver_gap"])
