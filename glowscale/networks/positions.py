"""Where a pixel is, as features that a network can read."""

import torch
from torch import Tensor

LONGEST = 100.0
"""The longest wave's ratio to the shortest, which has one radian a pixel: longer than any side."""


def positions_2d(x: Tensor, features: int) -> Tensor:
    """Sines and cosines of every pixel's row and column, (H, W, features).

    Source: Vaswani et al. 2017, section 3.5, with half of the features for each side, as Beyer et
    al. 2022 have them. They are fixed, so a network that adds them takes images of any size.

    Args:
        x: an image (..., H, W), which gives size, type and device.
        features: a multiple of 4, else a ValueError.

    >>> positions_2d(torch.zeros(1, 2, 3), features=8).shape
    torch.Size([2, 3, 8])
    """
    if features % 4:
        raise ValueError(f"Positions need a multiple of 4 features, not {features}.")
    waves = torch.arange(features // 4, dtype=x.dtype, device=x.device)
    frequencies = LONGEST ** (-4 / features * waves)
    rows, columns = (
        torch.arange(side, dtype=x.dtype, device=x.device)[:, None] * frequencies
        for side in x.shape[-2:]
    )
    halves = [
        torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(-1, x.shape[-1], -1),
        torch.cat([columns.sin(), columns.cos()], 1).expand(x.shape[-2], -1, -1),
    ]
    return torch.cat(halves, 2)
