"""A user's own tree of images: each file as a person sees it, and none of them fatal."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from glowscale.data import DataError, ShardSet
from glowscale.data.errors import UnreadableError
from glowscale.data.folder import folder
from glowscale.data.view import View
from tests.conftest import Runner, last_json

TOP, BOTTOM = (200, 30, 60), (20, 90, 220)


def two_halves(width: int = 64, height: int = 64) -> Image.Image:
    """An image whose upper half and lower half differ."""
    image = Image.new("RGB", (width, height), TOP)
    image.paste(BOTTOM, (0, height // 2, width, height))
    return image


def assert_shows_halves(pixels: np.ndarray, tolerance: int = 4) -> None:
    """The picture of `two_halves`, whatever it was stored as."""
    assert pixels.dtype == np.uint8
    rows = pixels.shape[1]
    upper = pixels[:, : rows // 2 - 1].reshape(3, -1).mean(1)
    lower = pixels[:, rows // 2 + 1 :].reshape(3, -1).mean(1)
    np.testing.assert_allclose(upper, TOP, atol=tolerance)
    np.testing.assert_allclose(lower, BOTTOM, atol=tolerance)


@pytest.mark.parametrize(
    "name", ["a.png", "a.jpg", "a.JPEG", "a.webp", "a.bmp", "a.tiff", "a.ppm", "a.gif"]
)
def test_formats(tmp_path: Path, name: str) -> None:
    two_halves().save(tmp_path / name)
    assert_shows_halves(View(16).read(tmp_path / name), tolerance=8)


def test_camera_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned; viewers rotate by 90° clockwise
    two_halves().transpose(Image.Transpose.ROTATE_90).save(
        tmp_path / "a.jpg", exif=exif, quality=95
    )
    assert_shows_halves(View(16).read(tmp_path / "a.jpg"), tolerance=8)


def test_cmyk_and_palettes_become_colours(tmp_path: Path) -> None:
    two_halves().convert("CMYK").save(tmp_path / "a.tiff")
    assert_shows_halves(View(16).read(tmp_path / "a.tiff"))
    two_halves().quantize(8).save(tmp_path / "a.png")
    assert_shows_halves(View(16).read(tmp_path / "a.png"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 16, 32, 32))
    image.convert(mode).save(tmp_path / "a.png")
    pixels = View(32).read(tmp_path / "a.png")
    assert pixels[:, :15].min() == 255
    assert pixels[:, 17:].max() == 0


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 32).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (32, 1))).save(tmp_path / "a.png")
    row = View(32).read(tmp_path / "a.png")[0, 16].astype(int)
    np.testing.assert_allclose(row, ramp / 257, atol=1)


def test_wide_and_tall_images_keep_their_centre_and_are_antialiased(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), (255, 0, 0))
    image.paste((0, 255, 0), (100, 0, 200, 100))
    image.save(tmp_path / "a.png")
    pixels = View(10).read(tmp_path / "a.png")
    assert pixels[1, :, 1:-1].min() > 240
    checks = np.indices((64, 64)).sum(0) % 2 * 255  # finer than the result's pixels
    Image.fromarray(checks.astype(np.uint8)).save(tmp_path / "b.png")
    grey = View(8, channels=1).read(tmp_path / "b.png")
    assert grey.shape == (1, 8, 8)
    assert abs(grey.astype(float) - 127.5).max() < 12


def make_tree(root: Path) -> None:
    """Twelve good images in two classes and three scripts, one beside them, five bad ones."""
    for index in range(6):
        for name in ("кошки", "犬"):
            (root / name).mkdir(parents=True, exist_ok=True)
            two_halves(40 + index, 50).save(root / name / f"bild.{index}.png")
    two_halves().save(root / "ünterwegs.jpg")
    (root / "犬" / "text.png").write_text("not a picture")
    Image.new("RGB", (1, 1)).save(root / "犬" / "pixel.png")
    two_halves(400, 400).save(root / "кошки" / "cut.jpg")
    cut = (root / "кошки" / "cut.jpg").read_bytes()
    (root / "кошки" / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    (root / "кошки" / "empty.webp").write_bytes(b"")
    (root / "notes.txt").write_text("no image, and no image's name")
    (root / ".hidden.png").write_text("")


def test_a_tree_is_packed_counted_trained_on_and_sampled(
    tmp_path: Path, near_job: Runner, config_dict: dict[str, Any]
) -> None:
    make_tree(tmp_path / "tree")
    out = tmp_path / "data"
    options = ["--path", tmp_path / "tree", "--resolution", 16, "--held-out", 0.2]
    result = near_job("make_shards.py", "folder", out, *options, "--shard-size", 5, "--json")
    facts = last_json(result)
    assert facts["train"]["images"] + facts["test"]["images"] == 13
    assert facts["train"]["skipped"] + facts["test"]["skipped"] == 4
    for bad in ("text.png: not an image", "pixel.png: 1×1 is too small", "cut.jpg", "empty.webp"):
        assert bad in result.stderr
    train, test = ShardSet(out / "train"), ShardSet(out / "test")
    assert train.manifest.classes == ("кошки", "犬")
    raw = [
        s
        for x in (train, test)
        for n, e in enumerate(x.manifest.shards)
        for s in x.read(n, 0, e.samples)
    ]
    labels = {sample.key: sample.files.get("cls") for sample in raw}
    assert labels["кошки/bild_3_png"] == b"0"
    assert labels["犬/bild_3_png"] == b"1"
    assert labels["ünterwegs_jpg"] is None

    config_dict["data"]["dir"] = str(out)
    config_dict["train"] |= {"images": 32, "init_images": 8}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    trained = last_json(near_job("train.py", tmp_path / "c.yaml", "--json"))
    assert trained["image_shape"] == [3, 16, 16]
    near_job("sample.py", tmp_path / "run", "--count", 4, "--out", tmp_path / "samples")
    assert Image.open(tmp_path / "samples" / "grid.png").mode == "RGB"


def test_packing_does_not_depend_on_the_number_of_threads(
    tmp_path: Path, near_job: Runner
) -> None:
    make_tree(tmp_path / "tree")
    manifests = []
    for workers in (1, 4):
        out = tmp_path / f"data_{workers}"
        options = ["--path", tmp_path / "tree", "--resolution", 16, "--workers", workers]
        near_job("make_shards.py", "folder", out, *options)
        manifests.append(json.loads((out / "train" / "manifest.json").read_text()))
    assert manifests[0] == manifests[1]


def test_what_cannot_be_packed_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no folder .*nowhere"):
        folder(tmp_path / "nowhere", 16)
    with pytest.raises(DataError, match="hold no file with an image's extension"):
        folder(tmp_path, 16)
    two_halves().save(tmp_path / "a.b.png")
    two_halves().save(tmp_path / "a_b.png")
    with pytest.raises(DataError, match=r"a\.b\.png and .*a_b\.png would have the same key"):
        folder(tmp_path, 16)
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(UnreadableError, match=r"image file is truncated|not an image|broken"):
        View(16).read(tmp_path / "x.png")
