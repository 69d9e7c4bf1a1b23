"""A folder as people have it: real photographs, and what else lies between them.

GLOWSCALE_PHOTOGRAPHS=FOLDER pytest tests/test_photographs.py, where the folder holds a few hundred
photographs, such as those of Debian's background packages below /usr/share.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glowscale.data import ShardSet
from tests.conftest import ROOT, Runner, last_json

FOLDER = os.environ.get("GLOWSCALE_PHOTOGRAPHS")


def add_oddities(tree: Path) -> None:
    """A truncated JPEG, a text file, an animation, a single pixel, and names in other scripts."""
    photograph = max(tree.rglob("*.jpg"), key=lambda path: path.stat().st_size)
    (tree / "truncated.jpg").write_bytes(photograph.read_bytes()[:50_000])
    (tree / "text.png").write_text("A list of things to buy.")
    Image.new("RGB", (1, 1)).save(tree / "pixel.png")
    frames = [Image.new("RGB", (80, 60), (40 * i, 0, 255 - 40 * i)) for i in range(5)]
    frames[0].save(tree / "animation.gif", save_all=True, append_images=frames[1:])
    for name in ("фото", "写真", "φωτογραφία", "صورة"):
        (tree / name).mkdir()
        shutil.copy(photograph, tree / name / f"{name} 1.jpg")


@pytest.mark.skipif(not FOLDER, reason="GLOWSCALE_PHOTOGRAPHS names no folder of photographs")
def test_a_folder_of_photographs_is_packed_counted_trained_on_and_sampled(
    tmp_path: Path, run_job: Runner
) -> None:
    tree = tmp_path / "my_images"
    shutil.copytree(str(FOLDER), tree, ignore_dangling_symlinks=True)
    add_oddities(tree)
    config = ROOT / "configs" / "my_images.yaml"
    source = ["--path", tree, "--resolution", 64, "--json"]
    packed = run_job("make_shards.py", "folder", tmp_path / "data", *source)
    print(packed.stderr)
    facts = last_json(packed)
    extensions = Image.registered_extensions()
    files = [p for p in tree.rglob("*") if p.is_file() and p.suffix.lower() in extensions]
    assert len(files) > 300
    images = sum(split["images"] for split in facts.values())
    skipped = sum(split["skipped"] for split in facts.values())
    assert images + skipped == len(files)
    for name in ("truncated.jpg", "text.png", "pixel.png"):
        assert f"skipped {tree / name}: " in packed.stderr
    keys = [
        sample.key
        for shards in (ShardSet(tmp_path / "data" / name) for name in ("train", "test"))
        for number, shard in enumerate(shards.manifest.shards)
        for sample in shards.read(number, 0, shard.samples)
    ]
    assert {"animation_gif", "写真/写真 1_jpg", "صورة/صورة 1_jpg"} < set(keys)
    again = run_job("make_shards.py", "folder", tmp_path / "data", *source)
    assert "already done" in again.stderr
    overrides = [f"run.dir={tmp_path / 'run'}", f"data.dir={tmp_path / 'data'}"]
    steps = ["train.images=320", "model.depth=2", "evaluate.every=160", "log.every=32"]
    trained = run_job("train.py", config, *overrides, *steps, "--json")
    print(trained.stderr)
    assert last_json(trained)["image_shape"] == [3, 64, 64]
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    figures = [line["bits_per_dim"] for line in lines if line["kind"] == "held_out"]
    assert figures[-1] < figures[0] < 8.5
    out = tmp_path / "samples"
    run_job("sample.py", tmp_path / "run", "--count", 16, "--out", out)
    assert np.asarray(Image.open(out / "grid.png")).std() > 10
