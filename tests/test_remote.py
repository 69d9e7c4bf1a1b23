"""Training from elsewhere and in spite of damage: HTTP servers, caches, lost shards."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from glowscale.checkpoint import find_checkpoint
from glowscale.config import parse_config
from glowscale.data import ShardError
from glowscale.data.existing import index_shards
from glowscale.training import Trainer
from tests.conftest import Runner
from tests.servers import serving


def weights_after(config: dict[str, Any], run: Path, **data: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """The weights of a short run whose section `data` is changed."""
    AcceleratorState._reset_state(reset_partial_state=True)
    content = json.loads(json.dumps(config))
    content["run"]["dir"] = str(run)
    content["data"] |= {"transfer": {"attempts": 9, "pause": 0.002}, **data}
    content["train"]["images"] = 128
    Trainer(parse_config(content), Accelerator(cpu=True)).train()
    return load_file(find_checkpoint(run) / "model.safetensors")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("behaviour", ["well", "truncates", "busy", "rangeless"])
def test_training_over_http_gives_the_weights_of_a_local_disk(
    behaviour: str, config_dict: dict[str, Any], data_dir: Path, tmp_path: Path
) -> None:
    local = weights_after(config_dict, tmp_path / "local")
    with serving(data_dir) as server:
        far = weights_after(config_dict, tmp_path / "far", dir=server.url(behaviour), workers=2)
    assert_same(local, far)


def test_a_cache_asks_for_every_shard_once(
    config_dict: dict[str, Any], data_dir: Path, tmp_path: Path
) -> None:
    local = weights_after(config_dict, tmp_path / "local")
    cache = {"dir": str(tmp_path / "cache"), "gigabytes": 1.0}
    with serving(data_dir) as server:
        url = server.url("truncates")
        far = weights_after(config_dict, tmp_path / "far", dir=url, cache=cache, workers=2)
        asked = {path for path, start in server.requests if path.endswith(".tar") and not start}
        requests = [path for path, start in server.requests if path in asked and not start]
        assert len(requests) == len(asked)
        before = server.sent
        again = weights_after(config_dict, tmp_path / "again", dir=url, cache=cache)
        assert server.sent - before < 100_000  # manifests and offsets
    assert_same(local, far)
    assert_same(local, again)


def test_a_server_that_never_answers_ends_the_run_with_its_url(
    config_dict: dict[str, Any], data_dir: Path, tmp_path: Path
) -> None:
    with serving(data_dir) as server, pytest.raises(ShardError) as caught:
        weights_after(config_dict, tmp_path / "run", dir=server.url("always_busy"))
    assert f"{server.url('always_busy')}/train/manifest.json cannot be read" in str(caught.value)
    assert "HTTP Error 503" in str(caught.value)


def test_shards_behind_urls_are_indexed_and_trained_on_where_they_are(
    config_dict: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "far").mkdir()
    for part in range(3):
        with webdataset.TarWriter(str(tmp_path / "far" / f"part-{part}.tar")) as writer:
            for i in range(20):
                image = np.full((8, 8, 3), 4 * (20 * part + i), np.uint8)
                writer.write({"__key__": f"{part}_{i:02d}", "npy": image, "cls": str(part)})
    with serving(tmp_path / "far") as server:
        urls = server.url("rangeless") + "/part-{0..2}.tar"
        packed = index_shards(tmp_path / "index", urls, held_out=0.3)
        assert sum(split.manifest.samples for split in packed.values()) == 60
        assert packed["train"].manifest.classes == ("0", "1", "2")
        weights_after(config_dict, tmp_path / "run", dir=str(tmp_path / "index"))
    local = index_shards(tmp_path / "local", tmp_path / "far", held_out=0.3)
    for name, split in packed.items():
        assert split.manifest.fingerprint == local[name].manifest.fingerprint


@pytest.fixture
def damaged(data_dir: Path, tmp_path: Path) -> Path:
    """The data with one training shard cut short and one broken image in another."""
    folder = tmp_path / "damaged"
    shutil.copytree(data_dir, folder)
    cut = folder / "train" / "shard-000001.tar"
    cut.write_bytes(cut.read_bytes()[:9000])
    broken = folder / "train" / "shard-000003.tar"
    data = bytearray(broken.read_bytes())
    place = data.index(b"IDAT")
    data[place + 8] ^= 255
    broken.write_bytes(data)
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_damage_ends_a_run_on_every_rank_in_one_sentence(
    processes: int, damaged: Path, config_dict: dict[str, Any], tmp_path: Path, run_job: Runner
) -> None:
    config_dict["data"]["dir"] = str(damaged)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    result = run_job("train.py", tmp_path / "c.yaml", processes=processes, check=False)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert errors
    assert all(str(damaged / "train" / "shard-00000") in line for line in errors)
    assert "  File " not in result.stderr.partition("elastic")[0]


def test_tolerated_damage_leaves_holes_alike_on_one_and_two_processes(
    damaged: Path, config_dict: dict[str, Any], tmp_path: Path, run_job: Runner
) -> None:
    config_dict["data"] |= {"dir": str(damaged), "lost_limit": 2}
    config_dict["train"] |= {"precision": "float64"}
    config_dict["log"]["every"] = 16
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    runs = {n: tmp_path / f"processes_{n}" for n in (1, 2)}
    for processes, run in runs.items():
        overrides = [f"run.dir={run}", "data.workers=2"]
        result = run_job("train.py", tmp_path / "c.yaml", *overrides, processes=processes)
        assert result.stderr.count("WARNING: ") == 2
        assert "shard-000001.tar has 9000 bytes; the manifest says" in result.stderr
        assert "Lost shards: 2, of 2." in result.stderr
        state = json.loads((find_checkpoint(run) / "state.json").read_text())
        assert state["images"] == 320
        assert state["lost_shards"] == ["shard-000001.tar", "shard-000003.tar"] or state[
            "lost_shards"
        ] == ["shard-000003.tar", "shard-000001.tar"]
    lines = [
        [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
        for run in runs.values()
    ]
    for one, two in zip(*lines, strict=True):
        assert one.pop("kind") == two.pop("kind")
        assert one == pytest.approx(two, rel=0, abs=1e-8)
    one, two = (load_file(find_checkpoint(run) / "model.safetensors") for run in runs.values())
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=0, atol=1e-8, msg=key)
