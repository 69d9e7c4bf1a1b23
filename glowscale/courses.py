"""The courses of several runs in one picture: bits/dim over the time that their updates took."""

from collections.abc import Sequence
from pathlib import Path

from glowscale.errors import UserError
from glowscale.files import read_lines
from glowscale.pictures import save_figure

SETTLED = 0.1
"""Part of a course after which it decides what the picture shows; the first steps are steep."""


def read_course(run: Path) -> list[tuple[float, float]]:
    """Minutes of updates, and bits/dim in training, at each look of a run's folder.

    Evaluations, pictures, restarts and work that a kill has undone take no time here.

    Raises:
        UserError: if the run has made no look at its training yet, or is none.
    """
    speeds = {
        line["images"]: line["images_per_second"]
        for line in read_lines(run / "times.jsonl")
        if line["kind"] == "train"
    }
    course, seconds, seen = [], 0.0, 0
    for line in read_lines(run / "metrics.jsonl"):
        if line["kind"] == "train" and line["images"] in speeds:
            seconds += (line["images"] - seen) / speeds[line["images"]]
            seen = line["images"]
            if line["bits_per_dim"] is not None:
                course.append((seconds / 60, line["bits_per_dim"]))
    if not course:
        raise UserError(f"{run} holds no course of a training: metrics.jsonl, times.jsonl.")
    return course


def save_courses(runs: Sequence[Path], path: Path) -> None:
    """Draw runs' bits/dim in training over minutes, the best at the end named first.

    Raises:
        UserError: if one of them has no course.
    """
    from matplotlib.figure import Figure  # slow to import

    courses = {run: read_course(run) for run in runs}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run in sorted(runs, key=lambda run: courses[run][-1][1]):
        axes.plot(*zip(*courses[run], strict=True), label=run.absolute().name, linewidth=1.2)
    settled = [
        bits
        for course in courses.values()
        for minutes, bits in course
        if minutes > SETTLED * course[-1][0]
    ]
    axes.set_ylim(min(settled) - 0.1, max(settled) + 0.1)
    axes.set_xlabel("minutes of updates")
    axes.set_ylabel("bits/dim in training")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
