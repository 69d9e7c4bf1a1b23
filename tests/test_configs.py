"""Every config of the repository: it parses, builds and takes a step."""

import json
import re
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from glowscale.bijections.activations import Activations
from glowscale.bijections.matrices import MATRICES
from glowscale.config import Config, load_config
from glowscale.config.model import Multiscale
from glowscale.data.writer import pack_split
from glowscale.distributed import start_accelerator
from glowscale.models import MultiscaleFlow, build_model
from glowscale.models.blocks import BLOCKS
from glowscale.models.parts import CAUSAL_NETWORKS, NETWORKS, TRANSFORMS
from glowscale.training import Trainer
from glowscale.training.plan import activation_bytes
from tests.conftest import ROOT, Caller, Runner, last_json, random_split, tiny_glow

SHAPES: dict[str, tuple[tuple[int, int, int], int]] = {
    "quickstart": ((1, 8, 8), 17),
    "fashion_mnist": ((1, 28, 28), 256),
    "cifar10_glow": ((3, 32, 32), 256),
    "imagenet32_glow": ((3, 32, 32), 256),
    "imagenet64_glow": ((3, 64, 64), 256),
    "celeba_hq_256_glow": ((3, 256, 256), 32),
    "my_images": ((3, 64, 64), 256),
    "digits_ffjord": ((1, 8, 8), 17),
    "fashion_mnist_glow": ((1, 28, 28), 256),
    "fashion_mnist_flowpp": ((1, 28, 28), 256),
    "fashion_mnist_recursive": ((1, 28, 28), 256),
    "fashion_mnist_spline": ((1, 28, 28), 256),
    "fashion_mnist_jet": ((1, 28, 28), 256),
    "fashion_mnist_maf": ((1, 28, 28), 256),
    "fashion_mnist_tarflow": ((1, 28, 28), 256),
    "fashion_mnist_ffjord": ((1, 28, 28), 256),
    "cifar10_ffjord": ((3, 32, 32), 256),
}
"""Image shape and grey levels of each config's data."""

WAYS: tuple[Activations, ...] = ("store", "recompute", "invert")
GRID = ["model.solver.steps=1", "model.evaluation_solver.steps=1"]
"""One step of the solver will do for a step of the training."""

PATHS = sorted((ROOT / "configs").glob("*.yaml"))
SLOW = ("celeba_hq_256_glow", "cifar10_ffjord")
LARGE = ("celeba_hq_256_glow", "imagenet64_glow")


def shallow(config: Config) -> list[str]:
    """Overrides that leave one bijection of each kind in a level."""
    if not isinstance(config.model, Multiscale):
        return ["model.depth=1"]
    places = [(i, j) for i, level in enumerate(config.model.levels) for j in range(len(level))]
    squeezes = {(i, j) for i, j in places if config.model.levels[i][j].kind == "squeeze"}
    return [f"model.levels.{i}.{j}.depth=1" for i, j in places if (i, j) not in squeezes]


