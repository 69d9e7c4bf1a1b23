"""Saving in the background: what is written is what was given, and nothing fails silently."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from glowscale.checkpoint import TENSORS, CheckpointError, save_checkpoint
from glowscale.training.saver import Saver


def test_updates_after_the_start_of_a_save_are_not_in_it() -> None:
    go_on, written = threading.Event(), []

    def write(tensors: Mapping[str, Mapping[str, Tensor]], counters: dict[str, Any]) -> None:
        assert go_on.wait(30)
        written.append((tensors["model"]["w"].clone(), counters))

    weight = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    with Saver(write) as saver:
        for number in range(2):
            saver.start({"model": {"w": weight}}, {"images": number})
            weight.add_(100)  # the next update, in place
            go_on.set()
            saver.wait()
    for number, (tensor, counters) in enumerate(written):
        assert counters == {"images": number}
        assert torch.equal(tensor, torch.arange(24.0).reshape(1, 2, 3, 4) + 100 * number)


def test_one_save_is_written_at_a_time_and_all_before_the_end() -> None:
    running, most, done = [], 0, 0

    def write(tensors: object, counters: dict[str, Any]) -> None:
        nonlocal most, done
        running.append(counters)
        most = max(most, len(running))
        threading.Event().wait(0.05)
        running.pop()
        done += 1

    with Saver(write) as saver:
        for number in range(3):
            saver.start({}, {"images": number})
    assert (most, done) == (1, 3)


def test_a_save_that_failed_is_told_at_the_next_chance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(tensors: object, counters: dict[str, Any]) -> None:
        raise CheckpointError(f"{tmp_path} cannot be written.")

    saver = Saver(write)
    saver.start({}, {})
    with pytest.raises(CheckpointError, match="cannot be written"):
        saver.start({}, {})
    with pytest.raises(CheckpointError, match="cannot be written"), Saver(write) as saver:
        saver.start({}, {})

    # Beside the error that ended the training it is a warning, not lost and not in its place.
    def fail() -> None:
        with Saver(write) as saver:
            saver.start({}, {})
            raise KeyError("the first")

    with pytest.raises(KeyError, match="the first"):
        fail()
    assert f"WARNING: {tmp_path} cannot be written." in capsys.readouterr().err


def test_a_save_leaves_no_pool_of_threads_behind(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        layered = torch.randn(64, 64, 32, 32).to(memory_format=torch.channels_last)
        tensors = {part: {"w": layered} for part in TENSORS}
        layered.contiguous()  # this thread's pool
        threads = {thread.id for thread in psutil.Process().threads()}

        def write(parts: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
            save_checkpoint(tmp_path, state["images"], parts, state, keep=2)

        with Saver(write) as saver:
            for images in range(2):
                saver.start(tensors, {"images": images})
                saver.wait()
            added = {thread.id for thread in psutil.Process().threads()} - threads
            assert len(added) == 1  # the writer alone
    finally:
        torch.set_num_threads(before)
