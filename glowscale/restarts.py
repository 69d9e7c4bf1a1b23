"""Restarts by a scheduler: a finished job stays finished, one that stands still gives up."""

import json
import os
from pathlib import Path

from glowscale.errors import UserError
from glowscale.files import write_atomically

LIMIT = 4
"""So often a job may be started at the same place."""


class StandstillError(UserError):
    """A job that is started again and again and gets nowhere."""


def restarts() -> int:
    """How often SLURM has started this job again; 0 the first time, or outside of SLURM."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def refuse_standstill(folder: Path, progress: int, unit: str) -> None:
    """Note where a restarted job stands, and give up where it stood there too often.

    Only one process of a job may call it, before anything that may fail. A first start, and a
    job that no scheduler restarts, note nothing.

    Args:
        folder: of the job's results.
        progress: how far these are.
        unit: what progress counts, for the message.

    Raises:
        StandstillError: if the job was started `LIMIT` times with the same progress.
    """
    if not restarts():
        return
    job = os.environ["SLURM_JOB_ID"]
    path = folder / "restarts" / f"{job}.json"
    starts = [*json.loads(path.read_bytes()), progress] if path.exists() else [progress]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(starts).encode())
    if starts[-LIMIT:] == [progress] * LIMIT:
        raise StandstillError(
            f"Job {job} was started {LIMIT} times with {progress:,} {unit} done and got no "
            f"further; it gives up. Its log tells why it ended; a new submission goes on."
        )
