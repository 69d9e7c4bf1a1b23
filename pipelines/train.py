"""Train a model as a config says; the same command again resumes.

python pipelines/train.py CONFIG [dotted.key=value ...], alone or under `accelerate launch`.
"""

import argparse
from pathlib import Path

from accelerate import Accelerator

from glowscale.config import Config, describe, load_config
from glowscale.data.manifest import MANIFEST
from glowscale.data.sources import open_source
from glowscale.data.writer import pack
from glowscale.distributed import start_accelerator
from glowscale.evaluation import histogram_bits_per_dim
from glowscale.jobs import job, report, say
from glowscale.training import Trainer


def main() -> None:
    """Read the config, pack the data if they are not there, train, tell the result."""
    arguments = parse_arguments()
    with job():
        config = load_config(arguments.config, arguments.overrides)
        accelerator = start_accelerator(config.train.precision)
        pack_if_missing(config, accelerator)
        trainer = Trainer(config, accelerator)
        evaluation = trainer.train()
        if accelerator.is_main_process:
            histogram = histogram_bits_per_dim(trainer.train_shards, trainer.held_out_shards)
            say(f"held out: {evaluation}")
            say(f"a per-pixel histogram of the same images: {histogram:.4f} bits/dim")
            say(f"samples.png and curves.png are in {config.run.dir}")
            if arguments.json:
                report({**evaluation.to_dict(), "histogram_bits_per_dim": histogram})
        accelerator.end_training()


def pack_if_missing(config: Config, accelerator: Accelerator) -> None:
    """Let the main process pack the config's source where the training split is not there."""
    data = config.data
    with accelerator.main_process_first():
        missing = not (data.dir / data.train_split / MANIFEST).exists()
        if data.source is not None and missing and accelerator.is_main_process:
            source = data.source.model_dump()
            pack(open_source(source.pop("kind"), source), data.dir, data.shard_size)


def parse_arguments() -> argparse.Namespace:
    """The command line; its help lists every config key."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"config keys:\n{describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value, the value in YAML")
    parser.add_argument("--json", action="store_true", help="end with a JSON object on stdout")
    return parser.parse_args()


if __name__ == "__main__":
    main()
