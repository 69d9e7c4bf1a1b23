"""Bits per dimension of held-out images under a run's averaged weights.

python pipelines/evaluate.py RUN, alone or under `accelerate launch`; RUN is a run folder or a
checkpoint. What is not given is as in the run's config. The result and every image's score are
left in RUN/evaluations, see docs/formats.md; the same command goes on where it was interrupted.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import glowscale
from glowscale.checkpoint import Checkpoint, load_model
from glowscale.config import Config, parse_config
from glowscale.data import ShardSet
from glowscale.dequantization import UniformDequantizer
from glowscale.distributed import (
    failing_together,
    leave,
    refuse_disagreement,
    start_accelerator,
    sum_over_ranks,
)
from glowscale.evaluation import (
    Evaluation,
    Records,
    check_fits,
    codec_bits_per_dim,
    evaluate,
    refuse_idle_samples,
    refuse_untrusted,
)
from glowscale.files import join
from glowscale.jobs import job, positive, report, run, say
from glowscale.models import MultiscaleFlow
from glowscale.report import REPORT, write_report
from glowscale.restarts import refuse_standstill
from glowscale.stopping import StopRequest

CODEC_IMAGES = 1000


def main() -> None:
    """Load the model, score the images that are not scored yet, tell the figure."""
    arguments = parse_arguments()
    with job(), StopRequest() as stopping:
        accelerator = start_accelerator()
        model, checkpoint = load_model(arguments.run, arguments.weights)
        refuse_disagreement("checkpoints", checkpoint.digest)
        if arguments.dequantization == "uniform":
            model.dequantizer = UniformDequantizer()
        model.to(accelerator.device)
        config = parse_config(checkpoint.state["config"])
        shards = ShardSet(arguments.data or join(config.data.dir, config.data.held_out_split))
        check_fits(model, shards)  # before a folder is claimed
        settings = settings_of(arguments, config)
        refuse_idle_samples(model.dequantizer.is_bound, settings["importance_samples"])
        records = open_records(arguments, checkpoint, shards, settings)
        if accelerator.is_main_process:
            refuse_standstill(records.folder, records.blocks, "blocks")
        done = torch.tensor(float(records.is_finished and accelerator.is_main_process))
        if not sum_over_ranks(done.to(accelerator.device)):
            score(model, shards, settings, records, stopping, accelerator)
        with failing_together():
            if accelerator.is_main_process:
                tell(records, checkpoint, config, arguments.json)
        leave(accelerator)


def settings_of(arguments: argparse.Namespace, config: Config) -> dict[str, Any]:
    """What the figure depends on beside model and data."""
    return {
        "seed": config.run.seed if arguments.seed is None else arguments.seed,
        "batch": arguments.batch or config.evaluate.batch,
        "images": arguments.images,
        "importance_samples": arguments.importance_samples or config.evaluate.importance_samples,
        "probes": arguments.probes or config.evaluate.probes,
    }


def open_records(
    arguments: argparse.Namespace,
    checkpoint: Checkpoint,
    shards: ShardSet,
    settings: dict[str, Any],
) -> Records:
    """The folder of this evaluation, named for what it depends on if no other is given."""
    identity = {
        "checkpoint": checkpoint.digest,
        "weights": arguments.weights,
        "fingerprint": shards.manifest.fingerprint,
        "glowscale": glowscale.__version__,
        **settings,
    }
    if arguments.dequantization:
        identity["dequantization"] = arguments.dequantization
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return Records(arguments.out or run_of(checkpoint) / "evaluations" / name, identity)


def run_of(checkpoint: Checkpoint) -> Path:
    """The folder of the run that a checkpoint, RUN/checkpoints/images-..., is of."""
    return checkpoint.path.parent.parent


def score(
    model: MultiscaleFlow,
    shards: ShardSet,
    settings: dict[str, Any],
    records: Records,
    stopping: StopRequest,
    accelerator: Accelerator,
) -> None:
    """Score the images together with the other processes; leave the result in the records."""
    evaluate(
        model,
        shards,
        **settings,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        stopping=stopping,
        records=records,
        more=lambda: {"codecs": codec_bits_per_dim(shards, CODEC_IMAGES)},
    )


def tell(records: Records, checkpoint: Checkpoint, config: Config, as_json: bool) -> None:
    """Tell the figure, and refuse one that the model's inverse or solver cannot stand for."""
    result = records.read_result()
    say(f"{checkpoint.path}: {result['summary']}; see {records.folder}")
    if (page := run_of(checkpoint) / REPORT).exists():
        write_report(page.parent)
    if as_json:
        report(result)
    limits = config.evaluate
    refuse_untrusted(
        Evaluation.from_dict(result), limits.round_trip_limit, limits.solver_gap_limit
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("--data", help="split to score, if not the run's held-out one")
    parser.add_argument("--out", type=Path, help="folder of the results, if not in the run's")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema")
    parser.add_argument("--images", type=positive, help="score only the first so many")
    parser.add_argument(
        "--dequantization", choices=["uniform"], help="noise to score with, if not the model's own"
    )
    parser.add_argument("--importance-samples", type=positive, metavar="K", help="of the noise")
    parser.add_argument("--probes", type=positive, help="estimates of a continuous flow's trace")
    parser.add_argument("--batch", type=positive, help="images scored at once")
    parser.add_argument("--seed", type=int, help="seed of the dequantization noise")
    parser.add_argument("--json", action="store_true", help="end with a JSON object on stdout")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
