"""Pack a source's images into WebDataset shards with a manifest, one folder a split.

The source `shards` is not packed but indexed where it is. The same command again continues.
`make_shards.py check FOLDER` compares a split's files with its manifest.
"""

import argparse
from pathlib import Path
from typing import Any

from glowscale.config import parse_source, sources
from glowscale.data import SOURCES, DataError, Packed, make_shards
from glowscale.data.check import damage_of
from glowscale.jobs import job, positive, report, run, say

PACKING = ("shard_size", "seed", "workers")
"""Options that are not the source's own."""


def main() -> None:
    """Open the source, pack or index its splits, tell what they hold."""
    options = vars(parse_arguments())
    if options["source"] == "check":
        return check(options["folder"], options["json"])
    kind, out, as_json = (options.pop(key) for key in ("source", "out", "json"))
    packing = {key: options.pop(key) for key in PACKING if key in options}
    with job():
        given = {name: value for name, value in options.items() if value is not None}
        packed = make_shards(kind, parse_source(kind, given), out, **packing)
        for name, split in packed.items():
            say(f"{out / name}: {describe(split)}")
        if as_json:
            report({name: facts_of(split) for name, split in packed.items()})


def check(folder: str, as_json: bool) -> None:
    """Compare all files of a split with its manifest; an error if any differs."""
    with job():
        damage = list(damage_of(folder))
        for sentence in damage:
            say(sentence)
        if as_json:
            report({"damaged": len(damage)})
        if damage:
            raise DataError(f"{len(damage)} files of {folder} are not what its manifest says.")
        say(f"{folder} is what its manifest says")


def describe(split: Packed) -> str:
    """A split in words."""
    manifest = split.manifest
    channels, height, width = manifest.image_shape
    skipped = f", {split.skipped:,} unreadable ones skipped" if split.skipped else ""
    return (
        f"{'already done: ' if split.already else ''}{manifest.samples:,} images of "
        f"{channels}×{height}×{width} in {len(manifest.shards)} shards, "
        f"{len(manifest.classes)} classes{skipped}"
    )


def facts_of(split: Packed) -> dict[str, Any]:
    """A split in numbers."""
    return {
        "images": split.manifest.samples,
        "skipped": split.skipped,
        "shards": len(split.manifest.shards),
        "classes": len(split.manifest.classes),
        "fingerprint": split.manifest.fingerprint,
    }


def parse_arguments() -> argparse.Namespace:
    """The command line: a sub-command for every source, with the config keys of the source."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for kind, (meaning, keys) in sources().items():
        source = kinds.add_parser(kind, help=meaning, description=meaning)
        source.add_argument("out", type=Path, help="folder of the splits")
        for key, (text, required) in keys.items():
            option = f"--{key.replace('_', '-')}"
            source.add_argument(option, dest=key, required=required, help=text, metavar="VALUE")
        if kind in SOURCES:  # others are not packed
            source.add_argument("--shard-size", type=positive, default=10_000, help="images each")
            source.add_argument("--seed", type=int, default=0, help="seed of the packing order")
        source.add_argument("--workers", type=positive, default=2, help="threads that read images")
        source.add_argument("--json", action="store_true", help="end with JSON on stdout")
    checked = kinds.add_parser("check", help="compare a split's files with its manifest's hashes")
    checked.add_argument("folder", help="the split's folder or URL")
    checked.add_argument("--json", action="store_true", help="end with JSON on stdout")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
