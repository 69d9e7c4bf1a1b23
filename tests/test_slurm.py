"""Jobs under a real SLURM: processes find each other, what is stopped goes on to the same bits.

All jobs start at once, each with what befalls it in a thread of its own; a test waits for its own.
A run that is to be hit in its midst is held there (SIGSTOP) until what hits it has arrived.
"""

import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import webdataset
import yaml

from glowscale.checkpoint import find_checkpoint, read_checkpoint
from tests.conftest import ROOT, Runner
from tests.slurm_cluster import SlurmCluster, slurm_cluster

pytestmark = pytest.mark.xdist_group("slurm")

IMAGES = 1280
SAMPLES = 8000
SIDE_BY_SIDE = 5
TRAIN = ROOT / "slurm" / "train.sbatch"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
SITE = """\
source slurm/site.sh
activate() {{ PATH={bin}:$PATH; }}
export GLOO_SOCKET_IFNAME=lo HF_HUB_OFFLINE=1
"""
MODEL = {
    "family": "glow",
    "levels": 2,
    "depth": 2,
    "hidden_channels": 8,
    "dequantization": {"kind": "uniform"},
}
SETTINGS: dict[str, Any] = {
    "model": MODEL,
    "train": {
        "images": IMAGES,
        "batch": 16,
        "init_images": 32,
        "ema_images": 100,
        "optimizer": {"kind": "adamw", "lr": 5e-3},
        "schedule": {"warmup_images": 64, "decay": "cosine"},
    },
    "log": {"every": 48},
    "evaluate": {"every": 640, "batch": 20},
    "samples": {"every": 640, "count": 9},
    "checkpoint": {"every": 10 * IMAGES},  # but for the last one: what is saved was stopped
}


@dataclass(frozen=True)
class Job:
    """A job of the cluster, and what it leaves."""

    cluster: SlurmCluster
    id: str
    run: Path
    log: Path

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def lines(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True)]

    def ranks(self) -> list[psutil.Process]:
        found = self.cluster.processes(self.id, "pipelines/")
        return [process for process in found if "python" in Path(process.cmdline()[0]).name]

    def until(self, condition: Callable[[], object], what: str, timeout: float = 90) -> None:
        """Wait for what a job that is not over does."""
        end = time.monotonic() + timeout
        asked = 0.0
        while not condition():
            if time.monotonic() > asked + 1:
                asked = time.monotonic()
                facts = self.cluster.facts(self.id)
                assert asked < end, f"{what}: not in {timeout} s\n{facts}\n{self.text()}"
                going_on = facts["JobState"] in ("PENDING", "RUNNING", "SIGNALING")
                assert going_on, f"{facts}\n{self.text()}"
            time.sleep(0.05)

    def ends(self, state: str) -> None:
        ended = self.cluster.wait_for(self.id, timeout=150)
        assert ended == state, f"{ended}\n{self.text()}\n{self.cluster.logs()}"

    @contextmanager
    def held(self, processes: int = 2) -> Iterator[list[psutil.Process]]:
        """The job's processes, stopped in the midst of their training."""
        metrics = self.run / "metrics.jsonl"
        self.until(lambda: metrics.exists() and metrics.read_text().count("\n"), "trains")
        ranks = self.ranks()
        for rank in ranks:
            rank.suspend()
        try:
            assert len(ranks) == processes, self.text()
            assert self.lines()[-1]["images"] < IMAGES, "too late"
            yield ranks
        finally:
            for rank in ranks:
                with suppress(psutil.NoSuchProcess):
                    rank.resume()


