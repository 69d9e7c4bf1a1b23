"""Saves that are interrupted or refused at any point, and checkpoints that were tampered with."""

import errno
import json
import os
import pickle
import random
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import glowscale.checkpoint
from glowscale.checkpoint import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    read_checkpoint,
    resume_checkpoint,
    save_checkpoint,
)

NOBODY = 65534
OLD, NEW = 10, 20


def save(folder: Path, images: int, keep: int = 2, seed: int = 0) -> Path:
    """A checkpoint whose content tells run and place."""
    generator = torch.Generator().manual_seed(1000 * seed + images)
    tensors = {
        part: {"w": torch.randn(40, 50, generator=generator), "n": torch.tensor(images)}
        for part in ("model", "ema", "optimizer")
    }
    return save_checkpoint(folder, images, tensors, {"images": images}, keep)


def same(one: Checkpoint, other: Checkpoint) -> bool:
    return one.state == other.state and all(
        torch.equal(x, other.tensors[part][key])
        for part, values in one.tensors.items()
        for key, x in values.items()
    )


def in_child(body: Callable[[], None], user: int | None = None) -> int:
    """Run something in a forked process, as another user if given; its exit status."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        if user is not None:
            os.setgid(user)
            os.setuid(user)
        body()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(99)


KILLED, REFUSED, TOLERATED = 7, 8, 9
WRITES = {"open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.truncate"}


def save_with_a_fault(folder: Path, number: int, fault: str, keep: int) -> None:
    """Save, but at the given operation on files the process dies, or the system refuses.

    Audit events tell of every file that is opened, made, renamed or removed; fsync and the
    writing of tensors, which raise none, are made to. A kill there leaves half a file.
    """
    count = 0

    def step(path: Path | None = None) -> None:
        nonlocal count
        count += 1
        if count == number and fault == "kill":
            if path is not None:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            os._exit(KILLED)
        if count == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path or folder))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in WRITES and str(folder) in str(arguments[0]):
            if event == "open" and not int(arguments[2]) & (os.O_WRONLY | os.O_RDWR):
                return
            step()

    def writing(tensors: dict[str, torch.Tensor], path: Path) -> None:
        step()
        save_file(tensors, path)
        step(path)

    fsync = os.fsync

    def syncing(descriptor: int) -> None:
        step()
        fsync(descriptor)

    glowscale.checkpoint.save_file = writing
    os.fsync = syncing
    sys.addaudithook(hook)
    try:
        save(folder, NEW, keep)
    except (CheckpointError, OSError) as error:
        os._exit(REFUSED if str(folder) in str(error) else 98)
    if count >= number:
        os._exit(TOLERATED)


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("fault", ["kill", "refuse"])
def test_a_fault_at_any_operation_of_a_save_leaves_a_valid_checkpoint(
    tmp_path: Path, fault: str, keep: int
) -> None:
    before = tmp_path / "before"
    for images in (0, OLD):
        save(before, images)
    save(tmp_path / "after", NEW)
    versions = [read_checkpoint(find(before, OLD)), read_checkpoint(find(tmp_path / "after", NEW))]
    statuses = []
    for number in range(1, 200):
        folder = tmp_path / f"{number}"
        shutil.copytree(before, folder)

        def body(folder: Path = folder, number: int = number) -> None:
            save_with_a_fault(folder, number, fault, keep)

        statuses.append(in_child(body))
        newest = resume_checkpoint(folder)
        assert newest is not None
        assert any(same(newest, version) for version in versions)
        if statuses[-1] == 0:  # there was no such operation any more
            assert newest.state["images"] == NEW
            break
        if statuses[-1] == TOLERATED:  # an older one could not be removed, which is said
            assert newest.state["images"] == NEW
        else:
            assert statuses[-1] == (KILLED if fault == "kill" else REFUSED)
        pointed = read_checkpoint(find_pointed(folder))
        assert any(same(pointed, version) for version in versions)
        save(folder, NEW + 10, keep)  # the next save goes on and clears what was left
        names = sorted(path.name for path in folder.iterdir())
        assert names[-1] == "latest.json"
        assert len(names) == keep + 1
    assert len(statuses) > 20, "a save has more operations than that"
    assert statuses[-1] == 0


def find(folder: Path, images: int) -> Path:
    return folder / f"images-{images:012d}"


def find_pointed(folder: Path) -> Path:
    """What a user gets who names the run whose checkpoints these are."""
    run = folder.parent / f"run_of_{folder.name}"
    run.mkdir()
    (run / "checkpoints").symlink_to(folder)
    return find_checkpoint(run)


def test_a_disk_that_is_full_anywhere_in_a_save_keeps_the_checkpoint_before(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_disk / "checkpoints"
    save(folder, OLD, keep=1)
    block = os.statvfs(small_disk).f_bsize
    refused = 0
    for blocks in range(40):
        filler = small_disk / "filler"
        free = os.statvfs(small_disk).f_bavail * block
        filler.write_bytes(b"x" * max(0, free - blocks * block))
        try:
            save(folder, NEW, keep=1)
            break
        except CheckpointError as error:
            said = str(error)
        refused += 1
        assert str(find(folder, NEW)) in said
        assert "No space left on device" in said
        newest = resume_checkpoint(folder)
        assert newest is not None
        assert newest.state["images"] in (OLD, NEW)  # NEW where only the pointer found no room
        assert not list(folder.glob("*.partial"))
        filler.unlink()
    assert refused > 5
    assert read_checkpoint(find(folder, NEW)).state["images"] == NEW
    assert "WARNING" not in capsys.readouterr().err


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("what", ["folder", "oldest"])
def test_a_permission_that_is_lost_keeps_the_checkpoint_before(
    tmp_path_factory: pytest.TempPathFactory, what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path_factory.mktemp("run")
    folder = run / "checkpoints"
    for path in (run, *run.parents):
        if path.stat().st_uid == 0 and path != Path("/") and "pytest" in str(path):
            path.chmod(0o755)
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)

    def first() -> None:
        save(folder, 0)
        save(folder, OLD)

    assert in_child(first, NOBODY) == 0
    locked = find(folder, 0) if what == "oldest" else folder
    locked.chmod(0o555)

    def second() -> None:
        try:
            save(folder, NEW)
        except (CheckpointError, OSError) as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(REFUSED)

    assert in_child(second, NOBODY) == (0 if what == "oldest" else REFUSED)
    said = capfd.readouterr().err
    assert str(folder) in said
    assert "Permission denied" in said
    newest = resume_checkpoint(folder)
    assert newest is not None
    # Where only an old checkpoint could not be removed, the new one stands.
    assert newest.state["images"] == (NEW if what == "oldest" else OLD)


class Exploding:
    """A pickle that tells when it is executed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was executed",))


