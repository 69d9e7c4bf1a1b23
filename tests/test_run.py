"""What a user sees of a run and starts one from: warm starts, trackers, speed, shared folders."""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from glowscale.checkpoint import (
    find_checkpoint,
    images_reached,
    load_model,
    read_checkpoint,
    save_checkpoint,
)
from glowscale.config import ConfigError, parse_config
from glowscale.data import Slice
from glowscale.data.writer import pack_split
from glowscale.distributed import LaunchError, start_accelerator
from glowscale.errors import UserError
from glowscale.evaluation import Evaluation, RoundTripError, refuse_untrusted
from glowscale.pretrained import ImageModel
from glowscale.training import Trainer
from glowscale.training.update import Updater
from tests.conftest import Runner, job_command, job_environment, random_split


def train(config: dict[str, Any], **accelerator: Any) -> Trainer:  # noqa: ANN401
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(parse_config(config), start_accelerator(**accelerator))
    trainer.train()
    trainer.accelerator.end_training()
    return trainer


def copy_with(config: dict[str, Any], run: Path, **train: Any) -> dict[str, Any]:  # noqa: ANN401
    content = json.loads(json.dumps(config))
    content["run"]["dir"] = str(run)
    content["train"] |= train
    return content


def test_the_speed_after_a_stop_is_that_of_what_was_done_since(
    config_dict: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    update = Updater.__call__

    def slow(self: Updater, part: Slice) -> Tensor:
        time.sleep(0.2)
        return update(self, part)

    monkeypatch.setattr(Updater, "__call__", slow)
    config_dict["log"] = {"every": 64}
    config_dict["checkpoint"]["every"] = 48
    for _ in range(2):  # the second resumes at image 48
        train(copy_with(config_dict, tmp_path / "run", images=64))
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"images-{64:012d}")
    lines = [json.loads(line) for line in (tmp_path / "run" / "times.jsonl").open()]
    whole, rest = (line["images_per_second"] for line in lines if line["kind"] == "train")
    assert max(whole, rest) < config_dict["train"]["batch"] / 0.2


def test_a_warm_start_begins_with_the_weights_of_a_run_or_a_published_model(
    config_dict: dict[str, Any], tmp_path: Path
) -> None:
    first = train(copy_with(config_dict, tmp_path / "first", images=160))
    ImageModel.from_run(tmp_path / "first").save_pretrained(tmp_path / "published")
    weights = first.state.ema.model.state_dict()
    for name in ("first", "published"):
        run = tmp_path / f"from_{name}"
        started = copy_with(config_dict, run, warm_start=str(tmp_path / name), images=16)
        train(started)
        begun = load_file(run / "checkpoints" / f"images-{0:012d}" / "model.safetensors")
        assert begun.keys() == weights.keys()
        assert all(torch.equal(begun[key], value) for key, value in weights.items())
    (tmp_path / "first").rename(tmp_path / "gone")  # a resume does not need it any more
    train({**started, "train": {**started["train"], "images": 32}})
    other = copy_with(config_dict, tmp_path / "other", warm_start=str(tmp_path / "published"))
    for key, value in (("hidden_channels", 12), ("scale", "sigmoid")):
        other["model"][key] = value
        with pytest.raises(
            UserError, match=rf"weights .* of a model with {key} .*, not {value!r}"
        ):
            train(other)
        other["model"] = dict(config_dict["model"])
    nowhere = copy_with(config_dict, tmp_path / "lost", warm_start=str(tmp_path))
    with pytest.raises(UserError, match="is neither a run with a checkpoint, nor"):
        train(nowhere)


def rewrite_model_section(run: Path, drop: str = "", **more: object) -> None:
    """Save the newest checkpoint again as if its config had lacked a key, or had others."""
    checkpoint = read_checkpoint(find_checkpoint(run))
    section = checkpoint.state["config"]["model"]
    section.pop(drop, None)
    section |= more
    images, tensors = checkpoint.state["images"], checkpoint.tensors
    save_checkpoint(run / "checkpoints", images, tensors, checkpoint.state, keep=1)


def test_runs_from_before_a_key_existed_are_gone_on_with_and_started_from(
    config_dict: dict[str, Any], tmp_path: Path
) -> None:
    old = tmp_path / "old"
    train(copy_with(config_dict, old, images=16))
    rewrite_model_section(old, drop="class_dropout")
    assert load_model(old)[1].state["config"]["model"]["class_dropout"] == 0
    ImageModel.from_run(old).save_pretrained(tmp_path / "published")
    description = tmp_path / "published" / "config.json"
    content = json.loads(description.read_text())
    content["arguments"].pop("class_dropout", None)
    description.write_text(json.dumps(content))
    for name in ("old", "published"):
        started = copy_with(config_dict, tmp_path / f"from_{name}", images=16)
        started["train"]["warm_start"] = str(tmp_path / name)
        train(started)
    train(copy_with(config_dict, old, images=32))
    changed = copy_with(config_dict, old, images=48)
    changed["model"]["matrix"] = "plain"
    with pytest.raises(ConfigError, match=r"'model.matrix' was 'lu' when .* and is 'plain' now"):
        train(changed)


def test_runs_that_this_version_does_not_know_are_refused_in_a_sentence(
    config_dict: dict[str, Any], tmp_path: Path
) -> None:
    old = tmp_path / "old"
    train(copy_with(config_dict, old, images=16))
    rewrite_model_section(old, momentum=0.9)
    with pytest.raises(ConfigError, match=r"began with a config .*'model\.momentum'") as caught:
        train(copy_with(config_dict, old, images=32))
    assert "\n" not in str(caught.value)
    started = copy_with(config_dict, tmp_path / "new", images=16, warm_start=str(old))
    unknown = r"the key 'config\.model\.momentum' is 0\.9; Extra"
    with pytest.raises(ConfigError, match=unknown):
        train(started)
    with pytest.raises(ConfigError, match=unknown):  # what evaluate.py, sample.py and look.py do
        load_model(old)


