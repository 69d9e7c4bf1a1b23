"""What lossless image codecs need for the same images: a figure for context."""

import io
from typing import Any

import numpy as np
from PIL import Image, features

from glowscale.data import ShardSet

CODECS: dict[str, dict[str, Any]] = {
    "png": {"optimize": True},
    "webp": {"lossless": True, "quality": 100, "method": 6},
}
"""Pillow's formats, at the effort that makes the smallest files."""


def codec_bits_per_dim(shards: ShardSet, images: int) -> dict[str, float]:
    """Mean size of the first so many images as files of each codec, in bits/dim.

    Nothing of images that are neither grey nor of three colours, and of fewer grey levels than
    256 what the files of 8 bits need.
    """
    channels, *_ = shards.manifest.image_shape
    if channels not in (1, 3):
        return {}
    count = min(images, shards.manifest.samples)
    arrays = shards.read_batch(0, count).images.permute(0, 2, 3, 1).numpy()
    codecs = [name for name in CODECS if name == "png" or features.check(name)]
    return {name: sum(_size(array, name) for array in arrays) * 8 / arrays.size for name in codecs}


def _size(pixels: np.ndarray, codec: str) -> int:
    """Bytes of a file of pixels (H, W, C)."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(
        file, codec, **CODECS[codec]
    )
    return file.tell()
