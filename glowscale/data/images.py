"""Pixels to bytes and back, without loss."""

import io

import numpy as np
from PIL import Image

from glowscale.data.errors import UnreadableError

PNG_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode by number of channels; PNG stores these without loss."""


def encode_png(image: np.ndarray) -> bytes:
    """A uint8 image (C, H, W) of 1, 3 or 4 channels as PNG; raises ValueError for others.

    >>> image = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    >>> bool((decode_png(encode_png(image)) == image).all())
    True
    """
    channels = image.shape[0]
    if image.dtype != np.uint8 or channels not in PNG_MODES:
        allowed = ", ".join(map(str, PNG_MODES))
        raise ValueError(
            f"An image of {channels} channels of {image.dtype} cannot be a PNG; it must have "
            f"{allowed} channels of uint8."
        )
    pixels = image[0] if channels == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=False)
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """A PNG as uint8 (C, H, W); raises UnreadableError for other data and other modes."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        pixels = np.array(image)
    except (OSError, SyntaxError) as error:
        raise UnreadableError(f"not a readable PNG ({error})") from error
    if image.mode not in PNG_MODES.values():
        allowed = ", ".join(PNG_MODES.values())
        raise UnreadableError(f"a PNG of mode {image.mode}; only {allowed} of 8 bits are read")
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
