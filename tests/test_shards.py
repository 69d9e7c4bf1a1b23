"""Packing and reading back: lossless, indexed, and readable by webdataset itself."""

import gzip
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
import yaml

from glowscale.data import DataError, ShardSet
from glowscale.data.digits import digits
from glowscale.data.idx import idx
from glowscale.data.images import decode_png, encode_png
from glowscale.data.manifest import Fingerprint, load_manifest
from glowscale.data.sources import Sample
from glowscale.data.writer import pack, pack_split
from glowscale.files import TEMPORARY, ClaimError, sha256_of
from tests.conftest import Caller, Runner, job_command, job_environment, last_json, random_split


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    pack(digits(), folder, shard_size=400)
    return folder


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_are_stored_without_loss(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (channels, 5, 7), np.uint8)
    assert np.array_equal(decode_png(encode_png(image)), image)


def test_pixels_that_png_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="2 channels of uint8"):
        encode_png(np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="not a readable PNG"):
        decode_png(b"no image at all")


def test_digits_keep_297_images_apart(digits_dir: Path) -> None:
    train, test = (ShardSet(digits_dir / name) for name in ("train", "test"))
    assert (train.manifest.samples, test.manifest.samples) == (1500, 297)
    assert train.manifest.image_shape == (1, 8, 8)
    assert train.manifest.grey_levels == 17
    source = {
        sample.key: sample for split in digits() for sample in map(split.sample, range(split.size))
    }
    assert len(source) == 1797
    keys = []
    for shards in (train, test):
        for number, shard in enumerate(shards.manifest.shards):
            for raw in shards.read(number, 0, shard.samples):
                keys.append(raw.key)
                assert np.array_equal(decode_png(raw.files["png"]), source[raw.key].image)
                assert int(raw.files["cls"]) == source[raw.key].label
    assert sorted(keys) == sorted(source)


def test_training_shards_are_in_random_order(digits_dir: Path) -> None:
    keys = [raw.key for raw in ShardSet(digits_dir / "train").read(0, 0, 400)]
    ranks = np.argsort(np.argsort(keys))
    assert abs(np.corrcoef(ranks, np.arange(400))[0, 1]) < 0.2


def test_the_manifest_tells_what_the_shards_hold(digits_dir: Path) -> None:
    shards = ShardSet(digits_dir / "train")
    for number, shard in enumerate(shards.manifest.shards):
        path = digits_dir / "train" / shard.name
        assert (shard.bytes, shard.sha256) == (path.stat().st_size, sha256_of(path))
        whole = shards.read(number, 0, shard.samples)
        middle = shards.read(number, 37, shard.samples)  # seeks by the manifest's offsets
        assert middle == whole[37:]


def test_webdataset_reads_our_shards(digits_dir: Path) -> None:
    path = digits_dir / "test" / "shard-000000.tar"
    dataset = webdataset.WebDataset(str(path), shardshuffle=False).decode("torchrgb8")
    found = {sample["__key__"]: sample["cls"] for sample in dataset}
    ours = ShardSet(digits_dir / "test").read(0, 0, 297)
    assert found == {raw.key: int(raw.files["cls"]) for raw in ours}


def test_packing_again_gives_the_same_bytes_and_does_nothing_twice(tmp_path: Path) -> None:
    split = random_split("train", 50)
    first = pack_split(split, tmp_path / "a", 20)
    assert pack_split(split, tmp_path / "b", 20) == first

    def times() -> dict[Path, int]:
        files = (tmp_path / "a").iterdir()
        return {x: x.stat().st_mtime_ns for x in files if x.name != "work.lock"}

    stamps = times()
    assert pack_split(split, tmp_path / "a", 20) == first._replace(already=True)
    assert times() == stamps


def test_the_fingerprint_tells_the_samples_not_their_packing(tmp_path: Path) -> None:
    split = random_split("train", 50)
    one = pack_split(split, tmp_path / "a", 20, seed=0).manifest
    other = pack_split(split, tmp_path / "b", 7, seed=1).manifest
    assert one.fingerprint == other.fingerprint
    assert one.shards != other.shards
    changed = Fingerprint()
    for i in range(50):
        sample = split.sample(i)
        changed.add(sample.key, "abc"[i % 3], sample.image ^ (i == 7))
    assert changed.hexdigest() != one.fingerprint
    assert Fingerprint.total(["0f", "f" * 64]) == f"{14:064x}"


