"""Compare two evaluations image by image: the mean difference in bits/dim, its standard error.

python pipelines/compare.py ONE OTHER, each a folder that evaluate.py left in RUN/evaluations.
Paired by image, the difference is known far better than either figure.
"""

import argparse
from pathlib import Path

from glowscale.evaluation import compare
from glowscale.jobs import job, report, run, say


def main() -> None:
    """Read both, compare them, tell the difference."""
    arguments = parse_arguments()
    with job():
        difference = compare(arguments.one, arguments.other)
        say(str(difference))
        if arguments.json:
            report(difference.to_dict())


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("one", type=Path, help="folder of an evaluation")
    parser.add_argument("other", type=Path, help="another's, on the same images")
    parser.add_argument("--json", action="store_true", help="end with a JSON object on stdout")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
