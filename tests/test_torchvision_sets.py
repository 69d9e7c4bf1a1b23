"""torchvision's data sets as sources, offline: on files in the formats that torchvision reads."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from glowscale.data import DataError, ShardSet, make_shards
from glowscale.data.torchvision_sets import SETS, torchvision
from tests.conftest import ROOT, Runner, last_json
from tests.test_shards import write_idx


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Files of CIFAR-10's format with images of our own, (6, 3, 32, 32), five of them training."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), np.uint8)
    files = [*(name for name, _ in datasets.CIFAR10.train_list), "test_batch"]
    for i, name in enumerate(files):
        content = {"data": images[i].reshape(1, -1), "labels": [i + 1]}
        (folder / name).write_bytes(pickle.dumps(content))
    names = [f"class {i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    # torchvision knows the hashes of the real files; ours have others.
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, None] for name in files[:5]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", None]])
    meta = {**datasets.CIFAR10.meta, "md5": None}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return images


def test_cifar10_is_packed_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_cifar(tmp_path / "root", monkeypatch)
    arguments = {"dataset": "CIFAR10", "root": tmp_path / "root"}
    packed = make_shards("torchvision", arguments, tmp_path / "out", shard_size=3)
    assert {name: split.manifest.samples for name, split in packed.items()} == {
        "train": 5,
        "test": 1,
    }
    manifest = packed["test"].manifest
    assert (manifest.image_shape, manifest.grey_levels) == ((3, 32, 32), 256)
    assert manifest.classes == tuple(f"class {i}" for i in range(10))
    test = ShardSet(tmp_path / "out" / "test").read_batch(0, 1)
    assert np.array_equal(test.images[0].numpy(), images[5])
    assert test.labels.tolist() == [6]
    train = ShardSet(tmp_path / "out" / "train").read_batch(0, 5)
    for image, label in zip(train.images.numpy(), train.labels.tolist(), strict=True):
        assert np.array_equal(image, images[label - 1])


def test_images_are_resized_and_cut_to_fewer_grey_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_cifar(tmp_path, monkeypatch)
    split = torchvision("CIFAR10", tmp_path, grey_levels=32)[1]
    assert np.array_equal(split.sample(0).image, images[5] // 8)
    assert split.grey_levels == 32
    small = torchvision("CIFAR10", tmp_path, resolution=8)[1]
    assert small.image_shape == small.sample(0).image.shape == (3, 8, 8)


def test_fashion_mnist_files_are_packed_by_the_job(tmp_path: Path, near_job: Runner) -> None:
    raw = tmp_path / "root" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = write_idx(raw, zipped=False)
    options = ["--dataset", "FashionMNIST", "--root", tmp_path / "root", "--json"]
    result = near_job("make_shards.py", "torchvision", tmp_path / "out", *options)
    assert len(result.stdout.splitlines()) == 1
    assert last_json(result)["test"]["images"] == 5
    shards = ShardSet(tmp_path / "out" / "test")
    assert shards.manifest.classes[0] == "T-shirt/top"
    batch = shards.read_batch(0, 5)
    assert np.array_equal(batch.images.numpy(), images[:5, None])
    assert batch.labels.tolist() == [0, 1, 2, 0, 1]


def test_an_image_folder_is_parted_by_key(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (20, 20), (i, 0, 0)).save(root / name / f"{i}.png")
    (root / "b" / "broken.png").write_text("no picture")
    arguments = {"dataset": "ImageFolder", "root": root, "resolution": 16, "held_out": 0.2}
    packed = make_shards("torchvision", arguments, tmp_path / "out", shard_size=100)
    counts = {name: split.manifest.samples for name, split in packed.items()}
    assert sum(counts.values()) == 20
    assert sum(split.skipped for split in packed.values()) == 1
    assert 0 < counts["test"] < 10
    assert packed["train"].manifest.classes == ("a", "b")
    held = {s.key for s in ShardSet(tmp_path / "out" / "test").read(0, 0, counts["test"])}
    Image.new("RGB", (20, 20)).save(root / "a" / "0_new.png")  # before all others
    (root / "b" / "broken.png").unlink()
    more = make_shards("torchvision", arguments, tmp_path / "more", shard_size=100)["test"]
    keys = {s.key for s in ShardSet(tmp_path / "more" / "test").read(0, 0, more.manifest.samples)}
    assert held <= keys <= held | {"a/0_new_png"}


def test_what_cannot_be_had_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")  # nobody listens: no network
    with pytest.raises(DataError, match=r"MNIST is not in .*root and cannot be downloaded \("):
        torchvision("MNIST", tmp_path / "root")
    with pytest.raises(DataError, match="no data set 'CIFAR11'; there are CIFAR10, CIFAR100"):
        torchvision("CIFAR11", tmp_path)
    with pytest.raises(DataError, match=r"ImageFolder cannot be read from .*nowhere"):
        torchvision("ImageFolder", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"ImageNet cannot be read from"):
        torchvision("ImageNet", tmp_path)


def test_the_readme_lists_the_data_sets() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    assert ", ".join(SETS) in text
