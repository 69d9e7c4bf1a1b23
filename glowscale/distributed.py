"""The processes of a job: starting them through Accelerate, and sums over them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor

from glowscale.errors import UserError
from glowscale.stopping import LostProcessError

Precision = Literal["float32", "bf16", "float64"]
JOIN_SECONDS = 55.0
"""So long processes wait for one another when a job starts."""


class LaunchError(UserError):
    """Processes that were not started as the launcher meant it."""


def start_accelerator(
    precision: Precision = "float32", trackers: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """Join the job's processes; without a launcher, a job of one.

    Args:
        precision: of the networks.
        trackers: names of Accelerate's experiment trackers.
        folder: where trackers write that keep files.

    Raises:
        LaunchError: if Accelerate counts other processes than the launcher started, or a
            tracker is not installed.
        LostProcessError: if some of them are not there within a minute.
    """
    available = [str(tracker) for tracker in get_available_trackers()]
    for tracker in trackers:
        if tracker not in available:
            raise LaunchError(
                f"log.trackers names {tracker!r}, which is not installed; available are "
                f"{', '.join(available) or 'none'}."
            )
    torch.backends.cudnn.allow_tf32 = False  # its ten bits of mantissa are not float32
    torch.backends.cuda.matmul.allow_tf32 = False
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    _meet(launched)
    try:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="bf16" if precision == "bf16" else "no",
            log_with=list(trackers) or None,
            project_dir=folder,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    except ValueError as error:  # of the launcher's variables, or a precision not to be had here
        raise LaunchError(f"Accelerate cannot start with WORLD_SIZE={launched}: {error}") from None
    if accelerator.num_processes != launched:
        raise LaunchError(
            f"The launcher started {launched} processes (WORLD_SIZE), but Accelerate joined "
            f"{accelerator.num_processes}; launch with a config file of configs/accelerate/."
        )
    return accelerator


def _meet(processes: int) -> None:
    """Join processes that were started without a launcher of torch's own, such as by SLURM.

    Accelerate would do it too, but wait half an hour for one that is not there.
    """
    told = {"MASTER_ADDR", "MASTER_PORT", "RANK"} <= os.environ.keys()
    if processes == 1 or not told or dist.is_torchelastic_launched():
        return
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    rank = int(os.environ["RANK"])
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, int(port), processes, rank == 0, timeout=timedelta(seconds=JOIN_SECONDS)
        )
    except (RuntimeError, ValueError) as error:
        raise LostProcessError(
            f"{processes} processes (WORLD_SIZE) were to meet at {address}:{port} within "
            f"{JOIN_SECONDS:.0f} s, and did not: {str(error).partition(chr(10))[0]}"
        ) from None
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes)


def leave(accelerator: Accelerator) -> None:
    """End the job's part in the processes: all come to here, trackers finish, all go."""
    accelerator.wait_for_everyone()
    accelerator.end_training()


def refuse_disagreement(what: str, value: str) -> None:
    """Refuse to go on where processes see different values; all must call it. LaunchError."""
    values: list[str] = gather_object([value])
    if len(set(values)) > 1:
        seen = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
        raise LaunchError(
            f"The processes see different {what} ({seen}); do they share the folder?"
        )


@contextmanager
def failing_together() -> Iterator[None]:
    """Run the body on all processes; where it fails on one of them, it fails on every one.

    So the others never wait for a process that is gone. For what a single one does, such as
    writing files; the body itself must not wait for other processes.

    Raises:
        UserError: with the message of the first process that failed.
    """
    failure: UserError | OSError | None = None
    try:
        yield
    except (UserError, OSError) as error:
        failure = error
    messages: list[str] = gather_object([str(failure) if failure else ""])
    if failure:
        raise failure
    if first := next(filter(None, messages), ""):
        raise UserError(first)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on each of them; all must call it."""
    if dist.is_available() and dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


class LateWord:
    """Brings a few numbers from the device to the host without ever waiting for the device.

    `put` starts the copy and `take`, a step later, finds them there. On the CPU both are at once.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None

    def put(self, word: Tensor) -> None:
        """Start to bring a word (N,), which must be taken before the next one is put."""
        if not word.is_cuda:
            self._pending = word, None
            return
        host = torch.empty(word.shape, dtype=word.dtype, pin_memory=True)
        host.copy_(word, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending = host, event

    def take(self) -> list[float] | None:
        """The word that was put last, None where there is none or it was taken."""
        if self._pending is None:
            return None
        (word, event), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        return word.tolist()