def test_a_folder_of_other_shards_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(ClaimError, match=r"holds shards but no packing\.json"):
        pack_split(random_split("train", 50), tmp_path, 20)
    assert (tmp_path / "shard-000000.tar").read_bytes() == b"precious"


def test_an_interrupted_packing_continues_after_its_last_whole_shard(tmp_path: Path) -> None:
    split = random_split("train", 50)
    read: list[int] = []

    def failing(i: int) -> Sample:
        read.append(i)
        if len(read) == 34:
            raise OSError("disk gone")
        return split.sample(i)

    def counting(i: int) -> Sample:
        read.append(i)
        return split.sample(i)

    whole = pack_split(split, tmp_path / "whole", 10)
    with pytest.raises(OSError, match="disk gone"):
        pack_split(replace(split, sample=failing), tmp_path / "cut", 10)
    with pytest.raises(DataError, match="has no manifest"):
        load_manifest(tmp_path / "cut")
    with (tmp_path / "cut" / "shards.jsonl").open("a") as journal:
        journal.write('{"shard": {"na')  # a kill in the middle of a line
    del read[:]
    assert pack_split(replace(split, sample=counting), tmp_path / "cut", 10) == whole
    assert len(read) == 20  # of 50: three shards were whole
    for path in (tmp_path / "whole").glob("[!w]*"):
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()


def test_a_source_that_has_changed_is_not_mixed_with_what_is_packed(tmp_path: Path) -> None:
    split = random_split("train", 50)
    pack_split(split, tmp_path, 20)
    with pytest.raises(ClaimError, match="its size is 50, not 51"):
        pack_split(random_split("train", 51), tmp_path, 20)
    with pytest.raises(ClaimError, match="its files is '', not 'others'"):
        pack_split(replace(split, identity="others"), tmp_path, 20)


def test_of_two_packers_in_one_folder_one_waits_for_the_other(tmp_path: Path) -> None:
    write_idx(tmp_path, zipped=False)
    command = [*job_command("make_shards.py"), "idx", tmp_path / "out", "--path", tmp_path]
    command += ["--shard-size", "1", "--json"]
    jobs = [
        subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, text=True, env=job_environment()
        )
        for _ in range(3)
    ]
    facts = [json.loads(job.communicate(timeout=120)[0]) for job in jobs]
    assert facts[0] == facts[1] == facts[2]
    assert facts[0]["train"]["images"] == ShardSet(tmp_path / "out" / "train").manifest.samples
    assert len(ShardSet(tmp_path / "out" / "train").read_batch(0, 12).ids) == 12


def write_idx(folder: Path, zipped: bool) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 8), np.uint8)
    for prefix, count in (("train", 12), ("t10k", 5)):
        for kind, data in (("images-idx3", images[:count]), ("labels-idx1", np.arange(count) % 3)):
            array = data.astype(np.uint8)
            head = bytes([0, 0, 8, array.ndim])
            head += b"".join(size.to_bytes(4, "big") for size in array.shape)
            content = head + array.tobytes()
            name = f"{prefix}-{kind}-ubyte"
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return images


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_packed_by_the_job(tmp_path: Path, zipped: bool, near_job: Runner) -> None:
    images = write_idx(tmp_path, zipped)
    out = tmp_path / "out"
    result = near_job(
        "make_shards.py", "idx", out, "--path", tmp_path, "--shard-size", 5, "--json"
    )
    assert last_json(result)["train"]["images"] == 12
    test = ShardSet(out / "test").read_batch(0, 5)  # in the source's order
    assert torch.equal(test.images, torch.from_numpy(images[:5, None]))
    assert test.labels.tolist() == [0, 1, 2, 0, 1]
    train = ShardSet(out / "train")
    assert [s.samples for s in train.manifest.shards] == [5, 5, 2]
    assert train.manifest.image_shape == (1, 4, 8)
    assert train.manifest.grey_levels == 256
    same = ["idx", out, "--path", tmp_path, "--shard-size", 5, "--json"]
    again = near_job("make_shards.py", *same)
    assert last_json(again) == last_json(result)
    assert f"{out / 'train'}: already done: 12 images of 1×4×8" in again.stderr
    other = near_job("make_shards.py", "digits", out, check=False)
    assert other.returncode == 1
    assert "holds other work: its origin is 'IDX files train', not" in other.stderr


