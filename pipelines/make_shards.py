"""Pack a source's images into WebDataset shards with a manifest, one folder a split."""

import argparse
from pathlib import Path

from glowscale.data import open_source
from glowscale.data.writer import pack
from glowscale.jobs import fraction, job, positive, report, say


def parse_arguments() -> argparse.Namespace:
    """The command line: a sub-command for every source, with the source's own options."""
    parser = argparse.ArgumentParser(description=__doc__)
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    digits = sources.add_parser("digits", help="scikit-learn's handwritten digits")
    digits.add_argument("--held-out", type=positive, default=297, help="images of the split test")
    idx = sources.add_parser("idx", help="IDX files of the MNIST family, gzipped or not")
    idx.add_argument("--path", type=Path, required=True, help="folder of the IDX files")
    folder = sources.add_parser("folder", help="a tree of image files; class = sub-folder")
    folder.add_argument("--path", type=Path, required=True, help="the tree")
    folder.add_argument("--resolution", type=positive, required=True, help="side of the images")
    folder.add_argument("--held-out", type=fraction, default=0.1, help="part held out, by key")
    folder.add_argument("--channels", type=int, choices=[1, 3], default=3, help="grey or colour")
    for source in (digits, idx, folder):
        source.add_argument("out", type=Path, help="folder of the splits")
        source.add_argument("--shard-size", type=positive, default=10_000, help="images a shard")
        source.add_argument("--seed", type=int, default=0, help="seed of the packing order")
        source.add_argument("--workers", type=positive, default=2, help="threads that read images")
        source.add_argument("--json", action="store_true", help="end with JSON on stdout")
    return parser.parse_args()


def main() -> None:
    """Open the source, pack its splits, tell what they hold."""
    options = vars(parse_arguments())
    source, out, as_json = (options.pop(key) for key in ("source", "out", "json"))
    shard_size, seed, workers = (options.pop(key) for key in ("shard_size", "seed", "workers"))
    with job():
        splits = open_source(source, options)
        manifests = pack(splits, out, shard_size, seed, workers)
        packed = {
            split.name: {
                "images": manifest.samples,
                "skipped": split.size - manifest.samples,
                "shards": len(manifest.shards),
                "fingerprint": manifest.fingerprint,
            }
            for split, manifest in zip(splits, manifests, strict=True)
        }
        for name, facts in packed.items():
            skipped = f", {facts['skipped']:,} unreadable ones skipped" if facts["skipped"] else ""
            say(f"{out / name}: {facts['images']:,} images in {facts['shards']} shards{skipped}")
        if as_json:
            report(packed)


if __name__ == "__main__":
    main()
