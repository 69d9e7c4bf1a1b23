"""A tree of image files as a source: any size, format, mode and orientation."""

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from glowscale.data.manifest import DataError
from glowscale.data.sources import Sample, Split, UnreadableError, hold_out

SMALLEST_SIDE = 8
"""Images with a shorter side are no pictures but pixels of a web page; they are skipped."""
WHITE = (255, 255, 255, 255)


def folder(path: Path, resolution: int, held_out: float = 0.1, channels: int = 3) -> list[Split]:
    """Images below a folder, resized and cropped to squares, as splits `train` and `test`.

    A class is a sub-folder of the first level; images beside the sub-folders have none.

    Args:
        path: the tree; files with an image's extension count, hidden ones do not.
        resolution: side of the images; the shorter side is resized to it (antialiased), the
            centre of the longer one is kept.
        held_out: part of the images that the split `test` gets, chosen by key.
        channels: 3 for colour, 1 for grey.

    Raises:
        DataError: if there are no images, or two files would have the same key.
    """
    if not path.is_dir():
        raise DataError(f"There is no folder {path}.")
    files = _image_files(path)
    if not files:
        raise DataError(f"{path} and its sub-folders hold no file with an image's extension.")
    keys = [_key(file.relative_to(path)) for file in files]
    _refuse_duplicates(keys, files)
    classes = tuple(sorted({key.split("/")[0] for key in keys if "/" in key}))
    labels = {name: label for label, name in enumerate(classes)}
    kept, held = hold_out(keys, round(held_out * len(keys)))

    def split(name: str, indices: list[int]) -> Split:
        def sample(i: int) -> Sample:
            index = indices[i]
            image = read_image(files[index], resolution, channels)
            return Sample(keys[index], image, labels.get(keys[index].split("/")[0]))

        origin = f"folder {path.name!r} at {resolution}×{resolution}, {held_out:g} held out"
        shape = (channels, resolution, resolution)
        return Split(name, origin, shape, 256, classes, len(indices), sample)

    return [split("train", kept), split("test", held)] if held else [split("train", kept)]


def read_image(file: Path, resolution: int, channels: int = 3) -> np.ndarray:
    """A file as a person sees it, as a uint8 square (channels, resolution, resolution).

    Camera rotation is applied, transparency lies on white, 16 bits become 8, CMYK and palettes
    become colours; of an animation the first picture counts.

    Raises:
        UnreadableError: if it is no image, is cut short, or is too small or too large.
    """
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if min(image.size) < SMALLEST_SIDE:
                raise UnreadableError(f"{file}: {image.size[0]}×{image.size[1]} is too small")
            image = ImageOps.fit(
                _to_eight_bits(image), (resolution, resolution), Image.Resampling.LANCZOS
            )
    except UnidentifiedImageError:
        raise UnreadableError(f"{file}: not an image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableError(f"{file}: {error}") from error
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """An RGB image of what is seen: no transparency, no palette, no more than 8 bits."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, WHITE), seen).convert("RGB")
    return image.convert("RGB")


def _image_files(path: Path) -> list[Path]:
    extensions = Image.registered_extensions()
    return sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in extensions
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )


def _key(relative: Path) -> str:
    """A key without dots in its base name, where WebDataset would see an extension."""
    return relative.with_name(relative.name.replace(".", "_")).as_posix()


def _refuse_duplicates(keys: list[str], files: list[Path]) -> None:
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        named = [str(file) for key, file in zip(keys, files, strict=True) if key == twice[0]]
        raise DataError(f"{' and '.join(named)} would have the same key; rename one of them.")
