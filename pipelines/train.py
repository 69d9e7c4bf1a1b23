"""Train a model as a config says; the same command again resumes.

python pipelines/train.py CONFIG [dotted.key=value ...], alone or under `accelerate launch`.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from glowscale.checkpoint import images_reached
from glowscale.config import Config, ConfigError, describe, load_config
from glowscale.data import DataError, Manifest, load_manifest, make_shards, open_source
from glowscale.data.manifest import MANIFEST
from glowscale.dequantization import NoiseAugmentation
from glowscale.distributed import failing_together, leave, start_accelerator
from glowscale.evaluation import histogram_bits_per_dim, refuse_idle_samples
from glowscale.files import join
from glowscale.jobs import job, report, run, say
from glowscale.restarts import refuse_standstill, restarts
from glowscale.training import Trainer
from glowscale.training.plan import describe_plan, plan
from glowscale.training.run_folder import is_finished

KEYS = """config keys (a name in brackets is not typed: what follows is of that kind or family;
of a list type the place, model.levels.0.1.depth=4):"""


def main() -> None:
    """Read the config, pack the data if they are not there, train, tell the result."""
    arguments = parse_arguments()
    with job():
        config = load_config(arguments.config, arguments.overrides)
        is_bound = config.model.dequantization.kind != NoiseAugmentation.name
        refuse_idle_samples(is_bound, config.evaluate.importance_samples)
        if arguments.dry_run:
            facts = plan_run(config)
            say(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
            say(describe_plan(facts))
            if arguments.json:
                report(facts)
            return
        if restarts() and is_finished(config):
            say(f"{config.run.dir} is finished; there is nothing to go on with.")
            return
        if os.environ.get("RANK", "0") == "0":
            refuse_standstill(config.run.dir, images_reached(config.run.dir), "images")
        accelerator = start_accelerator(
            config.train.precision, config.log.trackers, config.run.dir
        )
        pack_if_missing(config, accelerator)
        trainer = Trainer(config, accelerator)
        evaluation = trainer.train()
        if accelerator.is_main_process:
            histogram = histogram_of(trainer) if is_bound else None
            say(f"held out: {evaluation}")
            if histogram is not None:
                say(f"a per-pixel histogram of the same images: {histogram:.4f} bits/dim")
            say(f"samples.png and curves.png are in {config.run.dir}")
            if arguments.json:
                report({**evaluation.to_dict(), "histogram_bits_per_dim": histogram})
        leave(accelerator)


def histogram_of(trainer: Trainer) -> float | None:
    """What a histogram for every pixel gives, to compare with; None where data are damaged."""
    try:
        return histogram_bits_per_dim(trainer.train_shards, trainer.held_out_shards)
    except DataError as error:
        say(f"There is no histogram to compare with: {error}")
        return None


def pack_if_missing(config: Config, accelerator: Accelerator) -> None:
    """Let the main process pack the config's source where a split is not there."""
    with failing_together():
        if accelerator.is_main_process and config.data.source and not is_packed(config):
            kind, arguments = source_of(config)
            workers = max(1, config.data.workers)
            out = Path(config.data.dir)
            make_shards(kind, arguments, out, config.data.shard_size, workers=workers)
    if config.data.source:
        packed_manifest(config)


def is_packed(config: Config) -> bool:
    """Whether both splits are there; a kill may have left one."""
    splits = (config.data.train_split, config.data.held_out_split)
    return all(Path(config.data.dir, split, MANIFEST).exists() for split in splits)


def source_of(config: Config) -> tuple[str, dict[str, Any]]:
    """Kind and arguments of the config's source."""
    arguments = config.data.source.model_dump() if config.data.source else {}
    return arguments.pop("kind"), arguments


def plan_run(config: Config) -> dict[str, Any]:
    """What the run would take, from the packed data or, before packing, from their source."""
    if config.data.source and not is_packed(config):
        kind, arguments = source_of(config)
        if kind == "torchvision":
            arguments["download"] = False  # a dry run fetches nothing
        splits = {split.name: split for split in open_source(kind, arguments)}
        if config.data.train_split not in splits:
            raise ConfigError(
                f"The source has the splits {', '.join(splits)}, not data.train_split="
                f"{config.data.train_split!r}."
            )
        split = splits[config.data.train_split]
        return plan(config, split.image_shape, split.grey_levels, len(split.classes), split.size)
    manifest = packed_manifest(config)
    return plan(
        config,
        manifest.image_shape,
        manifest.grey_levels,
        len(manifest.classes),
        manifest.samples,
    )


def packed_manifest(config: Config) -> Manifest:
    """Manifest of the training data; ConfigError where it is not what the source would give."""
    manifest = load_manifest(join(config.data.dir, config.data.train_split))
    wanted = getattr(config.data.source, "resolution", None)
    if wanted and manifest.image_shape[1:] != (wanted, wanted):
        height, width = manifest.image_shape[1:]
        raise ConfigError(
            f"data.source.resolution is {wanted}, but {config.data.dir} holds images of "
            f"{height}×{width} already; choose another data.dir."
        )
    return manifest


def parse_arguments() -> argparse.Namespace:
    """The command line; its help lists every config key."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"{KEYS}\n{describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value, the value in YAML")
    parser.add_argument("--dry-run", action="store_true", help="tell what it would take, and stop")
    parser.add_argument("--json", action="store_true", help="end with a JSON object on stdout")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run(main)
