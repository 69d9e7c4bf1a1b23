"""A tree of image files as a source."""

import sys
from collections import Counter
from pathlib import Path

from glowscale.data.errors import DataError, UnreadableError
from glowscale.data.sources import Sample, Split, files_below, identity_of, part_keys
from glowscale.data.view import View

EXTENSIONS = frozenset(
    [
        ".avif",
        ".bmp",
        ".gif",
        ".jp2",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    ]
)
"""Files with these extensions, in any case, are taken for images."""


def folder(
    path: Path,
    resolution: int,
    split: str | None = None,
    held_out: float = 0.1,
    channels: int = 3,
    grey_levels: int = 256,
) -> list[Split]:
    """Images below a folder, of any size, format, mode and orientation, as equal squares.

    A class is a sub-folder of the first level; images beside the sub-folders have none.

    Args:
        path: the tree; files with an image's extension count, hidden ones do not.
        resolution: side of the images, see `View`.
        split: name of the split that all images are of; else they are parted by key.
        held_out: part of the images that the split `test` gets, the rest is `train`.
        channels: 3 for colour, 1 for grey.
        grey_levels: so many values of a pixel are told apart.

    Raises:
        DataError: if there are no images, or two files would have the same key.
    """
    if not path.is_dir():
        raise DataError(f"There is no folder {path}.")
    files = _image_files(path)
    if not files:
        raise DataError(f"{path} and its sub-folders hold no file with an image's extension.")
    identity = identity_of((str(x.relative_to(path)), x.stat().st_size) for x in files)
    keys = [_key(file.relative_to(path)) for file in files]
    _refuse_duplicates(keys, files)
    classes = tuple(sorted({key.split("/")[0] for key in keys if "/" in key}))
    labels = {name: label for label, name in enumerate(classes)}
    view = View(resolution, channels, grey_levels)

    def make(name: str, indices: list[int]) -> Split:
        def sample(i: int) -> Sample:
            file, key = files[indices[i]], keys[indices[i]]
            try:
                return Sample(key, view.read(file), labels.get(key.split("/")[0]))
            except UnreadableError as error:
                raise UnreadableError(f"{file}: {error}") from error

        part = "" if split else f", {held_out:g} held out"
        origin = f"folder {path.name!r} ({view}){part}"
        shape = (channels, resolution, resolution)
        return Split(name, origin, shape, grey_levels, classes, len(indices), sample, identity)

    return [make(*part) for part in part_keys(keys, split, held_out).items()]


def _image_files(path: Path) -> list[Path]:
    """The images of a tree; what else lies there is counted and told."""
    others: Counter[str] = Counter()
    found = []
    for file in files_below(path):
        if file.suffix.lower() in EXTENSIONS:
            found.append(file)
        else:
            others[file.suffix.lower() or "no extension"] += 1
    if others:
        counts = ", ".join(f"{count} of {suffix}" for suffix, count in others.most_common())
        print(f"passed over what has no image's extension: {counts}", file=sys.stderr)
    return sorted(found)


def _key(relative: Path) -> str:
    """A key without dots in its base name, where WebDataset would see an extension."""
    plain = relative.as_posix().encode(errors="backslashreplace").decode()
    folder, slash, name = plain.rpartition("/")
    return folder + slash + name.replace(".", "_")


def _refuse_duplicates(keys: list[str], files: list[Path]) -> None:
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        named = [str(file) for key, file in zip(keys, files, strict=True) if key == twice[0]]
        raise DataError(f"{' and '.join(named)} would have the same key; rename one of them.")
