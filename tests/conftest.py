"""What several tests share: small models, small shards, and jobs as real processes."""

import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from glowscale.bijections import ActNorm, Bijection
from glowscale.checkpoint import find_checkpoint
from glowscale.data.sources import Sample, Split
from glowscale.data.writer import pack_split
from glowscale.dequantization import Dequantizer
from glowscale.models import Glow, MultiscaleFlow

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # the models are tiny, and tests run side by side


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with those that share one slow thing, and so run in one process from first to last."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)  # each test is a process of its own


def perturb(module: torch.nn.Module, size: float = 0.3) -> None:
    """Move every parameter off its starting point, so that no layer is the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:  # by the fan-in, so that wide layers stay well conditioned
                noise /= parameter[0].numel() ** 0.5
            parameter += size * noise.to(parameter.dtype)
    for layer in module.modules():
        if isinstance(layer, ActNorm):
            layer.initialized.fill_(True)


def tiny_glow(
    image_shape: tuple[int, int, int] = (1, 4, 4),
    grey_levels: int = 4,
    dequantizer: Dequantizer | None = None,
    preprocessing: Bijection | None = None,
    levels: int = 1,
    depth: int = 2,
    hidden_channels: int = 8,
    **arguments: Any,  # noqa: ANN401
) -> MultiscaleFlow:
    """A small Glow, its parameters off their starting point."""
    model = Glow(
        image_shape,
        grey_levels,
        levels=levels,
        depth=depth,
        hidden_channels=hidden_channels,
        dequantizer=dequantizer,
        preprocessing=preprocessing,
        **arguments,
    )
    perturb(model, 0.2)
    return model


class UniformFlow(MultiscaleFlow):
    """Its preprocessing maps the pixels' range to the unit cube; the density there is 1."""

    def encode(self, images: Tensor, labels: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        x, log_det = self.preprocessing(images)
        # log N(0) is added for every dimension; take it away again.
        normaliser = 0.5 * math.log(2 * math.pi) * self.dimensions
        return [torch.zeros_like(x)], log_det + normaliser


def random_split(
    name: str, size: int, shape: tuple[int, int, int] = (1, 8, 8), grey_levels: int = 16
) -> Split:
    """Images with structure (a random ramp and noise), so that there is something to learn."""

    def sample(i: int) -> Sample:
        rng = np.random.default_rng([i, len(name)])
        ramp = np.linspace(0, rng.uniform(0, grey_levels), shape[-1])
        image = np.clip(ramp + rng.normal(0, 1, shape), 0, grey_levels - 1).astype(np.uint8)
        return Sample(f"{name}-{i:05d}", image, i % 3)

    return Split(name, "random ramps", shape, grey_levels, ("a", "b", "c"), size, sample)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small packed data set: 200 training images in uneven shards, 37 held out."""
    folder = tmp_path_factory.mktemp("data")
    pack_split(random_split("train", 200), folder / "train", 48)
    pack_split(random_split("test", 37), folder / "test", 20)
    return folder


@pytest.fixture
def config_dict(data_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """A run that takes seconds: a tiny Glow with variational dequantization."""
    return {
        "run": {"dir": str(tmp_path / "run")},
        "data": {"dir": str(data_dir), "lanes": 4, "shuffle_block": 16},
        "model": {
            "family": "glow",
            "levels": 2,
            "depth": 2,
            "hidden_channels": 8,
            "dequantization": {
                "kind": "variational",
                "depth": 2,
                "hidden_channels": 8,
                "context_channels": 4,
            },
        },
        "train": {
            "images": 320,
            "batch": 16,
            "init_images": 32,
            "clip": 10.0,
            "ema_images": 100,
            "optimizer": {"kind": "adamw", "lr": 5e-3, "weight_decay": 0.1},
            "schedule": {"warmup_images": 64, "decay": "cosine"},
        },
        "log": {"every": 48},
        "evaluate": {"every": 160, "batch": 20},
        "samples": {"every": 160, "count": 9},
        "checkpoint": {"every": 64, "keep": 3},
    }


Runner = Callable[..., subprocess.CompletedProcess[str]]


def job_command(script: str, processes: int = 1) -> list[str]:
    """The command line of a job, alone or under `accelerate launch`."""
    path = str(ROOT / "pipelines" / script)
    if processes == 1:
        return [sys.executable, path]
    config = str(ROOT / "configs" / "accelerate" / "cpu_2.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    return [*launch, "--num_processes", str(processes), "--main_process_port", "0", path]


def job_environment(threads: int = 1) -> dict[str, str]:
    """An environment with a fixed number of threads, for bits that can be compared."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def run_job() -> Runner:
    """Runs a job of pipelines/ as a real process and returns what it printed."""

    def run(
        script: str, *arguments: object, processes: int = 1, threads: int = 1, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [*job_command(script, processes), *map(str, arguments)],
            env=job_environment(threads),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if check:
            assert result.returncode == 0, result.stderr
        return result

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


Caller = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call_job(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Caller:
    """Runs a job of pipelines/ within this process; its exit status, stdout and stderr.

    Seconds faster than a process of its own, for what needs none.
    """

    def call(script: str, *arguments: object) -> tuple[int, str, str]:
        AcceleratorState._reset_state(reset_partial_state=True)
        path = str(ROOT / "pipelines" / script)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        capfd.readouterr()
        code, message = 0, ""
        try:
            runpy.run_path(path)["main"]()
        except SystemExit as end:  # Python itself would print the message
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            message = end.code if isinstance(end.code, str) else ""
        out, err = capfd.readouterr()
        return code, out, err + message

    return call


@pytest.fixture
def near_job(call_job: Caller) -> Runner:
    """As `run_job` for one process, but within this one: seconds faster."""

    def run(
        script: str, *arguments: object, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        code, out, err = call_job(script, *arguments)
        if check:
            assert code == 0, err
        return subprocess.CompletedProcess([script, *map(str, arguments)], code, out, err)

    return run


def final_tensors(run: Path) -> dict[str, Tensor]:
    folder = find_checkpoint(run)
    return {
        f"{part}/{key}": value
        for part in ("model", "ema", "optimizer")
        for key, value in load_file(folder / f"{part}.safetensors").items()
    }


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, averages, optimizer and metrics are the same bits."""
    a, b = final_tensors(one), final_tensors(other)
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


def last_json(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON object that a job ends with."""
    return json.loads(result.stdout.strip().splitlines()[-1])
