"""What all jobs share: how they end, in words for people and in JSON for scripts."""

import argparse
import atexit
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError

from glowscale.errors import UserError
from glowscale.stopping import STOPPED, LostProcessError, Stopped


def run(main: Callable[[], None]) -> NoReturn:
    """Run a job as this whole process, and end the process with the job's status.

    Past its end the interpreter is not torn down: a thread of a process group that still lets go
    of a tensor would abort the process there, after all its work is done.
    """
    try:
        main()
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            say(end.code)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whoever read it may be gone
            stream.flush()
    os._exit(status)


@contextmanager
def job() -> Iterator[None]:
    """Run a job's body; an error that the user can mend ends it with one sentence, status 1.

    So do a full disk, a missing permission, and whatever else the file system refuses. A job
    that was asked to stop and saved its state ends with the status STOPPED; so does one that has
    lost another of its processes, as when a node fails.
    """
    try:
        yield
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            say(f"Stopped: {stopped}")
        raise SystemExit(STOPPED) from None
    except LostProcessError as error:
        _end_without_others(str(error))
    except KeyboardInterrupt:
        raise SystemExit(
            "Interrupted; the same command goes on from the last checkpoint."
        ) from None
    except torch.OutOfMemoryError as error:
        first = str(error).partition(". ")[0]
        raise SystemExit(f"Error: {first}; lower train.micro_batch or evaluate.batch.") from None
    except (UserError, OSError, SafetensorError) as error:
        raise SystemExit(f"Error{_where()}: {_sentence(error)}") from None
    except RuntimeError as error:
        if not LOST_PEER.search(str(error)):
            raise
        _end_without_others(str(error).partition("\n")[0])


LOST_PEER = re.compile(r"(?i)connection (closed|reset|refused)|broken pipe|NCCL.*(remote|abort)")
"""What gloo and NCCL say where the process at the other end is gone."""


def _end_without_others(why: str) -> NoReturn:
    say(
        f"Lost another process{_where()}: {why} The same command goes on from the last checkpoint."
    )
    raise SystemExit(STOPPED)


def _where() -> str:
    rank = os.environ.get("RANK")
    return f" on rank {rank}" if rank not in (None, "0") else ""


def say(text: str) -> None:
    """Tell people something, on stderr."""
    print(text, file=sys.stderr, flush=True)


def report(result: dict[str, Any]) -> None:
    """Tell scripts the result: one JSON object on stdout, the last thing that a job prints."""
    print(json.dumps(result, allow_nan=False), flush=True)


def positive(text: str) -> int:
    """A whole number above zero, for a command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def whole(text: str) -> int:
    """A whole number, 0 or above, for a command line."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 0 or above")
    return int(text)


def finite(text: str) -> float:
    """A number, for a command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} must be a finite number")
    return value


def above_zero(text: str) -> float:
    """A number above zero, for a command line."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}."
    return str(error)
