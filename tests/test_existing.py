"""Other people's shards: indexed where they are, whatever their layout, and trained on."""

import io
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
from PIL import Image

from glowscale.config import parse_config
from glowscale.data import DataError, ShardError, ShardSet
from glowscale.data.existing import index_shards
from glowscale.training import Trainer
from tests.conftest import Runner, last_json

NAMES = ("cat", "dog", "owl")


def picture(i: int, width: int = 16, height: int = 16) -> np.ndarray:
    """A colour ramp of its own for every i, (H, W, 3)."""
    rng = np.random.default_rng(i)
    ramp = np.linspace(0, 1, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    return (ramp * rng.uniform(50, 255, 3)).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_jpegs(folder: Path) -> None:
    """Large JPEGs of several sizes with numbers for labels: the plain layout."""
    with webdataset.ShardWriter(str(folder / "part-%03d.tar"), maxcount=17, verbose=0) as writer:
        for i in range(60):
            jpeg = encoded(picture(i, 40 + i, 50), "JPEG")
            writer.write({"__key__": f"{i:05d}", "jpg": jpeg, "cls": i % 3})


def write_pngs(folder: Path) -> None:
    """PNGs in sub-folders with metadata as JSON, as downloaders write them."""
    for part in range(3):
        (folder / f"split_{part}").mkdir()
        pattern = str(folder / f"split_{part}" / "%d.tar")
        with webdataset.ShardWriter(pattern, maxcount=100, verbose=0) as writer:
            for i in range(part * 20, part * 20 + 20):
                info = {"caption": "an animal", "what": {"animal": NAMES[i % 3]}}
                png = encoded(picture(i), "PNG")
                writer.write({"__key__": f"a.b/{i}", "image.PNG": png, "json": info})


def write_arrays(folder: Path) -> None:
    """Arrays of pixels with the class's name as text; some samples have none."""
    with webdataset.ShardWriter(str(folder / "x%d.tar"), maxcount=25, verbose=0) as writer:
        for i in range(60):
            label = {} if i % 10 == 9 else {"txt": NAMES[i % 3] + "\n"}
            writer.write({"__key__": f"n{i}", "npy": picture(i), **label})


LAYOUTS: dict[str, tuple[Any, list[str]]] = {
    "jpegs": (write_jpegs, ["--resolution", "16"]),
    "pngs": (write_pngs, ["--image", "image.png", "--label", "json.what.animal"]),
    "arrays": (write_arrays, ["--label", "txt"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_layouts_of_others_are_indexed_and_trained_on(
    layout: str, tmp_path: Path, near_job: Runner, config_dict: dict[str, Any]
) -> None:
    theirs, out = tmp_path / "theirs", tmp_path / "index"
    theirs.mkdir()
    write, options = LAYOUTS[layout]
    write(theirs)
    before = {path: path.read_bytes() for path in theirs.rglob("*.tar")}
    command = ["shards", out, "--path", theirs, "--held-out", 0.3, *options, "--json"]
    facts = last_json(near_job("make_shards.py", *command))
    splits = [ShardSet(out / name) for name in ("train", "test")]
    assert facts["train"]["images"] + facts["test"]["images"] == 60
    assert 6 <= facts["test"]["images"] <= 30
    expected = ("0", "1", "2") if layout == "jpegs" else NAMES
    assert {shards.manifest.classes for shards in splits} == {expected}
    seen: set[int] = set()
    for shards in splits:
        keys = [
            sample.key
            for number, shard in enumerate(shards.manifest.shards)
            for sample in shards.read(number, 0, shard.samples)
        ]
        batch = shards.read_batch(0, shards.manifest.samples)
        for key, image, label in zip(keys, batch.images, batch.labels.tolist(), strict=True):
            i = int(key.rpartition("/")[2].strip("n"))
            seen.add(i)
            assert label == (-1 if layout == "arrays" and i % 10 == 9 else i % 3)
            if layout != "jpegs":
                assert np.array_equal(image.numpy().transpose(1, 2, 0), picture(i))
    assert seen == set(range(60))
    assert {path: path.read_bytes() for path in theirs.rglob("*.tar")} == before

    config_dict["data"]["dir"] = str(out)
    config_dict["train"] |= {"images": 32, "init_images": 8}
    evaluation = Trainer(parse_config(config_dict), Accelerator(cpu=True)).train()
    assert evaluation.images == facts["test"]["images"]
    assert evaluation.fingerprint == facts["test"]["fingerprint"]
    assert torch.isfinite(torch.tensor(evaluation.bits_per_dim))


def test_training_indexes_the_shards_that_its_config_names(
    tmp_path: Path, run_job: Runner, config_dict: dict[str, Any]
) -> None:
    (tmp_path / "theirs").mkdir()
    write_jpegs(tmp_path / "theirs")
    source = {"kind": "shards", "path": str(tmp_path / "theirs"), "resolution": 16}
    config_dict["data"] |= {"dir": str(tmp_path / "index"), "source": source}
    config_dict["train"] |= {"images": 16, "init_images": 8}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    result = run_job("train.py", tmp_path / "c.yaml", "data.workers=2", "--json", processes=2)
    assert last_json(result)["image_shape"] == [3, 16, 16]


def test_unreadable_samples_are_counted_named_and_passed_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = encoded(picture(1), "PNG")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(8):
            data = {2: good[:60], 5: b"no picture"}.get(i, good)
            writer.write({"__key__": f"k{i}", "png": data})
        writer.write({"__key__": "k8", "txt": "a caption and nothing else"})
    packed = index_shards(tmp_path / "index", tmp_path, split="all", label=None)["all"]
    assert (packed.manifest.samples, packed.skipped) == (6, 3)
    named = capfd.readouterr().err
    for key in ("k2", "k5", "k8"):
        assert f"skipped {tmp_path / 'a.tar'}, sample '{key}': " in named
    shards = ShardSet(tmp_path / "index" / "all")
    assert [s.key for s in shards.read(0, 1, 5)] == ["k1", "k3", "k4", "k6"]
    assert shards.read_batch(0, 6).labels.tolist() == [-1] * 6


def test_an_index_continues_after_its_last_whole_shard(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    write_jpegs(theirs)
    whole = index_shards(tmp_path / "whole", theirs, resolution=16)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name, kept in (("train", 2), ("test", 1)):  # a kill between the two
        (tmp_path / "cut" / name / "manifest.json").unlink()
        journal = tmp_path / "cut" / name / "shards.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[:kept]) + lines[kept][:40])
    shard = theirs / "part-000.tar"
    data = bytearray(shard.read_bytes())
    data[-9000:-5000] = bytes(4000)  # it is not read again
    shard.write_bytes(data)
    assert index_shards(tmp_path / "cut", theirs, resolution=16) == whole
    again = index_shards(tmp_path / "cut", theirs, resolution=16)
    assert all(packed.already for packed in again.values())


def test_what_cannot_be_indexed_is_named(tmp_path: Path) -> None:
    def index(name: str, samples: list[dict[str, Any]], **arguments: Any) -> None:  # noqa: ANN401
        (tmp_path / name).mkdir()
        with webdataset.TarWriter(str(tmp_path / name / "a.tar")) as writer:
            for sample in samples:
                writer.write(sample)
        index_shards(tmp_path / f"{name}_index", tmp_path / name, **arguments)

    png, other = encoded(picture(0), "PNG"), encoded(picture(0, 20, 12), "PNG")
    with pytest.raises(DataError, match=r"nowhere is no folder with WebDataset shards"):
        index_shards(tmp_path / "x", tmp_path / "nowhere")
    twice = [{"__key__": key, "png": png} for key in ("a", "b", "a")]
    with pytest.raises(ShardError, match=r"twice/a\.tar holds the sample 'a' twice"):
        index("twice", twice, split="all")
    with pytest.raises(DataError, match=r"sample 'b' has the shape \(3, 12, 20\), others"):
        index("sizes", [{"__key__": "a", "png": png}, {"__key__": "b", "png": other}], held_out=0)
    with pytest.raises(DataError, match=r"several images, png and jpg; name the one to use"):
        index("several", [{"__key__": "a", "png": png, "jpg": png}], split="all")
    with pytest.raises(DataError, match="has an image that can be read"):
        index("none", [{"__key__": "a", "txt": "words"}], split="all")
    with pytest.raises(DataError, match=r"No readable image .* is of the split 'test'"):
        index("one", [{"__key__": "a", "png": png}], held_out=1e-9)
    (tmp_path / "cut").mkdir()
    whole = (tmp_path / "several" / "a.tar").read_bytes()
    (tmp_path / "cut" / "a.tar").write_bytes(whole[:700])
    with pytest.raises(ShardError, match=r"cut/a\.tar is truncated"):
        index_shards(tmp_path / "cut_index", tmp_path / "cut")


def test_a_label_that_is_no_class_is_refused_on_reading(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for name in NAMES:
            writer.write({"__key__": name, "npy": picture(0), "txt": name})
    index_shards(tmp_path / "index", tmp_path, split="all", label="txt")
    path = tmp_path / "index" / "all" / "manifest.json"
    content = json.loads(path.read_text())
    assert content["classes"] == list(NAMES)
    path.write_text(json.dumps({**content, "classes": ["cat", "dog"]}))
    with pytest.raises(
        DataError, match=r"'owl' .* has the label 'owl'; it must be one of cat, dog"
    ):
        ShardSet(tmp_path / "index" / "all").read_batch(0, 3)
