"""Images of any size, format, mode and orientation, as a person sees them."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from glowscale.data.errors import UnreadableError

SMALLEST_SIDE = 8
"""Images with a shorter side are no pictures but pixels of a web page; they are skipped."""
WHITE = (255, 255, 255, 255)
SIXTEEN_BITS = 2**16 - 1


@dataclass(frozen=True)
class View:
    """How images become those of a data set: uint8 (channels, H, W), below `grey_levels`.

    Camera rotation is applied, transparency lies on white, 16 bits become 8, CMYK and palettes
    become colours; of an animation the first picture counts.

    Args:
        resolution: side of the squares; the shorter side is resized to it (antialiased), the
            centre of the longer one is kept. None keeps every image as large as it is.
        channels: 3 for colour, 1 for grey.
        grey_levels: so many values of equal width are told apart, at most 256.

    >>> View(resolution=8, channels=1, grey_levels=32)(Image.new("RGB", (40, 30), "red")).max()
    np.uint8(9)
    """

    resolution: int | None = None
    channels: int = 3
    grey_levels: int = 256

    def __str__(self) -> str:
        size = f"{self.resolution}×{self.resolution}" if self.resolution else "their own size"
        kind = "grey" if self.channels == 1 else "colour"
        return f"{size}, {kind}, {self.grey_levels} grey levels"

    def __call__(self, image: Image.Image) -> np.ndarray:
        """An image's pixels; raises UnreadableError if it is cut short, or is too small."""
        try:
            image = ImageOps.exif_transpose(image)
            if self.resolution and min(image.size) < SMALLEST_SIDE:
                raise UnreadableError(f"{image.size[0]}×{image.size[1]} is too small")
            image = _to_eight_bits(image)
            if self.resolution:
                size = (self.resolution, self.resolution)
                image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        except Exception as error:
            raise unreadable(error) from error
        pixels = np.asarray(image.convert("L" if self.channels == 1 else "RGB"))
        planes = pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)
        values = planes.astype(np.uint16) * self.grey_levels // 256
        return np.ascontiguousarray(values, dtype=np.uint8)

    def read(self, file: Path | bytes) -> np.ndarray:
        """As above, of an image file or its content; raises UnreadableError also for no image."""
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                return self(image)
        except Exception as error:
            raise unreadable(error) from error

    def read_array(self, data: bytes) -> np.ndarray:
        """As above, of an .npy file of uint8 pixels (H, W), (H, W, C) or (C, H, W)."""
        try:
            array = np.load(io.BytesIO(data), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UnreadableError(f"not an .npy file of numbers ({error})") from error
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
            array = array.transpose(1, 2, 0)
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[:, :, 0]
        if (
            array.dtype != np.uint8
            or array.ndim not in (2, 3)
            or array.shape[2:] not in ((), (3,))
        ):
            raise UnreadableError(
                f"an array of shape {array.shape} of {array.dtype}; it must be uint8 of "
                f"(H, W), (H, W, C) or (C, H, W) with 1 or 3 channels"
            )
        return self(Image.fromarray(np.ascontiguousarray(array)))


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """An RGB image of what is seen: no transparency, no palette, no more than 8 bits."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > SIXTEEN_BITS:
            raise UnreadableError("its values need more than 16 bits")
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnreadableError("its values are no whole numbers, so their range is not known")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, WHITE), seen).convert("RGB")
    return image.convert("RGB")


def unreadable(error: Exception) -> Exception:
    """What an error in decoding tells of the image; a failing disk or memory is no such error."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
        return error
    if isinstance(error, UnidentifiedImageError):
        return UnreadableError("not an image")
    return UnreadableError(str(error) or type(error).__name__)
