"""Pictures of what a run's model has learned, as PNG grids.

python pipelines/look.py RUN --out DIR: between.png, held-out images in pairs and what lies between
them; levels.png, each image with its finest latents drawn anew, then more and more of them;
temperatures.png, the same latents at rising temperatures, a row each.
"""

import argparse
from pathlib import Path

import torch

from glowscale.checkpoint import load_model
from glowscale.config import parse_config
from glowscale.data import Batch, ShardSet
from glowscale.distributed import start_accelerator
from glowscale.errors import UserError
from glowscale.evaluation import check_fits, refuse_unlabelled
from glowscale.files import join
from glowscale.jobs import job, positive, report, run, say
from glowscale.looking import interpolate, resample_levels, sweep_temperatures
from glowscale.models import MultiscaleFlow
from glowscale.pictures import save_grid

TEMPERATURES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SEARCHED = 2000
"""Held-out images among which partners of the same class are sought."""


def main() -> None:
    """Load the model and the images, draw the three pictures."""
    arguments = parse_arguments()
    with job():
        accelerator = start_accelerator()
        model, checkpoint = load_model(arguments.run, arguments.weights)
        model.to(accelerator.device)
        config = parse_config(checkpoint.state["config"])
        shards = ShardSet(arguments.data or join(config.data.dir, config.data.held_out_split))
        check_fits(model, shards)
        first, last = choose_pairs(model, shards, arguments.rows)
        rows, columns, seed = arguments.rows, arguments.columns, arguments.seed
        ends = (first.images, last.images)
        levels = len(model.latent_shapes) + 1
        pictures = {
            "between.png": (interpolate(model, ends, first.labels, columns), columns),
            "levels.png": (
                resample_levels(model, first.images, first.labels, seed, arguments.temperature),
                levels,
            ),
            "temperatures.png": (sweep_temperatures(model, TEMPERATURES, seed, columns), columns),
        }
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name, (images, width) in pictures.items():
            save_grid(images, model.grey_levels, arguments.out / name, width)
        say(f"{rows} rows of images in {', '.join(pictures)} in {arguments.out}")
        if arguments.json:
            report({"pictures": [str(arguments.out / name) for name in pictures]})


def choose_pairs(model: MultiscaleFlow, shards: ShardSet, count: int) -> tuple[Batch, Batch]:
    """The first so many held-out images, each with the next that no row has, of its own class.

    A model without classes takes any two. Raises UserError where there are too few images.
    """
    batch = shards.read_batch(0, min(SEARCHED, shards.manifest.samples))
    refuse_unlabelled(model, batch)
    labels = batch.labels.tolist() if model.classes else [0] * len(batch.ids)
    waiting: dict[int, int] = {}
    pairs: list[tuple[int, int]] = []
    for index, label in enumerate(labels):
        if label in waiting:
            pairs.append((waiting.pop(label), index))
        else:
            waiting[label] = index
    if len(pairs) < count:
        raise UserError(f"{shards.folder} has only {len(pairs)} pairs of images, not {count}.")
    chosen = torch.tensor(pairs[:count])
    return Batch(*(x[chosen[:, 0]] for x in batch)), Batch(*(x[chosen[:, 1]] for x in batch))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--data", help="split of the images, if not the run's held-out one")
    parser.add_argument("--rows", type=positive, default=6, help="images, or pairs of them")
    parser.add_argument("--columns", type=positive, default=9, help="images a row")
    parser.add_argument("--seed", type=int, default=0, help="of latents that are drawn")
    parser.add_argument("--temperature", type=float, default=0.7, help="of levels.png")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema")
    parser.add_argument("--json", action="store_true", help="end with a JSON object on stdout")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
