"""Generation: image i depends on (checkpoint, seed, i, temperature), and on nothing else."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
import yaml
from PIL import Image
from torch import Tensor

from glowscale.data import ShardSet
from glowscale.data.existing import index_shards
from glowscale.errors import UserError
from glowscale.files import ClaimError
from glowscale.models import MultiscaleFlow
from glowscale.pictures import save_grid
from glowscale.sampling import generate, sample_blocks, sample_images
from tests.conftest import Runner, last_json, tiny_glow


@pytest.fixture
def model() -> MultiscaleFlow:
    return tiny_glow((1, 8, 8), 16, levels=2)


def options(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "count": 23,
        "seed": 4,
        "temperature": 0.8,
        "identity": {"checkpoint": "abc"},
        "shard_size": 10,
        "block": 4,
        **changes,
    }


def read(paths: list[Path]) -> dict[str, bytes]:
    dataset = webdataset.WebDataset([str(p) for p in paths], shardshuffle=False)
    return {sample["__key__"]: sample["png"] for sample in dataset}


def test_images_depend_neither_on_ranges_nor_on_blocks(model: MultiscaleFlow) -> None:
    whole = sample_blocks(model, 0, range(30), 1.0, block=8)
    assert torch.equal(sample_blocks(model, 0, range(11, 21), 1.0, block=8), whole[11:21])
    assert whole.dtype == torch.uint8
    assert int(whole.max()) < 16
    alone = sample_images(model, 0, range(13, 14))
    assert float((alone[0] != whole[13]).float().mean()) < 0.02  # but for a float's last bit


def test_ranks_and_restarts_give_the_same_shards(model: MultiscaleFlow, tmp_path: Path) -> None:
    whole = generate(model, tmp_path / "whole", **options())
    assert [path.name for path in whole] == [f"shard-{i:06d}.tar" for i in range(3)]
    for rank in (1, 0):
        parts = generate(model, tmp_path / "parts", **options(), part=rank, parts=2)
    assert [p.read_bytes() for p in parts] == [p.read_bytes() for p in whole]
    assert sorted(read(whole)) == [f"{i:09d}" for i in range(23)]
    kept = {path: path.stat().st_mtime_ns for path in parts}
    before = parts[1].read_bytes()
    parts[1].unlink()
    generate(model, tmp_path / "parts", **options())
    assert parts[1].read_bytes() == before
    assert all(path.stat().st_mtime_ns == kept[path] for path in (parts[0], parts[2]))


def test_a_folder_of_another_job_is_refused(model: MultiscaleFlow, tmp_path: Path) -> None:
    generate(model, tmp_path / "a", **options(count=4))
    with pytest.raises(ClaimError, match="its seed is 4, not 5"):
        generate(model, tmp_path / "a", **options(count=4, seed=5))
    with pytest.raises(ClaimError, match="its checkpoint is 'abc', not 'xyz'"):
        generate(model, tmp_path / "a", **options(count=4, identity={"checkpoint": "xyz"}))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "precious.tar").write_bytes(b"")
    with pytest.raises(ClaimError, match="holds shards but no"):
        generate(model, tmp_path / "b", **options())


def test_a_model_that_blew_up_is_an_error_not_black_images(model: MultiscaleFlow) -> None:
    with torch.no_grad():
        model.prior.mean[0] = float("inf")
    with pytest.raises(UserError, match="Sample 3 of seed 0 is not finite"):
        sample_images(model, 0, range(3, 5))


def test_images_that_nobody_asked_for_fail_no_job(
    model: MultiscaleFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(images: Tensor, labels: Tensor) -> Tensor:
        images[5] = math.nan
        return images

    monkeypatch.setattr(model, "denoise", spoil)
    assert len(sample_blocks(model, 0, range(2, 5), 1.0, block=8)) == 3
    with pytest.raises(UserError, match="Sample 5 of seed 0 is not finite"):
        sample_blocks(model, 0, range(2, 6), 1.0, block=8)


def test_the_job_writes_shards_and_a_grid(
    config_dict: dict[str, Any], tmp_path: Path, run_job: Runner, near_job: Runner
) -> None:
    config_dict["train"]["images"] = 16
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    near_job("train.py", tmp_path / "c.yaml")
    common = ["--count", 20, "--seed", 3, "--temperature", 0.7, "--shard-size", 6, "--json"]
    one = last_json(near_job("sample.py", tmp_path / "run", "--out", tmp_path / "one", *common))
    two = last_json(
        run_job("sample.py", tmp_path / "run", "--out", tmp_path / "two", *common, processes=2)
    )
    assert one["images"] == 20
    images = [read([Path(p) for p in result["shards"]]) for result in (one, two)]
    assert images[0] == images[1]
    assert len(images[0]) == 20
    assert Image.open(tmp_path / "one" / "grid.png").size[0] > 300


def test_a_grid_shows_the_full_range_of_greys(tmp_path: Path) -> None:
    images = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    images[0] = 16
    save_grid(images, 17, tmp_path / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.max() == 255
    assert pixels.shape[2] == 3


def test_a_full_disk_leaves_whole_shards_and_is_named(
    model: MultiscaleFlow, small_disk: Path
) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 150_000)
    out, job = small_disk / "out", options(count=60, shard_size=12)
    with pytest.raises(OSError, match="No space left on device") as full:
        generate(model, out, **job)
    assert "shard-" in str(full.value.filename)
    there = sorted(out.glob("*.tar"))
    assert 0 < len(there) < 5
    assert len(read(there)) == 12 * len(there)
    assert not [*out.glob("*.partial")]
    kept = {path: path.read_bytes() for path in there}
    filler.unlink()
    shards = generate(model, out, **job)
    assert len(read(shards)) == 60
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_samples_note_what_made_them_and_are_read_as_any_shards(tmp_path: Path) -> None:
    model = tiny_glow((1, 8, 8), 256, levels=2, classes=3, class_channels=4)
    out = tmp_path / "samples"
    names = ["cat", "dog", "owl"]
    shards = generate(model, out, **options(classes=names))
    dataset = webdataset.WebDataset([str(p) for p in shards], shardshuffle=False).decode("rgb8")
    samples = list(dataset)
    assert [sample["json"]["index"] for sample in samples] == list(range(23))
    for index, sample in enumerate(samples):
        note = {
            "index": index,
            "seed": 4,
            "temperature": 0.8,
            "class": ["cat", "dog", "owl"][index % 3],
        }
        assert sample["json"] == note
        assert sample["cls"] == index % 3
    index_shards(tmp_path / "index", out, split="train", channels=1)
    block = ShardSet(tmp_path / "index" / "train").read_batch(0, 23)
    expected = sample_blocks(model, 4, range(23), 0.8, block=4)
    assert torch.equal(block.images, expected)
    assert block.labels.tolist() == [i % 3 for i in range(23)]
