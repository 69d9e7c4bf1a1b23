"""Bits per dimension of held-out images under a run's averaged weights.

python pipelines/evaluate.py RUN, alone or under `accelerate launch`; RUN is a run folder or a
checkpoint.
"""

import argparse
from pathlib import Path

from glowscale.data import ShardSet
from glowscale.distributed import start_accelerator
from glowscale.evaluation import evaluate
from glowscale.jobs import job, report, say
from glowscale.training import load_model


def main() -> None:
    """Load the model, score the images, tell the figure."""
    arguments = parse_arguments()
    with job():
        accelerator = start_accelerator()
        model, checkpoint = load_model(arguments.run, arguments.weights)
        config = checkpoint.state["config"]
        data = arguments.data or Path(config["data"]["dir"]) / config["data"]["held_out_split"]
        evaluation = evaluate(
            model.to(accelerator.device),
            ShardSet(data),
            seed=arguments.seed,
            batch=arguments.batch,
            images=arguments.images,
            importance_samples=arguments.importance_samples,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        if accelerator.is_main_process:
            say(f"{checkpoint.path}: {evaluation}")
            if arguments.json:
                report({**evaluation.to_dict(), "checkpoint": checkpoint.digest})
        accelerator.end_training()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("--data", type=Path, help="split to score, if not the run's held-out one")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema")
    parser.add_argument("--images", type=int, help="score only the first so many")
    parser.add_argument("--importance-samples", type=int, default=1, metavar="K")
    parser.add_argument("--batch", type=int, default=250, help="images of a block")
    parser.add_argument("--seed", type=int, default=0, help="seed of the dequantization noise")
    parser.add_argument("--json", action="store_true", help="end with a JSON object on stdout")
    return parser.parse_args()


if __name__ == "__main__":
    main()
