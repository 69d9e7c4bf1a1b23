"""Made-up images, for benchmarks that need no real ones."""

from pathlib import Path

import numpy as np

from glowscale.data.sources import Sample, Split
from glowscale.data.writer import pack_split


def soft_shape(seed: int, shape: tuple[int, int, int]) -> np.ndarray:
    """A soft rectangle on black, uint8 (C, H, W), much like one of Fashion-MNIST's."""
    rng = np.random.default_rng(seed)
    _, rows, columns = shape
    y, x = np.mgrid[0:rows, 0:columns]
    width, height = rng.uniform(columns / 7, columns / 2.5, 2)
    inside = (np.abs(x - columns / 2 + 0.5) < width) & (np.abs(y - rows / 2 + 0.5) < height)
    shade = rng.uniform(60, 230) + 20 * np.sin(x / rng.uniform(1, 5)) + rng.normal(0, 8, x.shape)
    image = np.where(inside, shade, 0).clip(0, 255).astype(np.uint8)
    return np.broadcast_to(image, shape).copy()


def pack_shapes(folder: Path, shape: tuple[int, int, int]) -> None:
    """Pack 64 soft shapes for training, and as many to hold out."""
    for number, name in enumerate(("train", "test")):

        def sample(i: int, first: int = 64 * number) -> Sample:
            return Sample(f"{i:04d}", soft_shape(first + i, shape), None)

        pack_split(Split(name, "soft shapes", shape, 256, (), 64, sample), folder / name, 64)
