"""Generate images from a run's averaged weights, as WebDataset shards of PNGs and a grid.

python pipelines/sample.py RUN --count N --out DIR, alone or under `accelerate launch`; the same
command again makes only what is missing. Several jobs share the work by --part I --parts N.
"""

import argparse
import os
from pathlib import Path

from accelerate import Accelerator

from glowscale.bijections import Guidance, Jacobi
from glowscale.checkpoint import Checkpoint, load_model
from glowscale.distributed import leave, refuse_disagreement, start_accelerator
from glowscale.errors import UserError
from glowscale.jobs import above_zero, finite, job, positive, report, run, say, whole
from glowscale.restarts import refuse_standstill
from glowscale.sampling import generate, inverting, save_preview

PREVIEW = 64


def main() -> None:
    """Load the model, write the shards that are missing, then the grid."""
    arguments = parse_arguments()
    with job():
        if os.environ.get("RANK", "0") == "0":
            refuse_standstill(arguments.out, len([*arguments.out.glob("*.tar")]), "shards")
        accelerator = start_accelerator(arguments.precision)
        part, parts = place_of(arguments, accelerator)
        model, checkpoint = load_model(arguments.run, arguments.weights)
        refuse_disagreement("checkpoints", checkpoint.digest)
        model.to(accelerator.device)
        label = class_label(arguments.class_name, checkpoint.state["classes"], model.classes)
        guidance, solver = inversion_of(arguments)
        with accelerator.autocast(), inverting(model, guidance, solver):
            shards = generate(
                model,
                arguments.out,
                count=arguments.count,
                seed=arguments.seed,
                temperature=arguments.temperature,
                identity=identity_of(arguments, checkpoint),
                label=label,
                classes=checkpoint.state["classes"],
                shard_size=arguments.shard_size,
                part=part,
                parts=parts,
                quiet=not accelerator.is_main_process,
            )
            accelerator.wait_for_everyone()
            if part == 0:
                grid = arguments.out / "grid.png"
                count = min(arguments.count, PREVIEW)
                save_preview(model, grid, count, arguments.seed, arguments.temperature, label)
        if accelerator.is_main_process:
            say(describe(arguments, shards))
            if arguments.json:
                made = [str(path) for path in shards if path.exists()]
                report({"images": arguments.count, "shards": made})
        leave(accelerator)


def identity_of(arguments: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, str]:
    """What the images depend on beside their indices, seed and temperature."""
    identity = {"checkpoint": checkpoint.digest, "weights": arguments.weights}
    if arguments.precision != "float32":
        identity["precision"] = arguments.precision
    for name in ("guidance", "guidance_temperature", "jacobi"):
        if getattr(arguments, name) is not None:
            identity[name] = str(getattr(arguments, name))
    return identity


def inversion_of(arguments: argparse.Namespace) -> tuple[Guidance | None, Jacobi | None]:
    """How autoregressive flows are guided and solved."""
    weight, temperature = arguments.guidance, arguments.guidance_temperature
    guidance = None if weight is None else Guidance(weight, temperature or 1.0)
    return guidance, None if arguments.jacobi is None else Jacobi(arguments.jacobi)


def place_of(arguments: argparse.Namespace, accelerator: Accelerator) -> tuple[int, int]:
    """Which part of how many this process makes, among all processes of all jobs."""
    processes = accelerator.num_processes
    return (
        arguments.part * processes + accelerator.process_index,
        arguments.parts * processes,
    )


def describe(arguments: argparse.Namespace, shards: list[Path]) -> str:
    """What there is now."""
    there = sum(path.exists() for path in shards)
    if there == len(shards):
        return f"{arguments.count:,} images in {there} shards in {arguments.out}"
    return f"{there} of {len(shards)} shards are there; other parts make the others"


def class_label(name: str | None, names: list[str], classes: int) -> int | None:
    """The label of a class given by its name; raises UserError if the model has no such class."""
    if name is None:
        return None
    if not classes:
        raise UserError("--class is given, but the model is not conditional on classes.")
    if name not in names:
        raise UserError(f"The model has no class {name!r}; it has {', '.join(names)}.")
    return names.index(name)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("--count", type=positive, required=True, help="number of images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0, help="scale of the latents")
    parser.add_argument("--class", dest="class_name", metavar="NAME", help="only images of it")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema")
    parser.add_argument(
        "--precision", choices=["float32", "bf16"], default="float32", help="of the networks"
    )
    parser.add_argument(
        "--guidance",
        type=finite,
        metavar="W",
        help="of autoregressive flows, 0 for none; by classes that model.class_dropout withheld",
    )
    parser.add_argument(
        "--guidance-temperature",
        type=above_zero,
        metavar="T",
        help="of attention in the network that guidance leads away from; without classes",
    )
    parser.add_argument(
        "--jacobi",
        type=above_zero,
        metavar="TOLERANCE",
        help="solve autoregressive flows in parallel passes, until nothing changes by more",
    )
    parser.add_argument("--shard-size", type=positive, default=1000, help="images a shard")
    parser.add_argument("--parts", type=positive, default=1, help="jobs that share the work")
    parser.add_argument("--part", type=whole, default=0, help="which of them this is, from 0 on")
    parser.add_argument("--json", action="store_true", help="end with a JSON object on stdout")
    arguments = parser.parse_args()
    if arguments.part >= arguments.parts:
        parser.error(f"--part is {arguments.part}; it must be less than --parts {arguments.parts}")
    if arguments.guidance is None and arguments.guidance_temperature is not None:
        parser.error("--guidance-temperature is of --guidance, which is not given")
    return arguments


if __name__ == "__main__":
    run(main)
