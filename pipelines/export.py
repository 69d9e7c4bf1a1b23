"""Export a run's averaged weights as a folder to share: safetensors, config.json, a model card.

python pipelines/export.py RUN DIR; RUN is a run folder or a checkpoint. In Python,
`glowscale.load("DIR")` gives the model.
"""

import argparse
from pathlib import Path

from glowscale.jobs import job, report, run, say
from glowscale.pretrained import ImageModel

PUSH = "also push it to the Hugging Face hub, where a new repository is public"


def main() -> None:
    """Load the model, write the folder, push it if asked to."""
    arguments = parse_arguments()
    with job():
        model = ImageModel.from_run(arguments.run, arguments.weights)
        model.save_pretrained(arguments.out)
        origin = model.description.origin
        say(
            f"{arguments.out}: a {model.description.family} after {origin.images:,} images; "
            f"load it with glowscale.load({str(arguments.out)!r})"
        )
        url = model.push_to_hub(arguments.push) if arguments.push else None
        if url:
            say(f"pushed: {url}")
        if arguments.json:
            report({"folder": str(arguments.out), "pushed": url, **origin.model_dump()})


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("out", type=Path, metavar="DIR", help="folder of the exported model")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema")
    parser.add_argument("--push", metavar="REPO_ID", help=PUSH)
    parser.add_argument("--json", action="store_true", help="end with a JSON object on stdout")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
