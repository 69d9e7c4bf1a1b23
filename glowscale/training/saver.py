"""Saving without stalling: tensors are copied to host memory and written beside the training."""

import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from glowscale.jobs import say

Parts = Mapping[str, Mapping[str, Tensor]]


class Saver:
    """Writes checkpoints in the background, one at a time; as a context manager it ends whole.

    The copies stay allocated from one save to the next, so a process that saves holds every
    saved tensor in host memory once more. Threads suffice: writing, hashing and syncing all
    leave the interpreter to the training.

    Args:
        write: writes the tensors of a checkpoint, by part and name, and its counters.
    """

    def __init__(self, write: Callable[[Parts, dict[str, Any]], object]) -> None:
        self._write = write
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._writer = ThreadPoolExecutor(1, "checkpoint", _give_way)
        self._pending: Future[None] | None = None

    def start(self, tensors: Parts, counters: dict[str, Any]) -> None:
        """Copy a checkpoint's tensors and begin to write it, once the one before is written.

        Raises:
            CheckpointError: if the one before could not be written.
        """
        self.wait()
        copied = self._copy(tensors)
        self._pending = self._writer.submit(self._write_copies, copied, counters)

    def wait(self) -> None:
        """Return when all is written; raises CheckpointError if that failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def refuse_failed(self) -> None:
        """Raise the CheckpointError of a save that failed meanwhile, without waiting."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            say(f"WARNING: {failure}")  # beside what ended the training
        finally:
            self._writer.shutdown()

    def _copy(self, tensors: Parts) -> torch.cuda.Event | None:
        """Copy to host memory; on a GPU, return the event after which the copies are there."""
        for part, values in tensors.items():
            before = self._copies.get(part, {})
            self._copies[part] = {key: _room(x, before.get(key)) for key, x in values.items()}
            for key, x in values.items():
                self._copies[part][key].copy_(x.detach(), non_blocking=True)
        if not any(x.is_cuda for values in tensors.values() for x in values.values()):
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()  # the next update comes after it: the copies are in its stream
        return event

    def _write_copies(self, copied: torch.cuda.Event | None, counters: dict[str, Any]) -> None:
        if copied is not None:
            copied.synchronize()
        self._write(self._copies, counters)


def _give_way() -> None:
    """Let this thread have only the time that the training leaves; where threads have a rank."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _room(tensor: Tensor, before: Tensor | None) -> Tensor:
    """Host memory for a copy in the layout of files, that of the last copy where it fits.

    So the writing thread need not lay anything out anew. It would with a pool of OpenMP threads of
    its own, which stays: there would be more of them than cores, and then they wait for each other
    asleep, which makes every operation of a CPU training slower, up to twice.
    """
    if before is not None and (before.shape, before.dtype) == (tensor.shape, tensor.dtype):
        return before
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