def test_every_config_is_known_here() -> None:
    assert {path.stem for path in PATHS} == set(SHAPES)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.long] if path.stem in SLOW else [], id=path.stem)
        for path in PATHS
    ],
)
def test_config_takes_one_step_at_full_width(path: Path, tmp_path: Path) -> None:
    shape, grey_levels = SHAPES[path.stem]
    for name in ("train", "test"):
        pack_split(random_split(name, 8, shape, grey_levels), tmp_path / "data" / name, 16)
    lanes = 4 if shape[-1] < 256 else 1
    config = load_config(
        path,
        [
            f"run.dir={tmp_path / 'run'}",
            f"data.dir={tmp_path / 'data'}",
            f"data.lanes={lanes}",
            "data.workers=0",
            *shallow(load_config(path)),
            f"train.batch={lanes}",
            f"train.images={lanes}",
            f"train.init_images={lanes}",
            f"evaluate.images={min(2, lanes)}",
            "evaluate.batch=2",
            f"samples.count={min(2, lanes)}",
            *(GRID if path.stem.endswith("ffjord") else []),
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


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.long] if path.stem in LARGE else [], id=path.stem)
        for path in PATHS
    ],
)
def test_config_dry_runs_at_full_depth(path: Path, tmp_path: Path, call_job: Caller) -> None:
    shape, grey_levels = SHAPES[path.stem]
    for name in ("train", "test"):
        pack_split(random_split(name, 8, shape, grey_levels), tmp_path / name, 16)
    code, out, err = call_job("train.py", path, f"data.dir={tmp_path}", "--dry-run", "--json")
    assert code == 0, err
    facts = json.loads(out)
    config = load_config(path)
    with torch.device("meta"):
        model = build_model(config.model.model_dump(), shape, grey_levels, 3)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["steps"] == -(-config.train.images // config.train.batch)
    assert facts["legal_processes"][-1] == config.data.lanes
    assert f"steps: {facts['steps']:,}" in err
    held = config.train.micro_batch or config.train.batch
    kept = held * facts["activation_bytes_per_image"]
    assert facts["memory_bytes"] == kept + 20 * facts["parameters"]


def test_a_dry_run_tells_what_the_quickstart_would_take_and_touches_nothing(
    tmp_path: Path, run_job: Runner
) -> None:
    overrides = [f"run.dir={tmp_path / 'run'}", f"data.dir={tmp_path / 'data'}"]
    config = ROOT / "configs" / "quickstart.yaml"
    result = run_job("train.py", config, *overrides, "--dry-run", "--json")
    facts = last_json(result)
    model = build_model(load_config(config).model.model_dump(), (1, 8, 8), 17, 10)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["steps"] == 500
    assert facts["epochs"] == 16
    assert facts["legal_processes"] == [1, 2, 4, 8]
    assert "hidden_channels: 96" in result.stderr  # the resolved config
    assert "legal process counts: 1, 2, 4, 8" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_plans_activations_grow_with_depth_as_what_a_pass_allocates() -> None:
    def glow(depth: int, way: Activations) -> MultiscaleFlow:
        model = tiny_glow((1, 64, 64), 16, depth=depth, hidden_channels=16, activations=way)
        return model.to(memory_format=torch.channels_last)

    def allocated(depth: int, way: Activations) -> int:
        model = glow(depth, way)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            model(torch.zeros(1, 1, 64, 64, dtype=torch.uint8)).log_prob.sum().backward()
        found: Any = profiled.profiler.kineto_results.events()
        events = [event for event in found if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        return max(accumulate(event.nbytes() for event in events))

    def planned(depth: int, way: Activations) -> int:
        with torch.device("meta"):
            return activation_bytes(glow(depth, way))

    growth = {way: planned(12, way) - planned(4, way) for way in WAYS}
    seen = {way: allocated(12, way) - allocated(4, way) for way in WAYS}
    assert growth["store"] == pytest.approx(seen["store"], rel=0.02)
    assert growth["recompute"] == pytest.approx(seen["recompute"], abs=0.02 * seen["store"])
    assert growth["invert"] == pytest.approx(seen["invert"], abs=0.02 * seen["store"])
    assert seen["store"] > 8 * 2 * (16 * 32 * 32 * 4)  # each step keeps two hidden layers
    assert seen["invert"] < 0.01 * seen["store"]


WIDTHS = {"hidden_channels": 8, "blocks": 1}
PARTS: dict[str, list[dict[str, Any]]] = {
    "transform": [
        {"kind": "affine"},
        {"kind": "additive"},
        {"kind": "gaussian"},
        {"kind": "mixture", "components": 2},
        {"kind": "spline", "bins": 4},
    ],
    "network": [
        {"kind": "convolutional", "hidden_channels": 8},
        {"kind": "gated", **WIDTHS},
        {"kind": "transformer", **WIDTHS},
    ],
    "causal": [
        {"kind": "masked_convolutional", **WIDTHS},
        {"kind": "causal_transformer", **WIDTHS},
    ],
}
MIXING = [*MATRICES, None]


def vary(kind: str, **choices: Iterable[object]) -> list[dict[str, Any]]:
    """Blocks of a kind with the first of each choice, and with every other in its place."""
    alike = {key: next(iter(chosen)) for key, chosen in choices.items()}
    return [
        {"kind": kind, **alike, key: value} for key, chosen in choices.items() for value in chosen
    ]


BENT = {"transform": PARTS["transform"], "matrix": MIXING}
LEVELS: dict[str, list[dict[str, Any]]] = {
    "squeeze": vary("squeeze", depth=[1]),
    "linear": vary("linear", matrix=MATRICES),
    "coupling": vary(
        "coupling", network=PARTS["network"], mask=["channels", "checkerboard"], **BENT
    ),
    "recursive": vary(
        "recursive", network=PARTS["network"], recursions=[1], **(BENT | {"matrix": MATRICES})
    ),
    "autoregressive": [
        *vary("autoregressive", network=PARTS["causal"], inverse=[False], **BENT),
        *vary("autoregressive", network=PARTS["causal"], inverse=[True], **BENT),
    ],
    "continuous": vary(
        "continuous",
        hidden_channels=[[8]],
        matrix=MIXING,
        gradient=["adjoint", "direct"],
        trace=["hutchinson", "exact"],
    ),
}
"""By kind of block, a level with each part that such a block may be made of."""


def test_every_kind_of_part_is_planned_here() -> None:
    assert LEVELS.keys() == BLOCKS.keys()
    known = {"transform": TRANSFORMS, "network": NETWORKS, "causal": CAUSAL_NETWORKS}
    for name, parts in PARTS.items():
        assert {part["kind"] for part in parts} == known[name].keys()


@pytest.mark.parametrize(
    ("kind", "way"),
    [(kind, way) for kind in LEVELS for way in WAYS if kind != "continuous" or way == "store"],
)
def test_every_kind_of_block_is_planned_as_what_a_pass_holds(kind: str, way: Activations) -> None:
    levels = [[{"kind": "squeeze"}, *LEVELS[kind]]]
    model = Multiscale.model_validate({"family": "multiscale", "levels": levels}).model_dump()

    def held() -> int:
        return activation_bytes(build_model(model, (2, 4, 4), 16, 3, way))

    with torch.device("meta"):
        planned = held()
    assert planned > 0
    if kind != "continuous":  # of which a plan takes one evaluation of the solve
        assert planned == pytest.approx(held(), rel=0.05)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_header_states_what_to_expect(path: Path) -> None:
    lines = path.read_text().splitlines()
    header = " ".join(line for line in lines if line.startswith("#"))
    assert re.search(r"((Expect about|Published:) \d\.\d+ bits/dim)|Not yet measured", header)


def test_cifar10_is_the_papers_architecture() -> None:
    config: Config = load_config(ROOT / "configs" / "cifar10_glow.yaml")
    found: dict[str, Any] = config.model.model_dump()
    expected = {"levels": 3, "depth": 32, "hidden_channels": 512, "coupling": "affine"}
    assert {key: found[key] for key in expected} == expected
    with torch.device("meta"):
        model = build_model(found | {"matrix": "plain"}, (3, 32, 32), 256, 10)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == pytest.approx(44e6, rel=0.01)


def test_launch_configs_are_of_the_kind_that_starts_more_than_one_process() -> None:
    for path in (ROOT / "configs" / "accelerate").glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        assert content["distributed_type"] == "MULTI_GPU"  # MULTI_CPU would start one process
        assert content["num_processes"] >= 2
