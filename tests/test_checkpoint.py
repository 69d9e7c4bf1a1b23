"""Checkpoints: whole or absent, verified, never executed."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glowscale.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_tensors,
    read_checkpoint,
    resume_checkpoint,
    save_checkpoint,
)
from glowscale.training.optimizer import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)
from tests.conftest import tiny_glow


def tensors(value: float) -> dict[str, dict[str, Tensor]]:
    # channels_last: not contiguous, as a trained model's weights are
    weight = torch.full((2, 3, 4, 4), value).to(memory_format=torch.channels_last)
    return {part: {"w": weight, "n": torch.tensor(7)} for part in ("model", "ema", "optimizer")}


def save(run: Path, images: int, keep: int = 2) -> Path:
    state = {"images": images, "window": [0.1 + 0.2, 3.0]}
    return save_checkpoint(run / "checkpoints", images, tensors(images), state, keep)


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save(tmp_path, 5))
    assert checkpoint.state == {"images": 5, "window": [0.1 + 0.2, 3.0]}
    for part, values in tensors(5).items():
        assert all(torch.equal(checkpoint.tensors[part][key], v) for key, v in values.items())


def test_older_checkpoints_are_pruned_after_the_new_one_stands(tmp_path: Path) -> None:
    paths = [save(tmp_path, images) for images in (0, 10, 20, 30)]
    assert [path.exists() for path in paths] == [False, False, True, True]
    assert find_checkpoint(tmp_path) == paths[-1]
    assert find_checkpoint(paths[2]) == paths[2]
    only = save(tmp_path, 40, keep=1)
    left = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()]
    assert left == [only.name]


def test_of_every_so_many_images_the_first_checkpoint_stays(tmp_path: Path) -> None:
    for images in range(5, 100, 10):
        state = {"images": images}
        save_checkpoint(tmp_path, images, tensors(images), state, keep=2, keep_every=30)
    left = sorted(int(path.name[-12:]) for path in tmp_path.iterdir() if path.is_dir())
    assert left == [5, 35, 65, 85, 95]
    for path in tmp_path.glob("images-*"):
        assert read_checkpoint(path).state["images"] == int(path.name[-12:])


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "pickle"])
def test_damage_is_named_and_an_unattended_resume_falls_back(
    tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    path = newest / name
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        flipped = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
        evil = pickle.dumps(Exploding())
        path.write_bytes({"flip": flipped, "truncate": data[:-1], "pickle": evil}[damage])
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(find_checkpoint(tmp_path))
    fallback = resume_checkpoint(tmp_path / "checkpoints")
    assert fallback is not None
    assert fallback.state["images"] == 10
    assert name in capsys.readouterr().err
    # Training goes on from there; the damaged one must not outlive better ones.
    save(tmp_path, 15, keep=1)
    assert find_checkpoint(tmp_path).name.endswith("15")
    assert not newest.exists()


class Exploding:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was executed",))


def test_files_of_another_run_are_refused(tmp_path: Path) -> None:
    ours, theirs = save(tmp_path / "a", 10), save(tmp_path / "b", 20)
    shutil.copy(theirs / "ema.safetensors", ours / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors is damaged"):
        read_checkpoint(ours)
    shutil.copytree(theirs, ours, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: .* pointer's"):
        read_checkpoint(ours)


def test_no_checkpoint_no_resume_but_none_valid_is_an_error(tmp_path: Path) -> None:
    assert resume_checkpoint(tmp_path / "checkpoints") is None
    (save(tmp_path, 10) / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* verifies"):
        resume_checkpoint(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="neither a checkpoint nor the folder of a run"):
        find_checkpoint(tmp_path / "elsewhere")


def test_an_unfinished_or_foreign_checkpoint_is_not_taken(tmp_path: Path) -> None:
    save(tmp_path, 10)
    whole = save(tmp_path, 20)
    shutil.copytree(whole, whole.with_name("images-000000000030.partial"))
    resumed = resume_checkpoint(tmp_path / "checkpoints")
    assert resumed is not None
    assert resumed.path == whole
    manifest = json.loads((whole / "manifest.json").read_text())
    (whole / "manifest.json").write_text(json.dumps({**manifest, "format": "glowscale 99"}))
    (tmp_path / "checkpoints" / "latest.json").unlink()
    with pytest.raises(CheckpointError, match="format 'glowscale 99'"):
        read_checkpoint(whole)


def test_a_damaged_pointer_does_not_stop_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = save(tmp_path, 10)
    (tmp_path / "checkpoints" / "latest.json").write_text("{")
    resumed = resume_checkpoint(tmp_path / "checkpoints")
    assert resumed is not None
    assert resumed.path == newest
    assert "latest.json is damaged" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"latest\.json is damaged"):
        find_checkpoint(tmp_path)


def test_folders_that_a_user_made_are_neither_resumed_nor_pruned(tmp_path: Path) -> None:
    first = save(tmp_path, 10)
    best = shutil.copytree(first, first.with_name("keep-best"))
    assert save(tmp_path, 20, keep=1) == find_checkpoint(tmp_path)
    resumed = resume_checkpoint(tmp_path / "checkpoints")
    assert resumed is not None
    assert resumed.state["images"] == 20
    assert read_checkpoint(best).state["images"] == 10


def test_tensors_that_do_not_fit_are_named() -> None:
    model, other = tiny_glow(hidden_channels=8), tiny_glow(hidden_channels=4)
    with pytest.raises(CheckpointError, match=r"at \d+ tensors, the first being 'levels\.0"):
        load_tensors(model, other.state_dict(), Path("x.safetensors"))


@pytest.mark.parametrize("kind", ["adamax", "adamw"])
def test_optimizer_state_continues_bit_by_bit(tmp_path: Path, kind: str) -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = tiny_glow((1, 8, 8)).to(memory_format=torch.channels_last)
        return model, build_optimizer(model, kind, 1e-2, 0.9, 0.99, 0.1)

    images = torch.randint(0, 4, (8, 1, 8, 8))

    def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        noise = torch.full((8, 1, 8, 8), 0.5)
        optimizer.zero_grad()
        (-model(images, None, noise).log_prob.mean()).backward()
        optimizer.step()

    model, optimizer = make()
    update(model, optimizer)
    saved = {
        "model": model.state_dict(),
        "ema": {},
        "optimizer": optimizer_tensors(optimizer, model),
    }
    path = save_checkpoint(tmp_path, 1, saved, {}, 1)
    update(model, optimizer)

    resumed, resumed_optimizer = make()
    checkpoint = read_checkpoint(path)
    load_tensors(resumed, checkpoint.tensors["model"], path)
    load_optimizer_tensors(resumed_optimizer, resumed, checkpoint.tensors["optimizer"])
    update(resumed, resumed_optimizer)
    for (name, a), b in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.stride() == b.stride(), name
        for quantity, value in optimizer.state[a].items():
            assert torch.equal(value, resumed_optimizer.state[b][quantity]), (name, quantity)
