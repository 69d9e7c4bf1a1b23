"""Which part of an image a coupling keeps, and which it transforms."""

from typing import Protocol

import torch
from torch import Tensor

from glowscale.bijections.base import Shape


class Mask(Protocol):
    """Parts an image in two, which both are images again, and joins them."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What of x (B, C, H, W) is kept, and the rest."""

    def join(self, kept: Tensor, rest: Tensor) -> Tensor:
        """Undo `split`."""

    def shapes(self, shape: Shape) -> tuple[Shape, Shape]:
        """Shapes (C, H, W) of both parts; raises ValueError where one would be empty."""


class ChannelMask:
    """Keeps the first half of the channels; of an odd number the smaller part.

    Args:
        swapped: keep the other half, of as many channels.

    >>> [tuple(part.shape) for part in ChannelMask().split(torch.zeros(1, 5, 2, 2))]
    [(1, 2, 2, 2), (1, 3, 2, 2)]
    """

    def __init__(self, swapped: bool = False) -> None:
        self.swapped = swapped

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The channels of x (B, C, ...) that are kept, and the rest."""
        (kept, *_), (rest, *_) = self.shapes(tuple(x.shape[1:]))
        sizes = [rest, kept] if self.swapped else [kept, rest]
        first, second = torch.split(x, sizes, dim=1)
        return (second, first) if self.swapped else (first, second)

    def join(self, kept: Tensor, rest: Tensor) -> Tensor:
        """Put the channels together."""
        return torch.cat([rest, kept] if self.swapped else [kept, rest], 1)

    def shapes(self, shape: Shape) -> tuple[Shape, Shape]:
        """Half the channels each; raises ValueError where there is only one."""
        channels, *sides = shape
        if channels < 2:
            raise ValueError(
                f"A coupling needs at least 2 channels, not {channels}; squeeze first."
            )
        return (channels // 2, *sides), ((channels + 1) // 2, *sides)


class CheckerboardMask:
    """Keeps every other pixel, with all its channels; each part is half as wide as the image.

    Source: RealNVP (Dinh et al. 2017), figure 3.

    Args:
        odd: keep those whose row and column add to an odd number, not to an even one.

    >>> kept, rest = CheckerboardMask().split(torch.arange(8).view(1, 1, 2, 4))
    >>> kept.flatten().tolist(), rest.flatten().tolist()
    ([0, 2, 5, 7], [1, 3, 4, 6])
    """

    def __init__(self, odd: bool = False) -> None:
        self.odd = odd

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The pixels of one colour of x (B, C, H, W), and those of the other, (B, C, H, W/2)."""
        self.shapes(tuple(x.shape[1:]))
        left, right = x[..., 0::2], x[..., 1::2]
        begins = self._rows_that_begin_kept(x)
        return torch.where(begins, left, right), torch.where(begins, right, left)

    def join(self, kept: Tensor, rest: Tensor) -> Tensor:
        """Put the colours together."""
        begins = self._rows_that_begin_kept(kept)
        left, right = torch.where(begins, kept, rest), torch.where(begins, rest, kept)
        return torch.stack([left, right], -1).flatten(-2)

    def shapes(self, shape: Shape) -> tuple[Shape, Shape]:
        """Half the width each; raises ValueError for an odd one."""
        channels, height, width = shape
        if width % 2:
            raise ValueError(f"A checkerboard coupling needs an even width, not {width}.")
        return (channels, height, width // 2), (channels, height, width // 2)

    def _rows_that_begin_kept(self, x: Tensor) -> Tensor:
        """Of each row of x whether its first pixel is kept, (H, 1)."""
        rows = torch.arange(x.shape[-2], device=x.device)[:, None]
        return rows % 2 == int(self.odd)
