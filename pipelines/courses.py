"""Draw the courses of several runs in one picture: bits/dim in training over minutes.

python pipelines/courses.py RUN RUN ... --out courses.png
"""

import argparse
from pathlib import Path

from glowscale.courses import save_courses
from glowscale.jobs import job, run, say


def main() -> None:
    """Draw them, tell where the picture is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders", metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="the picture, a PNG")
    arguments = parser.parse_args()
    with job():
        save_courses(arguments.runs, arguments.out)
        say(f"see {arguments.out}")


if __name__ == "__main__":
    run(main)
