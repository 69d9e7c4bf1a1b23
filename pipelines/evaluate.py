"""Bits per dimension of held-out images under a run's averaged weights.

python pipelines/evaluate.py RUN, alone or under `accelerate launch`; RUN is a run folder or a
checkpoint. What is not given is as in the run's config.
"""

import argparse
from pathlib import Path

from glowscale.checkpoint import load_model
from glowscale.config import parse_config
from glowscale.data import ShardSet
from glowscale.distributed import leave, refuse_disagreement, start_accelerator
from glowscale.evaluation import evaluate
from glowscale.files import join
from glowscale.jobs import job, positive, report, run, say


def main() -> None:
    """Load the model, score the images, tell the figure."""
    arguments = parse_arguments()
    with job():
        accelerator = start_accelerator()
        model, checkpoint = load_model(arguments.run, arguments.weights)
        refuse_disagreement("checkpoints", checkpoint.digest)
        config = parse_config(checkpoint.state["config"])
        seed = config.run.seed if arguments.seed is None else arguments.seed
        evaluation = evaluate(
            model.to(accelerator.device),
            ShardSet(arguments.data or join(config.data.dir, config.data.held_out_split)),
            seed=seed,
            batch=arguments.batch or config.evaluate.batch,
            images=arguments.images,
            importance_samples=arguments.importance_samples or config.evaluate.importance_samples,
            probes=arguments.probes or config.evaluate.probes,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        if accelerator.is_main_process:
            say(f"{checkpoint.path}: {evaluation}")
            if arguments.json:
                origin = {"checkpoint": checkpoint.digest, "weights": arguments.weights}
                report({**evaluation.to_dict(), **origin})
        leave(accelerator)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("--data", help="split to score, if not the run's held-out one")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema")
    parser.add_argument("--images", type=positive, help="score only the first so many")
    parser.add_argument("--importance-samples", type=positive, metavar="K", help="of the noise")
    parser.add_argument("--probes", type=positive, help="estimates of a continuous flow's trace")
    parser.add_argument("--batch", type=positive, help="images of a block")
    parser.add_argument("--seed", type=int, help="seed of the dequantization noise")
    parser.add_argument("--json", action="store_true", help="end with a JSON object on stdout")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