def test_training_packs_its_source_if_it_is_not_there(
    tmp_path: Path, run_job: Runner, near_job: Runner, config_dict: dict[str, Any]
) -> None:
    write_idx(tmp_path, zipped=True)
    source = {"kind": "idx", "path": str(tmp_path)}
    config_dict["data"] |= {"dir": str(tmp_path / "data"), "source": source, "shard_size": 5}
    config_dict["train"]["images"] = 32
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    result = last_json(run_job("train.py", tmp_path / "c.yaml", "--json", processes=2))
    assert result["images"] == 5
    assert result["image_shape"] == [1, 4, 8]
    assert len(list((tmp_path / "data" / "train").glob("shard-*.tar"))) == 3
    # A kill between the splits: the one that is missing is packed, the other left alone.
    (tmp_path / "data" / "test" / "manifest.json").unlink()
    again = last_json(near_job("train.py", tmp_path / "c.yaml", "--json"))
    assert again["fingerprint"] == result["fingerprint"]


def test_a_validation_part_is_taken_out_of_the_training_images_of_idx_files(
    tmp_path: Path,
) -> None:
    write_idx(tmp_path, zipped=True)
    whole, test = idx(tmp_path)
    train, validation, same = idx(tmp_path, validation=4)
    assert [s.name for s in (train, validation, same)] == ["train", "validation", "test"]
    assert (train.size, validation.size, same.size) == (8, 4, test.size)
    parts = [s.sample(i) for s in (train, validation) for i in range(s.size)]
    known = {key: image for key, image, _ in map(whole.sample, range(whole.size))}
    assert sorted(key for key, _, _ in parts) == sorted(known)
    assert all(np.array_equal(known[key], image) for key, image, _ in parts)
    assert len({train.origin, validation.origin, whole.origin}) == 3
    with pytest.raises(DataError, match="12 of 12 images cannot be held out"):
        idx(tmp_path, validation=12)


def test_idx_files_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither train-images-idx3-ubyte nor .*\.gz"):
        idx(tmp_path)
    write_idx(tmp_path, zipped=False)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte is truncated"):
        idx(tmp_path)
    path.write_bytes(b"\0\0\x0d\x03" + b"\0" * 12)
    with pytest.raises(DataError, match="no IDX file of 3-d unsigned bytes"):
        idx(tmp_path)


def test_a_check_names_every_file_that_is_damaged(tmp_path: Path, call_job: Caller) -> None:
    pack_split(random_split("train", 30), tmp_path, 10)
    code, out, err = call_job("make_shards.py", "check", tmp_path, "--json")
    assert (code, json.loads(out)) == (0, {"damaged": 0})
    data = bytearray((tmp_path / "shard-000001.tar").read_bytes())
    data[700] ^= 1
    (tmp_path / "shard-000001.tar").write_bytes(data)
    (tmp_path / "shard-000002.tar").unlink()
    code, out, err = call_job("make_shards.py", "check", tmp_path, "--json")
    assert (code, json.loads(out)) == (1, {"damaged": 2})
    assert "shard-000001.tar is damaged: its hash is not the manifest's." in err
    assert "shard-000002.tar is missing." in err


def test_damage_is_named(tmp_path: Path) -> None:
    pack_split(random_split("train", 30), tmp_path, 10)
    with pytest.raises(DataError, match="has no manifest"):
        ShardSet(tmp_path / "nowhere")
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar is missing"):
        ShardSet(tmp_path).read_batch(0, 30)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "image_shape": [3, 8, 8]}))
    with pytest.raises(DataError, match=r"'train-\d+' .* shape \(1, 8, 8\), not \(3, 8, 8\)"):
        ShardSet(tmp_path).read_batch(0, 5)
    (tmp_path / "manifest.json").write_text(
        json.dumps({**manifest, "image_shape": [1, 8, 8], "grey_levels": 3})
    )
    with pytest.raises(DataError, match="must be below 3"):
        ShardSet(tmp_path).read_batch(0, 5)
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format": "other 7"}))
    with pytest.raises(DataError, match="format 'other 7'"):
        ShardSet(tmp_path)
    assert not list(tmp_path.glob(f"*{TEMPORARY}"))
