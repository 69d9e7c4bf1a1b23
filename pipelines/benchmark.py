"""Speed beside peers and beside the floor, in one run on the same data; medians of several.

python pipelines/benchmark.py data: the training stream, images per second of one reading process,
beside the plain webdataset pipeline and beside a bare loop that reads and decodes the same bytes.

python pipelines/benchmark.py checkpoint: what a save costs the training, the mean time of so many
steps with one save in them beside the mean of as many without.

python pipelines/benchmark.py train: a step of Glow's training beside normflows' (the extra
`bench`) and beside the floor, its networks alone.

python pipelines/benchmark.py memory: what a step holds and takes, by `train.activations`.

python pipelines/benchmark.py scaling: how a step's cost grows with pixels, depth and processes.

python pipelines/benchmark.py sample: Glow's sampling beside normflows', and the job of sampling
beside the model's sampling alone.

python pipelines/benchmark.py linear: what the parametrizations of a linear flow's matrix cost, and
how that grows with its dimension.

python pipelines/benchmark.py inverse: what density and sampling cost by kind of flow, and how that
grows with the number of pixels.

python pipelines/benchmark.py ffjord: a step of a continuous flow, at the original code's reference
setting (28×28 images, three levels, two flows in a row, hidden 64-64-64, dopri5 at 1e-5, batch 32)
and by our recipe for Fashion-MNIST.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks import (
    continuous,
    inverses,
    linear,
    memory,
    sampling,
    saves,
    scaling,
    streams,
    training,
)

from glowscale.jobs import job, report, run

BENCHMARKS = {
    "data": (streams, "the training stream"),
    "checkpoint": (saves, "what a save costs the training"),
    "train": (training, "a step of Glow's training beside normflows' and the floor"),
    "memory": (memory, "what a step of Glow's training keeps, by train.activations"),
    "scaling": (scaling, "how the cost of training grows with pixels, depth and processes"),
    "sample": (sampling, "the job of sampling beside the model alone"),
    "linear": (linear, "what the parametrizations of a linear flow cost by dimension"),
    "inverse": (inverses, "what density and sampling cost by kind of flow"),
    "ffjord": (continuous, "a step of a continuous flow"),
}


def main() -> None:
    """Run the benchmark that is asked for."""
    arguments = parse_arguments()
    with job(), tempfile.TemporaryDirectory() as folder:
        figures = arguments.measure(arguments, Path(folder))
        if arguments.json:
            report(figures)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, (benchmark, purpose) in BENCHMARKS.items():
        kind = kinds.add_parser(name, help=purpose, description=benchmark.__doc__)
        benchmark.add_arguments(kind)
        kind.add_argument("--json", action="store_true", help="end with a JSON object on stdout")
        kind.set_defaults(measure=benchmark.measure)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
