"""Write a run's report.html anew: config, curves, samples, evaluations, environment in one page.

python pipelines/report.py RUN; training and evaluation write it too.
"""

import argparse
from pathlib import Path

from glowscale.jobs import job, run, say
from glowscale.report import write_report


def main() -> None:
    """Write the page, tell where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    arguments = parser.parse_args()
    with job():
        say(f"see {write_report(arguments.run)}")


if __name__ == "__main__":
    run(main)
