"""What all jobs share: how they end, in words for people and in JSON for scripts."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError

from glowscale.errors import UserError


@contextmanager
def job() -> Iterator[None]:
    """Run a job's body; an error that the user can mend ends it with one sentence, status 1.

    So do a full disk, a missing permission, and whatever else the file system refuses.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(
            "Interrupted; the same command goes on from the last checkpoint."
        ) from None
    except torch.OutOfMemoryError as error:
        first = str(error).partition(". ")[0]
        raise SystemExit(f"Error: {first}; lower train.micro_batch or evaluate.batch.") from None
    except (UserError, OSError, SafetensorError) as error:
        rank = os.environ.get("RANK")
        where = f" on rank {rank}" if rank not in (None, "0") else ""
        raise SystemExit(f"Error{where}: {_sentence(error)}") from None


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


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}."
    return str(error)
