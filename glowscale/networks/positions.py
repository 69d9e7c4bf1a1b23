"""Where a pixel is, as features that a network can read."""

import torch
from torch import Tensor

LONGEST = 100.0
"""Radians a pixel of the shortest wave, 1, over those of the longest: it spans 628 pixels."""


def positions_2d(x: Tensor, features: int) -> Tensor:
    """Sines and cosines of every pixel's row and column, (H, W, features).

    Source: Vaswani et al. 2017, section 3.5, half of the features for each side. They are fixed,
    so a network that adds them takes images of any size.

    Args:
        x: an image (..., H, W), which gives size, type and device.
        features: how many; four tell a pixel from its neighbours, more tell it from all others.

    >>> positions_2d(torch.zeros(1, 2, 3), features=8).shape
    torch.Size([2, 3, 8])
    """
    height, width = x.shape[-2:]
    waves = torch.arange((features + 3) // 4, dtype=x.dtype, device=x.device)
    frequencies = LONGEST ** (-4 / features * waves)
    rows, columns = (
        torch.arange(side, dtype=x.dtype, device=x.device)[:, None] * frequencies
        for side in (height, width)
    )
    of_row = torch.stack([rows.sin(), rows.cos()], 2)[:, None].expand(-1, width, -1, -1)
    of_column = torch.stack([columns.sin(), columns.cos()], 2).expand(height, -1, -1, -1)
    return torch.cat([of_row, of_column], 3).flatten(2)[:, :, :features]