def mutate(path: Path, foreign: Path, rng: random.Random) -> str:
    """Damage a file in a random way; what was done."""
    data = path.read_bytes()
    kind = rng.choice(["flip", "flips", "cut", "grow", "zero", "remove", "swap", "pickle", "dir"])
    match kind:
        case "flip" | "flips":
            changed = bytearray(data)
            for _ in range(1 if kind == "flip" else 50):
                changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
        case "cut":
            path.write_bytes(data[: rng.randrange(len(data))])
        case "grow":
            path.write_bytes(data + rng.randbytes(rng.randrange(1, 100)))
        case "zero":
            at = rng.randrange(len(data))
            path.write_bytes(data[:at] + bytes(len(data) - at))
        case "swap":
            path.write_bytes(foreign.read_bytes())
        case "pickle":
            path.write_bytes(pickle.dumps(Exploding()))
        case "remove" | "dir":
            path.unlink()
            if kind == "dir":
                path.mkdir()
    return f"{kind} {path.name}"


def test_hundreds_of_mutations_give_the_right_weights_or_a_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, seed in ((ours / "checkpoints", 0), (theirs / "checkpoints", 1)):
        save(folder, OLD, seed=seed)
        save(folder, NEW, seed=seed)
    originals = {n: read_checkpoint(find(ours / "checkpoints", n)) for n in (OLD, NEW)}
    files = sorted(p.name for p in find(ours / "checkpoints", NEW).iterdir())
    rng = random.Random(0)
    refused = fallen_back = 0
    for number in range(400):
        run = tmp_path / f"run_{number}"
        shutil.copytree(ours, run)
        newest = find(run / "checkpoints", NEW)
        if rng.random() < 0.15:
            path, foreign = (r / "checkpoints" / "latest.json" for r in (run, theirs))
        else:
            name = rng.choice(files)
            path, foreign = newest / name, find(theirs / "checkpoints", rng.choice([OLD, NEW]))
            foreign = foreign / name
        what = mutate(path, foreign, rng)
        capsys.readouterr()
        said = ""
        try:
            assert same(read_checkpoint(find_checkpoint(run)), originals[NEW]), what
        except CheckpointError as error:
            said = str(error)
            refused += 1
        assert not said or (str(run) in said and "\n" not in said), what
        if what == "swap latest.json":  # then the pointer belies all that is there
            with pytest.raises(CheckpointError, match=r"No checkpoint in .* verifies"):
                resume_checkpoint(run / "checkpoints")
            continue
        resumed = resume_checkpoint(run / "checkpoints")
        assert resumed is not None, what
        assert same(resumed, originals[resumed.state["images"]]), what
        if resumed.state["images"] == OLD:
            fallen_back += 1
            warned = capsys.readouterr().err
            assert "WARNING: " in warned, what
            assert str(newest) in warned, what
        shutil.rmtree(run)
    assert refused > 300
    assert fallen_back > 250


@pytest.mark.parametrize("images", [OLD, NEW])
def test_whole_checkpoints_of_another_run_are_refused(tmp_path: Path, images: int) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, seed in ((ours, 0), (theirs, 1)):
        save(folder, OLD, seed=seed)
        save(folder, NEW, seed=seed)
    shutil.rmtree(find(ours, images))
    shutil.copytree(find(theirs, images), find(ours, images))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: .* pointer's"):
        read_checkpoint(find(ours, images))


def test_a_pickle_with_the_right_hashes_is_still_not_executed(tmp_path: Path) -> None:
    path = save(tmp_path, NEW)
    (tmp_path / "latest.json").unlink()
    (path / "model.safetensors").write_bytes(pickle.dumps(Exploding()))
    manifest = json.loads((path / "manifest.json").read_bytes())
    digest = glowscale.checkpoint.sha256_of(path / "model.safetensors")
    manifest["files"]["model.safetensors"] = digest
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(path)
