"""Data sets of torchvision as sources; downloaded where they are not there and can be had."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import URLError

from PIL import Image

from glowscale.data.errors import DataError, UnreadableError
from glowscale.data.sources import Sample, Split, identity_of, part_keys
from glowscale.data.view import View, unreadable

Item = TypeVar("Item")


@dataclass(frozen=True)
class Known:
    """A data set of torchvision and how its splits are asked for.

    Args:
        splits: arguments by the name of our split; one without arguments is parted by key.
        download: whether torchvision can fetch it.
        classes: names of its classes where the data set does not tell them.
        arguments: for all splits.
    """

    splits: dict[str, dict[str, Any]]
    download: bool = True
    classes: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)


BY_FLAG: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
BY_NAME: dict[str, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
DIGITS = tuple("0123456789")
UNLABELLED: dict[str, Any] = {"target_type": []}

SETS: dict[str, Known] = {
    "CIFAR10": Known(BY_FLAG),
    "CIFAR100": Known(BY_FLAG),
    "CelebA": Known(BY_NAME, arguments=UNLABELLED),
    "FashionMNIST": Known(BY_FLAG),
    "Flowers102": Known(BY_NAME),
    "Food101": Known(BY_NAME),
    "ImageFolder": Known({"train": {}}, download=False),
    "ImageNet": Known({"train": {"split": "train"}, "test": {"split": "val"}}, download=False),
    "KMNIST": Known(BY_FLAG),
    "MNIST": Known(BY_FLAG),
    "OxfordIIITPet": Known({"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "STL10": Known(BY_NAME),
    "SVHN": Known(BY_NAME, classes=DIGITS),
}
"""The data sets that can be packed, by torchvision's own names."""


def torchvision(
    dataset: str,
    root: Path,
    resolution: int | None = None,
    held_out: float = 0.1,
    grey_levels: int = 256,
    download: bool = True,
) -> list[Split]:
    """A data set of torchvision in its own splits.

    Args:
        dataset: its name, one of `SETS`.
        root: folder that torchvision keeps it in; it is downloaded there if it is not.
        resolution: side of the images; their own size if not given.
        held_out: part that the split `test` gets of a data set that has no splits.
        grey_levels: so many values of a pixel are told apart.
        download: whether to fetch what is not there.

    Raises:
        DataError: for an unknown name, or a data set that is not there and cannot be had.
    """
    if dataset not in SETS:
        raise DataError(f"There is no data set {dataset!r}; there are {', '.join(SETS)}.")
    known = SETS[dataset]
    splits: list[Split] = []
    for name, arguments in known.splits.items():
        images = _open(dataset, root, arguments, download and known.download)
        keys = _keys(name, images, root)
        view = View(resolution, _channels(images, dataset), grey_levels)
        parts = part_keys(keys, name if arguments else None, held_out)
        origin = f"{dataset} {name}" if arguments else f"{dataset}, {held_out:g} held out"
        for part, indices in parts.items():
            splits.append(_split(part, f"{origin} ({view})", images, keys, indices, view, known))
    return splits


def _keys(name: str, images: Any, root: Path) -> list[str]:  # noqa: ANN401
    """Keys of a data set's images: their paths where they are files, else their places."""
    if hasattr(images, "imgs"):  # an ImageFolder
        return [
            Path(file).relative_to(root).as_posix().replace(".", "_") for file, _ in images.imgs
        ]
    return [f"{name}-{index:07d}" for index in range(len(images))]


def _open(name: str, root: Path, arguments: dict[str, Any], download: bool) -> Any:  # noqa: ANN401
    """The data set, downloaded if need be; what torchvision prints goes to stderr."""
    from torchvision import datasets  # which takes seconds, and other sources need not wait

    open_set = getattr(datasets, name)
    arguments = {**SETS[name].arguments, **arguments}
    with redirect_stdout(sys.stderr):
        try:
            return open_set(root, **arguments)
        except (RuntimeError, FileNotFoundError) as missing:
            if not download:
                raise DataError(f"{name} cannot be read from {root}: {missing}.") from missing
        except ModuleNotFoundError as error:
            raise DataError(f"{name} needs the package {error.name}; install it.") from None
        try:
            root.mkdir(parents=True, exist_ok=True)
            return open_set(root, **arguments, download=True)
        except (RuntimeError, URLError, OSError, ImportError) as error:
            raise DataError(
                f"{name} is not in {root} and cannot be downloaded ({error}); put its files there."
            ) from error


def _split(
    name: str,
    origin: str,
    images: Any,  # noqa: ANN401
    keys: list[str],
    indices: list[int],
    view: View,
    known: Known,
) -> Split:
    def sample(i: int) -> Sample:
        index = indices[i]
        try:
            image, target = _read(images, index)
            return Sample(keys[index], view(image), target)
        except UnreadableError as error:
            raise UnreadableError(f"{origin}, {keys[index]}: {error}") from error

    classes = known.classes or tuple(map(_class_name, getattr(images, "classes", ())))
    shape = _first_readable(sample, len(indices), origin).image.shape
    return Split(
        name,
        origin,
        (shape[0], shape[1], shape[2]),
        view.grey_levels,
        () if known.arguments == UNLABELLED else classes,
        len(indices),
        sample,
        identity_of(keys),
    )


def _read(images: Any, index: int) -> tuple[Image.Image, int | None]:  # noqa: ANN401
    """An image and its label; UnreadableError where the image's file is damaged."""
    try:
        image, target = images[index]
    except Exception as error:
        raise unreadable(error) from error
    return image, target


def _first_readable(read: Callable[[int], Item], size: int, origin: str) -> Item:
    """The first image that can be read: the others must be like it."""
    for index in range(size):
        with suppress(UnreadableError):
            return read(index)
    raise DataError(f"No image of {origin} can be read.")


def _channels(images: Any, name: str) -> int:  # noqa: ANN401
    """1 for a data set of grey images, 3 for all others."""
    image, _ = _first_readable(lambda i: _read(images, i), len(images), name)
    return 1 if image.mode == "L" else 3


def _class_name(name: str | tuple[str, ...]) -> str:
    """A class's name; ImageNet's have synonyms."""
    return name if isinstance(name, str) else ", ".join(name)
