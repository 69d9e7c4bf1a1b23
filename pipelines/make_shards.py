"""Pack a source's images into WebDataset shards with a manifest, one folder a split."""

import argparse
from pathlib import Path
from typing import Any

from glowscale.data.sources import SOURCES, open_source
from glowscale.data.writer import pack
from glowscale.jobs import job, report, say


def main() -> None:
    """Open the source, pack its splits, tell what they hold."""
    arguments = parse_arguments()
    with job():
        splits = open_source(arguments.source, source_arguments(arguments))
        manifests = pack(splits, arguments.out, arguments.shard_size, arguments.seed)
        packed = {
            split.name: {
                "images": manifest.samples,
                "shards": len(manifest.shards),
                "fingerprint": manifest.fingerprint,
            }
            for split, manifest in zip(splits, manifests, strict=True)
        }
        for name, facts in packed.items():
            say(f"{arguments.out / name}: {facts['images']:,} images in {facts['shards']} shards")
        if arguments.json:
            report(packed)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", choices=SOURCES, help="what to pack")
    parser.add_argument("out", type=Path, help="folder of the splits")
    parser.add_argument("--path", type=Path, help="idx: folder of the IDX files")
    parser.add_argument("--held-out", type=int, help="digits: images held out, chosen by key")
    parser.add_argument("--shard-size", type=int, default=10_000, help="images a shard")
    parser.add_argument("--seed", type=int, default=0, help="seed of the packing order")
    parser.add_argument("--json", action="store_true", help="end with a JSON object on stdout")
    arguments = parser.parse_args()
    if arguments.source == "idx" and arguments.path is None:
        parser.error("idx needs --path, the folder of the IDX files")
    return arguments


def source_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given for the source itself."""
    given = {"path": arguments.path, "held_out": arguments.held_out}
    return {key: value for key, value in given.items() if value is not None}


if __name__ == "__main__":
    main()
