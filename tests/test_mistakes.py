"""A first-time user's likeliest mistakes: each ends in one sentence, which the README explains."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from glowscale.checkpoint import find_checkpoint
from glowscale.data.writer import pack_split
from glowscale.files import sha256_of
from glowscale.training.lock import RunLock
from tests.conftest import ROOT, Caller, Runner, job_command, job_environment, random_split


@pytest.fixture
def config(config_dict: dict[str, Any], tmp_path: Path) -> Path:
    """A run of one step."""
    config_dict["train"] |= {"images": 16}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_dict))
    return path


@pytest.fixture
def trained(config: Path, call_job: Caller) -> Path:
    """The run's config, after it was trained."""
    code, _, err = call_job("train.py", config)
    assert code == 0, err
    return config


def troubleshooting() -> str:
    text = (ROOT / "README.md").read_text()
    return text[text.index("## Troubleshooting") :]


def assert_sentence(result: tuple[int, str, str], sentence: str, explained: str) -> None:
    """The job ends with one sentence, the last on stderr, and the README's table explains it."""
    code, out, err = result
    assert code == 1
    assert out == ""
    assert "Traceback" not in err
    last = re.split(r"[\n\r]", err.strip())[-1]
    assert re.fullmatch(rf".*Error( on rank \d+)?: {sentence}", last), last
    assert explained in last
    assert explained in troubleshooting()


def test_wrong_path(config: Path, tmp_path: Path, call_job: Caller) -> None:
    missing = call_job("train.py", tmp_path / "confg.yaml")
    assert_sentence(missing, r"There is no config .*/confg\.yaml\.", "There is no")
    folder = ["folder", tmp_path / "out", "--path", tmp_path / "pictures", "--resolution", 8]
    sentence = r"There is no folder .*/pictures\."
    assert_sentence(call_job("make_shards.py", *folder), sentence, "There is no")


def test_wrong_key(config: Path, call_job: Caller) -> None:
    assert_sentence(
        call_job("train.py", config, "train.learning_rate=1"),
        r"Unknown config key 'train\.learning_rate': Allowed are images, batch, .*\.",
        "Unknown config key",
    )
    assert_sentence(
        call_job("train.py", config, "model.dept=3"),
        r"Unknown config key 'model\.dept': did you mean 'depth'\? Allowed are .*\.",
        "Unknown config key",
    )


def test_wrong_size(config: Path, call_job: Caller) -> None:
    assert_sentence(
        call_job("train.py", config, "model.levels=4"),
        r"The model does not fit .*: Images of 8×8 cannot be halved 4 times: 4 levels need "
        r"sides divisible by 16\.",
        "cannot be halved",
    )


def test_no_shards(config: Path, tmp_path: Path, call_job: Caller) -> None:
    assert_sentence(
        call_job("train.py", config, f"data.dir={tmp_path / 'nothing'}"),
        r".*/nothing/train has no manifest\.json; pack images with pipelines/make_shards\.py\.",
        "has no manifest.json",
    )
    (tmp_path / "empty").mkdir()
    empty = call_job("make_shards.py", "shards", tmp_path / "out", "--path", tmp_path / "empty")
    sentence = r".*/empty is no folder with WebDataset shards \(\*\.tar\) in it\."
    assert_sentence(empty, sentence, "is no folder with WebDataset shards")


