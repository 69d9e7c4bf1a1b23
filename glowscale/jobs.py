"""What all jobs share: how they end, in words for people and in JSON for scripts."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from glowscale.errors import UserError


@contextmanager
def job() -> Iterator[None]:
    """Run a job's body; an error that the user can mend ends it with one sentence, status 1."""
    try:
        yield
    except UserError as error:
        rank = os.environ.get("RANK")
        where = f" on rank {rank}" if rank not in (None, "0") else ""
        raise SystemExit(f"Error{where}: {error}") from None


def say(text: str) -> None:
    """Tell people something, on stderr."""
    print(text, file=sys.stderr, flush=True)


def report(result: dict[str, Any]) -> None:
    """Tell scripts the result: one JSON object on stdout, the last thing that a job prints."""
    print(json.dumps(result), flush=True)
