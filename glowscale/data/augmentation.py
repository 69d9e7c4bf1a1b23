"""Random flips and crops of training images, a function of (seed, epoch, id)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from glowscale.randomness import generator


@dataclass(frozen=True)
class Augmentation:
    """Changes a training image a little, so that an epoch never shows quite the same ones.

    Args:
        flip: mirror every other image horizontally.
        crop: move the image by up to so many pixels each way, its edges repeated: a random crop
            of the image padded by so much.

    >>> image = torch.arange(4, dtype=torch.uint8).view(1, 2, 2)
    >>> Augmentation()(image, seed=0, epoch=0, identity=0) is image
    True
    """

    flip: bool = False
    crop: int = 0

    def __call__(self, image: Tensor, seed: int, epoch: int, identity: int) -> Tensor:
        """The image (C, H, W) as this epoch shows it, of the same shape and type."""
        if not (self.flip or self.crop):
            return image
        draw = generator(seed, "augmentation", epoch, identity)
        flipped = bool(draw.integers(2))
        shifts = draw.integers(-self.crop, self.crop, size=2, endpoint=True).tolist()
        if self.flip and flipped:
            image = image.flip(2)
        if self.crop:
            rows, columns = (
                torch.arange(size).add(shift).clamp(0, size - 1)
                for size, shift in zip(image.shape[1:], shifts, strict=True)
            )
            image = image[:, rows][:, :, columns]
        return image


NO_AUGMENTATION = Augmentation()
"""Leaves images as they are."""