def test_no_disk(trained: Path, tmp_path: Path, call_job: Caller) -> None:
    run = tmp_path / "run"
    before = find_checkpoint(run)
    job = [*job_command("train.py"), str(trained), "train.images=64", "checkpoint.every=16"]
    small = subprocess.run(  # a disk on which no file can grow beyond 10 KiB
        ["bash", "-c", 'ulimit -f 10; exec "$@"', "bash", *job],
        env=job_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    sentence = (
        r".*/images-000000000032 cannot be written \(.*\); the checkpoints before are whole\."
    )
    assert_sentence((small.returncode, small.stdout, small.stderr), sentence, "cannot be written")
    assert find_checkpoint(run) == before
    assert not list(run.rglob("*.partial"))  # it would fill the disk further
    assert load_file(before / "model.safetensors")
    times = run / "times.jsonl"
    times.unlink()
    times.symlink_to("/dev/full")  # the kernel's own full disk
    full = call_job("train.py", trained, "train.images=48", "log.every=16")
    assert_sentence(full, r".*/times\.jsonl: No space left on device\.", "No space left on device")


def test_two_trainers_in_one_folder(trained: Path, tmp_path: Path, call_job: Caller) -> None:
    other = RunLock(tmp_path / "run")
    result = call_job("train.py", trained, "train.images=64")
    other.release()
    assert_sentence(
        result,
        r".*/run is being trained in by process \d+ on .*; wait for it, end it, or choose another "
        r"run\.dir\.",
        "is being trained in by process",
    )


def test_other_data_on_resume(
    trained: Path, data_dir: Path, tmp_path: Path, call_job: Caller
) -> None:
    (tmp_path / "other").mkdir()
    for name in ("train", "test"):
        (tmp_path / "other" / name).symlink_to(data_dir / "test")
    assert_sentence(
        call_job("train.py", trained, f"data.dir={tmp_path / 'other'}"),
        r"The run in .* was trained on the data \w{8}, but data\.dir \(.*/other\) holds \w{8}; "
        r"restore it, or choose another run\.dir\.",
        "was trained on the data",
    )


def test_an_old_checkpoint_format(trained: Path, tmp_path: Path, call_job: Caller) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    for path in checkpoints.glob("images-*/manifest.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "format": "glowscale checkpoint 0"}))
    pointer = json.loads((checkpoints / "latest.json").read_text())
    digests = {
        name: sha256_of(checkpoints / name / "manifest.json")
        for name in pointer["manifest_sha256"]
    }
    (checkpoints / "latest.json").write_text(json.dumps({"manifest_sha256": digests}))
    sentence = (
        r".*manifest\.json has the format 'glowscale checkpoint 0', not "
        r"'glowscale checkpoint 1': another version of glowscale wrote it\."
    )
    assert_sentence(call_job("evaluate.py", tmp_path / "run"), sentence, "has the format")
    resumed = call_job("train.py", trained, "train.images=64")
    assert_sentence(resumed, rf"No checkpoint in .* verifies: {sentence}", "has the format")


def test_a_label_out_of_range(
    config: Path, data_dir: Path, tmp_path: Path, call_job: Caller
) -> None:
    for name in ("train", "test"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for path in (data_dir / name).iterdir():
            (folder / path.name).symlink_to(path)
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").write_text(json.dumps({**manifest, "classes": ["a", "b"]}))
    assert_sentence(
        call_job("train.py", config, f"data.dir={tmp_path / 'data'}", "model.class_channels=4"),
        r"sample 'train-\d+' in .* has the label '2'; it must be a number below 2\.",
        "has the label",
    )


def test_one_process_too_many(config: Path, run_job: Runner) -> None:
    result = run_job("train.py", config, processes=3, check=False)
    assert result.returncode != 0
    sentence = (
        r"3 processes cannot share 4 lanes evenly; with data\.lanes=4 the process count must be "
        r"one of 1, 2, 4\."
    )
    assert re.search(rf"^Error( on rank \d)?: {sentence}$", result.stderr, re.MULTILINE)
    assert "cannot share" in troubleshooting()


ODD: dict[str, tuple[list[str], str]] = {
    "levels": (["model.levels=9", "--dry-run"], "cannot be halved 9 times"),
    "source": (
        ["data.source={kind: digits}", "data.train_split=all", "data.dir=NEW", "--dry-run"],
        "The source has the splits train, test, not data.train_split='all'",
    ),
    "resolution": (
        ["data.source={kind: folder, path: x, resolution: 64}"],
        "data.source.resolution is 64, but .* holds images of 8×8 already",
    ),
    "torchvision": (
        [
            "data.source={kind: torchvision, dataset: MNIST, root: NEW}",
            "data.dir=NEW",
            "--dry-run",
        ],
        "MNIST cannot be read from",
    ),
    "number": (["run.dir=2024", "train.lr=3"], r"Unknown config key 'train\.lr'"),
}


@pytest.mark.parametrize("name", ODD)
def test_other_mistakes_end_in_a_sentence_too(
    name: str, config: Path, tmp_path: Path, call_job: Caller
) -> None:
    arguments, sentence = ODD[name]
    given = [x.replace("NEW", str(tmp_path / "new")) for x in arguments]
    code, _, err = call_job("train.py", config, *given)
    assert code == 1
    assert re.search(f"Error: .*{sentence}", err.splitlines()[-1]), err
    assert not (tmp_path / "new").exists()


REFUSED: dict[str, tuple[list[str], str]] = {
    "shape": (
        ["evaluate.py", "--data", "other/test"],
        r"other/test holds images of shape \(1, 4, 4\) with 16 grey levels; the model is for "
        r"\(1, 8, 8\) with 16\.",
    ),
    "grey levels": (
        ["evaluate.py", "--data", "fewer/test"],
        r"fewer/test holds images of shape \(1, 8, 8\) with 4 grey levels; the model is for "
        r"\(1, 8, 8\) with 16\.",
    ),
    "another evaluation's folder": (
        ["evaluate.py", "--out", "evaluation", "--seed", "1"],
        r"evaluation holds other work: its seed is 0, not 1; choose another folder\.",
    ),
    "samples' folder": (
        ["evaluate.py", "--out", "samples"],
        r"samples holds other work: its \w+ is .*; choose another folder\.",
    ),
    "another job's samples": (
        ["sample.py", "--out", "samples", "--count", "20", "--temperature", "0.5"],
        r"samples holds other work: its temperature is 1\.0, not 0\.5; choose another folder\.",
    ),
    "no such class": (
        ["sample.py", "--out", "new", "--count", "20", "--class", "d"],
        r"The model has no class 'd'; it has a, b, c\.",
    ),
    "a class by its number": (
        ["sample.py", "--out", "new", "--count", "20", "--class", "3"],
        r"The model has no class '3'; it has a, b, c\.",
    ),
    "no folder": (
        ["sample.py", "--out", "config.yaml", "--count", "20"],
        r".*config\.yaml: (File exists|Not a directory)\.",
    ),
}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_does_not_fit_is_neither_scored_nor_sampled(
    config_dict: dict[str, Any],
    tmp_path: Path,
    call_job: Caller,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    config_dict["train"]["images"] = 16
    config_dict["model"]["class_channels"] = 4
    Path("config.yaml").write_text(yaml.safe_dump(config_dict))
    pack_split(random_split("test", 9, (1, 4, 4)), Path("other/test"), 9)
    pack_split(random_split("test", 9, grey_levels=4), Path("fewer/test"), 9)
    assert call_job("train.py", "config.yaml")[0] == 0
    assert call_job("evaluate.py", "run", "--out", "evaluation")[0] == 0
    assert call_job("sample.py", "run", "--out", "samples", "--count", 20)[0] == 0
    before = contents(tmp_path)
    for name, ((script, *options), sentence) in REFUSED.items():
        code, out, err = call_job(script, "run", *options)
        assert code == 1, name
        assert out == ""
        assert re.fullmatch(f"Error: {sentence}", err.splitlines()[-1]), err
        assert contents(tmp_path) == before, name


def test_an_evaluation_on_a_full_disk_goes_on_when_there_is_room(
    trained: Path, tmp_path: Path, call_job: Caller, small_disk: Path
) -> None:
    filler, out = small_disk / "filler", small_disk / "evaluation"
    filler.write_bytes(b"x" * 240_000)
    options = (tmp_path / "run", "--batch", 1, "--out", out)
    full = call_job("evaluate.py", *options)
    assert_sentence(full, r".*: No space left on device\.", "No space left on device")
    assert any(out.glob("block-*.safetensors"))
    assert not [*out.glob("*.partial")]
    filler.unlink()
    assert call_job("evaluate.py", *options)[0] == 0
    assert call_job("evaluate.py", *options[:-1], tmp_path / "whole")[0] == 0
    assert (out / "images.csv").read_bytes() == (tmp_path / "whole/images.csv").read_bytes()


def test_a_figure_that_its_model_cannot_stand_for_is_kept_and_refused(
    config_dict: dict[str, Any], tmp_path: Path, call_job: Caller
) -> None:
    config_dict["train"]["images"] = 16
    config_dict["evaluate"]["round_trip_limit"] = 1e-9
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_dict))
    sentence = r"The round trip of images is off by \S+ grey levels, more than .*=1e-09: .*\."
    trained = call_job("train.py", tmp_path / "config.yaml")
    assert_sentence(trained, sentence, "The round trip of")
    for _ in ("scores", "finds the scores"):
        code, _, err = call_job("evaluate.py", tmp_path / "run", "--out", tmp_path / "kept")
        assert code == 1
        assert re.fullmatch(f"Error: {sentence}", err.splitlines()[-1]), err
        assert (tmp_path / "kept" / "result.json").exists()


def test_options_of_sources_that_do_not_fit_are_named(tmp_path: Path, call_job: Caller) -> None:
    folder = ["folder", tmp_path / "out", "--path", tmp_path]
    code, _, err = call_job("make_shards.py", *folder, "--resolution", "many")
    assert code == 1
    assert err.endswith(
        "Error: The option 'resolution' is 'many'; it must be a valid integer, "
        "unable to parse string as an integer."
    )
    code, _, err = call_job("make_shards.py", *folder[:2], "--path", "2024", "--resolution", 8)
    assert err.endswith("Error: There is no folder 2024.")
    shards = ["shards", tmp_path / "out", "--path", tmp_path, "--seed", 3]
    assert call_job("make_shards.py", *shards)[0] == 2  # they are not packed
