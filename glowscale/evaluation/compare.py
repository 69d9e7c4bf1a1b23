"""Two evaluations on the same images, compared image by image."""

import csv
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from glowscale.errors import UserError
from glowscale.evaluation.records import FORMAT, IMAGES, RESULT


class ComparisonError(UserError):
    """Evaluations that cannot be compared; the message says why."""


@dataclass(frozen=True)
class Difference:
    """What one evaluation's bits/dim are less than another's."""

    bits_per_dim: tuple[float, float]
    """Of the one and of the other."""
    difference: float
    """The one less the other; negative where the one is better."""
    standard_error: float
    """Of the difference, over the images."""
    images: int
    settings: dict[str, tuple[Any, Any]]
    """What else the two differ in, such as the dequantization."""

    def __str__(self) -> str:
        one, other = self.bits_per_dim
        unlike = ", ".join(f"{key} {a} and {b}" for key, (a, b) in self.settings.items())
        return (
            f"{one:.4f} less {other:.4f} is {self.difference:+.4f} ± {self.standard_error:.4f} "
            f"bits/dim, paired over {self.images:,} images"
            + (f"; they also differ in {unlike}" if unlike else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


MUST_AGREE = {"fingerprint": "data", "images": "number of images"}
TOLD = ("dequantization", "importance_samples", "probes", "weights", "seed")


def compare(one: Path, other: Path) -> Difference:
    """Compare the evaluations that two folders hold.

    Raises:
        ComparisonError: where a folder holds no finished evaluation, they are on other images, or
            only one of them bounds the pixels' bits/dim.
    """
    folders = (one, other)
    results = [_read_result(folder) for folder in folders]
    for key, what in MUST_AGREE.items():
        values = [result[key] for result in results]
        if values[0] != values[1]:
            raise ComparisonError(
                f"{one} and {other} are not on the same images: their {what} is {values[0]} and "
                f"{values[1]}."
            )
    bounds = [result.get("is_bound", True) for result in results]
    if bounds[0] != bounds[1]:
        raise ComparisonError(
            f"{folders[bounds.index(False)]} scores images with noise added, which bounds nothing "
            f"on the pixels that {folders[bounds.index(True)]} scores; they cannot be compared."
        )
    scores = [_read_scores(folder) for folder in folders]
    differences = [a - b for a, b in zip(*scores, strict=True)]
    count = len(differences)
    return Difference(
        bits_per_dim=(fmean(scores[0]), fmean(scores[1])),
        difference=fmean(differences),
        standard_error=stdev(differences) / math.sqrt(count) if count > 1 else math.nan,
        images=count,
        settings={
            key: (results[0][key], results[1][key])
            for key in TOLD
            if results[0][key] != results[1][key]
        },
    )


def _read_result(folder: Path) -> dict[str, Any]:
    path = folder / RESULT
    if not path.exists():
        raise ComparisonError(f"{folder} holds no finished evaluation ({RESULT} is missing).")
    result = dict(json.loads(path.read_bytes()))
    if result.get("format") != FORMAT:
        raise ComparisonError(f"{path} has the format {result.get('format')!r}, not {FORMAT!r}.")
    return result


def _read_scores(folder: Path) -> list[float]:
    with (folder / IMAGES).open(newline="") as lines:
        return [float(row["bits_per_dim"]) for row in csv.DictReader(lines)]
