"""Pixels to bytes and back, without loss."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PNG_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode by number of channels; PNG stores these without loss."""


def encode_png(image: np.ndarray) -> bytes:
    """A uint8 image (C, H, W) of 1, 3 or 4 channels as PNG; raises ValueError for others.

    >>> image = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    >>> bool((decode_image(encode_png(image)).numpy() == image).all())
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


def decode_image(data: bytes) -> Tensor:
    """A PNG as a uint8 tensor (C, H, W); raises ValueError for other data and other modes."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        pixels = np.array(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"not a readable PNG ({error})") from error
    if image.mode not in PNG_MODES.values():
        allowed = ", ".join(PNG_MODES.values())
        raise ValueError(f"a PNG of mode {image.mode}; only {allowed} of 8 bits are read")
    tensor = torch.from_numpy(pixels)
    return tensor[None] if tensor.dim() == 2 else tensor.permute(2, 0, 1)