def test_tensorboard_shows_curves_settings_and_samples_also_over_a_restart(
    config_dict: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config_dict["log"] = {"every": 32, "trackers": ["tensorboard"]}
    options = {"trackers": ["tensorboard"], "folder": run}
    train(copy_with(config_dict, run, images=160), **options)
    train(copy_with(config_dict, run, images=320), **options)
    folder = next(path.parent for path in (run / "glowscale").glob("events*"))
    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0}).Reload()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for kind in ("train", "held_out"):
        expected = {line["images"]: line["bits_per_dim"] for line in lines if line["kind"] == kind}
        found = {event.step: event.value for event in events.Scalars(f"{kind}/bits_per_dim")}
        assert found.keys() == expected.keys()
        assert all(found[step] == pytest.approx(value) for step, value in expected.items())
    for tag in ("train/gradient_norm", "train/images_per_second"):
        assert all(event.value > 0 for event in events.Scalars(tag))
    rates = [line["learning_rate"] for line in lines if line["kind"] == "train"]
    assert [e.value for e in events.Scalars("train/learning_rate")] == pytest.approx(rates)
    assert len(events.Scalars("held_out/prior_round_trip_error")) == 2
    assert [event.step for event in events.Images("samples")] == [160, 160, 320, 320]
    settings = next((run / "glowscale").rglob("hparams.yml")).read_text()
    assert "model.hidden_channels: 8" in settings


def test_a_tracker_that_is_not_there_is_named() -> None:
    with pytest.raises(LaunchError, match=r"log\.trackers names 'abacus', which is not installed"):
        start_accelerator(trackers=["abacus"])


def test_speed_is_noted_beside_the_metrics_not_in_them(
    config_dict: dict[str, Any], tmp_path: Path
) -> None:
    train(config_dict)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "second" not in metrics
    times = [
        json.loads(line) for line in (tmp_path / "run" / "times.jsonl").read_text().splitlines()
    ]
    speeds = [line["images_per_second"] for line in times if line["kind"] == "train"]
    assert len(speeds) == 7
    whole = 320 / (times[-1]["seconds_since_start"])
    assert all(speed > 0.5 * whole for speed in speeds)  # evaluations do not count


def test_a_round_trip_beyond_its_limit_ends_the_run(
    config_dict: dict[str, Any], tmp_path: Path
) -> None:
    config_dict["evaluate"] |= {"every": 16, "round_trip_limit": 1e-9}
    with pytest.raises(RoundTripError, match=r"more than evaluate\.round_trip_limit=1e-09"):
        train(config_dict)
    assert images_reached(tmp_path / "run") == 16  # nothing that was trained is lost
    config_dict["evaluate"]["round_trip_limit"] = 0.5
    trainer = train(config_dict)
    with torch.no_grad():
        trainer.state.ema.model.levels[0].bijections[1].bijections[0].log_scale.fill_(-200)
    broken = trainer.reports.evaluate()
    assert broken.round_trip_error == broken.prior_round_trip_error == float("inf")
    assert broken.to_dict()["round_trip_error"] is None
    kept = Evaluation.from_dict(json.loads(json.dumps(broken.to_dict())))
    for result in (broken, kept):
        with pytest.raises(RoundTripError, match=r"round trip of images is off by (inf|nan)"):
            refuse_untrusted(result, round_trip_limit=0.5, solver_gap_limit=None)


def test_the_final_figure_is_kept_in_the_run(config_dict: dict[str, Any], tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    evaluation = Trainer(parse_config(config_dict), Accelerator(cpu=True)).train()
    kept = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert kept.pop("trained_images") == 320
    assert kept == json.loads(json.dumps(evaluation.to_dict()))


APART = """
import os, runpy, sys
from pathlib import Path
import glowscale.training.lock as lock
lock.refuse_unshared.__defaults__ = (1.0,)  # no network file system here that needs longer
folder = Path(sys.argv.pop(1)) / os.environ["RANK"]
os.chdir(folder)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize("apart", ["run", "data"])
def test_folders_that_processes_do_not_share_are_refused(
    apart: str, config_dict: dict[str, Any], tmp_path: Path
) -> None:
    for rank in (0, 1):  # below each process's own working folder
        (tmp_path / str(rank)).mkdir()
        for name, size in (("train", 40 + 8 * rank), ("test", 8)):
            pack_split(random_split(name, size), tmp_path / str(rank) / "some_data" / name, 50)
    config_dict[apart]["dir"] = f"some_{apart}"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    (tmp_path / "job.py").write_text(APART)
    command = [*job_command(str(tmp_path / "job.py"), 2), tmp_path, job_command("train.py")[1]]
    result = subprocess.run(
        [*map(str, command), str(tmp_path / "c.yaml")],
        env=job_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode != 0
    sentences = {
        "run": "run.dir must be on a file system that all share",
        "data": "The processes see different data (rank 0: ",
    }
    assert sentences[apart] in result.stderr
    assert not list(tmp_path.rglob("checkpoints"))


def test_a_job_says_on_how_many_processes_it_trains(
    config_dict: dict[str, Any], tmp_path: Path, run_job: Runner
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    result = run_job("train.py", tmp_path / "c.yaml", "train.images=16", processes=2)
    assert result.stderr.count("training on 2 processes (cpu)") == 1
