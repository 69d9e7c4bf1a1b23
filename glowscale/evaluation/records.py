"""What an evaluation leaves in a folder: its blocks so far, then every image's score."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from glowscale.evaluation.bits import bits_per_dim
from glowscale.evaluation.result import Evaluation
from glowscale.evaluation.scoring import Scores
from glowscale.files import claim_folder, write_atomically

JOB, RESULT, IMAGES = "job.json", "result.json", "images.csv"
FORMAT = "glowscale evaluation 1"
COLUMNS = ("image", "class", "bits_per_dim", "single_sample_bits_per_dim", "trace_variance")


class Records:
    """The folder of one evaluation, which goes on where it was interrupted.

    While it is under way the folder holds `block-*.safetensors`, which any number of processes
    write, each its own. At its end it holds `images.csv`, a line an image with the columns of
    `COLUMNS` (bits/dim, the variance in bits/dim squared), and `result.json`, the fields of
    `Evaluation` with whatever else they depend on.

    Args:
        folder: made if need be.
        identity: whatever the scores depend on; plain values.

    Raises:
        ClaimError: if the folder holds another evaluation's results.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.identity = identity
        claim_folder(folder, JOB, identity)

    @property
    def is_finished(self) -> bool:
        """Whether the result is there."""
        return (self.folder / RESULT).exists()

    @property
    def blocks(self) -> int:
        """How many blocks are there."""
        return len([*self.folder.glob("block-*.safetensors")])

    def read_result(self) -> dict[str, Any]:
        """The content of `result.json`."""
        return dict(json.loads((self.folder / RESULT).read_bytes()))

    def read(self, indices: range) -> Scores | None:
        """The scores of a block, None if it is not there."""
        try:
            found = load(self._block(indices).read_bytes())
            return Scores(*(found[name] for name in Scores._fields))
        except (FileNotFoundError, SafetensorError, KeyError):  # it is scored again
            return None

    def write(self, indices: range, scores: Scores) -> None:
        """Keep the scores of a block."""
        tensors = {name: x.cpu().contiguous() for name, x in scores._asdict().items()}
        write_atomically(self._block(indices), save(tensors))

    def finish(
        self, scores: Scores, classes: list[str], result: Evaluation, more: dict[str, Any]
    ) -> None:
        """Write every image's score, then the result; the blocks are no longer needed."""
        write_atomically(self.folder / IMAGES, _table(scores, classes, result).encode())
        content = {"format": FORMAT, "summary": str(result), **result.to_dict()}
        content |= {**self.identity, "images": result.images, **more}
        write_atomically(self.folder / RESULT, json.dumps(content, indent=1).encode())
        for path in self.folder.glob("block-*"):  # and what killed processes left of some
            path.unlink(missing_ok=True)

    def _block(self, indices: range) -> Path:
        return self.folder / f"block-{indices.start:09d}.safetensors"


def _table(scores: Scores, classes: list[str], result: Evaluation) -> str:
    """The scores as CSV, in the order of the manifest."""
    dimensions = torch.Size(result.image_shape).numel()
    columns: list[Tensor] = [
        bits_per_dim(scores.log_prob, dimensions),
        bits_per_dim(scores.single_sample_log_prob, dimensions),
        bits_per_dim(scores.trace_variance.sqrt(), dimensions).square(),
    ]
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(COLUMNS)
    labels = scores.labels.long().tolist()
    for image, values in enumerate(zip(*(x.tolist() for x in columns), strict=True)):
        name = classes[labels[image]] if 0 <= labels[image] < len(classes) else ""
        writer.writerow([image, name, *map(repr, values)])
    return lines.getvalue()