class Hall:
    """Where the jobs run: the cluster, the data, a folder for all they leave."""

    def __init__(self, cluster: SlurmCluster, data: Path, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.config = folder / "config.yaml"
        content = {"data": {"dir": str(data), "lanes": 4, "shuffle_block": 16}, **SETTINGS}
        self.config.write_text(yaml.safe_dump({"run": {"dir": "unnamed"}, **content}))
        self.site = folder / "site.sh"
        self.site.write_text(SITE.format(bin=Path(sys.executable).parent))

    def submit(
        self,
        name: str,
        script: Path,
        *arguments: object,
        options: tuple[str, ...] = (),
        folder: Path = ROOT,
    ) -> Job:
        log = self.folder / f"{name}.log"
        common = (f"--output={log}", "--time=20", "--cpus-per-task=1")
        elsewhere = () if any("node3" in option for option in options) else ("--exclude=node3",)
        number = self.cluster.submit(
            script,
            *arguments,
            options=(*common, *elsewhere, *options),
            folder=folder,
            environment={"GLOWSCALE_SITE": str(self.site)},
        )
        return Job(self.cluster, number, self.folder / name, log)

    def train(self, name: str, *overrides: str, options: tuple[str, ...] = TWO_NODES) -> Job:
        run = f"run.dir={self.folder / name}"
        return self.submit(name, TRAIN, self.config, run, *overrides, options=options)


def uninterrupted(hall: Hall) -> Job:
    job = hall.train("uninterrupted")
    job.ends("COMPLETED")
    return job


def signalled(hall: Hall, name: str, *options: str) -> Job:
    job = hall.train(name)
    with job.held() as ranks:
        hall.cluster.scancel(job.id, "--signal=USR1", *options)
        job.until(lambda: all(map(has_usr1, ranks)), "USR1 arrives")
    job.ends("COMPLETED")
    return job


def out_of_time(hall: Hall, name: str, script: str) -> Job:
    """A job that SLURM itself signals because its time is up in three minutes."""
    path = hall.folder / f"{name}.sbatch"
    path.write_text(script)
    run = f"run.dir={hall.folder / name}"
    job = hall.submit(name, path, hall.config, run, options=TWO_NODES)
    with job.held() as ranks:
        hall.cluster.run("scontrol", "update", f"JobId={job.id}", "EndTime=now+185")
        job.until(lambda: all(map(has_usr1, ranks)), "USR1 arrives")
        hall.cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=20")  # of the next
    job.ends("COMPLETED")
    return job


def cancelled(hall: Hall) -> Job:
    job = hall.train("cancelled")
    with job.held():
        hall.cluster.scancel(job.id)  # which wakes processes that are held, then sends SIGTERM
        job.ends("CANCELLED")
    return job


def bereft(hall: Hall) -> Job:
    """A job that loses one of its nodes after a checkpoint."""
    options = (*TWO_NODES, "--nodelist=node2,node3")
    job = hall.train("bereft", "checkpoint.every=64", options=options)
    checkpoints = job.run / "checkpoints"
    job.until(lambda: len([*checkpoints.glob("images-*/manifest.json")]) > 1, "saves")
    with job.held(2):
        hall.cluster.lose_node("node3")
    hall.cluster.wait_for_node("node3", up=False)
    hall.cluster.wait_for(job.id, "PENDING")
    hall.cluster.revive_node("node3")
    job.ends("COMPLETED")
    return job


def array(hall: Hall, trained: "Future[Job]") -> list[Job]:
    """Four jobs that share the work of sampling, of which the third dies in its midst."""
    out = hall.folder / "samples"
    arguments = (trained.result().run, "--count", SAMPLES, "--shard-size", 100, "--out", out)
    script = ROOT / "slurm" / "sample.sbatch"
    whole = hall.submit("sample-%a", script, *arguments, options=("--array=0-3",))
    parts = [
        Job(hall.cluster, f"{whole.id}_{i}", out, hall.folder / f"sample-{i}.log")
        for i in range(4)
    ]
    parts[2].until(lambda: (out / "shard-000002.tar").exists(), "begins its second shard")
    (process,) = parts[2].ranks()
    process.kill()
    for part in parts:
        part.ends("COMPLETED")
    return parts


def evaluation(hall: Hall, trained: "Future[Job]") -> Job:
    """An evaluation that is signalled in its midst, as when its time is up."""
    out = hall.folder / "evaluation"
    arguments = (trained.result().run, "--batch", 1, "--importance-samples", 300, "--out", out)
    script = ROOT / "slurm" / "evaluate.sbatch"
    job = hall.submit("evaluation", script, *arguments, options=("--nodes=1",))
    job.until(lambda: any(out.glob("block-*")), "scores a block")
    hall.cluster.scancel(job.id, "--signal=USR1", "--batch")
    job.ends("COMPLETED")
    return job


Jobs = tuple[Hall, dict[str, Future[Any]]]


SIGNALS = {"scancel": (), "scancel --batch": ("--batch",), "scancel --full": ("--full",)}
"""Options of scancel, by the way in which a training is signalled."""


@pytest.fixture(scope="module")
def jobs(
    data_dir: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Jobs]:
    """All jobs that tests ask for, under way."""
    asked = {way for item in request.session.items for way in SIGNALS if f"[{way}]" in item.name}
    script = TRAIN.read_text()
    steps_only = script.replace("--signal=B:USR1@180", "--signal=USR1@180")
    assert steps_only != script
    with slurm_cluster() as cluster, ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        hall = Hall(cluster, data_dir, tmp_path_factory.mktemp("slurm"))
        under_way = {  # those first that mostly wait
            "bereft": pool.submit(bereft, hall),
            "time limit": pool.submit(out_of_time, hall, "limit", script),
            "time limit, to steps": pool.submit(out_of_time, hall, "limit-steps", steps_only),
            "uninterrupted": pool.submit(uninterrupted, hall),
            **{
                way: pool.submit(signalled, hall, way.replace(" --", "-"), *options)
                for way, options in SIGNALS.items()
                if way in asked
            },
            "cancelled": pool.submit(cancelled, hall),
        }
        of_the_trained = {
            "array": pool.submit(array, hall, under_way["uninterrupted"]),
            "evaluation": pool.submit(evaluation, hall, under_way["uninterrupted"]),
        }
        yield hall, {**under_way, **of_the_trained}
        pool.shutdown(cancel_futures=True)


def has_usr1(process: psutil.Process) -> bool:
    """Whether SIGUSR1 waits for a process that is held, or has woken it."""
    with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        if process.status() == psutil.STATUS_STOPPED:
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            masks = [int(x.split()[1], 16) for x in status if x[:6] in ("SigPnd", "ShdPnd")]
            return any(mask >> (signal.SIGUSR1 - 1) & 1 for mask in masks)
    return True


def assert_same_run(job: Job, expected: Job) -> None:
    """Weights, averages, optimizer and metrics are the same bits."""
    one, other = (read_checkpoint(find_checkpoint(each.run)).tensors for each in (job, expected))
    for part, tensors in other.items():
        assert one[part].keys() == tensors.keys()
        assert all(torch.equal(one[part][key], value) for key, value in tensors.items()), part
    metrics = [(each.run / "metrics.jsonl").read_bytes() for each in (job, expected)]
    assert metrics[0] == metrics[1]


SENTENCES = {
    "world": "2 nodes × 2 tasks a node are not the 3 tasks that SLURM would start",
    "gpus": "There are 2 GPUs and 1 tasks on a node, but each task takes one GPU",
    "elsewhere": "slurm/job.sh is missing; submit from the repository's root",
    "partition": "the job's partition is 'main', but .*site.sh says 'gpu'",
    "key": r"Error: .*train\.imagez",
}


@pytest.mark.parametrize("problem", SENTENCES)
def test_a_mistake_ends_a_job_at_once_with_a_sentence_and_is_not_requeued(
    jobs: Jobs, problem: str, tmp_path: Path
) -> None:
    hall, _ = jobs
    mistaken = Hall(hall.cluster, Path("nowhere"), tmp_path)
    options = {
        "world": ("--nodes=2", "--ntasks=3", "--ntasks-per-node=2"),
        "partition": ("--nodes=2", "--ntasks=3", "--ntasks-per-node=2"),
        "gpus": (*TWO_NODES, "--gpus-per-node=2"),
    }
    overrides = ("train.imagez=3",) if problem == "key" else ()
    folder = tmp_path if problem == "elsewhere" else ROOT
    if problem == "partition":
        mistaken.site.write_text(f"{mistaken.site.read_text()}export SBATCH_PARTITION=gpu\n")
    job = mistaken.submit(
        "mistaken",
        TRAIN,
        mistaken.config,
        f"run.dir={tmp_path / 'run'}",
        *overrides,
        options=options.get(problem, ()),
        folder=folder,
    )
    hall.cluster.wait_for(job.id, timeout=60)
    assert hall.cluster.state(job.id) == "FAILED"
    assert hall.cluster.restarts(job.id) == 0
    assert re.search(SENTENCES[problem], job.text()), job.text()
    assert job.text().count("Error") == 1


def test_a_job_on_two_nodes_is_one_run_of_two_processes(jobs: Jobs) -> None:
    job: Job = jobs[1]["uninterrupted"].result()
    assert "training on 2 processes" in job.text()
    assert job.lines()[-1]["images"] == IMAGES
    assert job.cluster.restarts(job.id) == 0


@pytest.mark.parametrize(
    "way",
    [
        "scancel",
        pytest.param("scancel --batch", marks=pytest.mark.long),  # as the evaluation is, below
        "scancel --full",
        "time limit",
        "time limit, to steps",
    ],
)
def test_a_signalled_job_saves_requeues_itself_and_ends_with_the_same_bits(
    jobs: Jobs, way: str
) -> None:
    job: Job = jobs[1][way].result()
    assert job.cluster.restarts(job.id) == 1
    assert "ended with status 75; it is requeued" in job.text()
    assert_same_run(job, jobs[1]["uninterrupted"].result())


def test_a_cancelled_job_saves_and_stays_cancelled(jobs: Jobs) -> None:
    job: Job = jobs[1]["cancelled"].result()
    assert 0 < read_checkpoint(find_checkpoint(job.run)).state["images"] < IMAGES
    assert job.cluster.restarts(job.id) == 0
    assert "it is requeued" not in job.text()


def test_an_array_s_dead_task_is_requeued_alone_and_all_images_are_made_once(
    jobs: Jobs,
) -> None:
    parts: list[Job] = jobs[1]["array"].result()
    assert [part.cluster.restarts(part.id) for part in parts] == [0, 0, 1, 0]
    shards = [str(path) for path in sorted(parts[0].run.glob("*.tar"))]
    keys = [s["__key__"] for s in webdataset.WebDataset(shards, shardshuffle=False)]
    assert keys == [f"{i:09d}" for i in range(SAMPLES)]


def test_a_signalled_evaluation_requeues_itself_and_ends_with_the_same_figure(
    jobs: Jobs, near_job: Runner, tmp_path: Path
) -> None:
    job: Job = jobs[1]["evaluation"].result()
    assert job.cluster.restarts(job.id) == 1
    assert "ended with status 75; it is requeued" in job.text()
    trained: Job = jobs[1]["uninterrupted"].result()
    options = ("--batch", 1, "--importance-samples", 300, "--out", tmp_path / "whole")
    near_job("evaluate.py", trained.run, *options)
    tables = [(folder / "images.csv").read_bytes() for folder in (job.run, tmp_path / "whole")]
    assert tables[0] == tables[1]


def test_a_job_that_loses_a_node_goes_on_when_it_is_back_to_the_same_bits(jobs: Jobs) -> None:
    job: Job = jobs[1]["bereft"].result()
    assert job.cluster.restarts(job.id) == 1
    assert_same_run(job, jobs[1]["uninterrupted"].result())
