"""Trading space for channels, without arithmetic."""

from einops import rearrange
from torch import Tensor

from glowscale.bijections.base import Bijection, Shape, zero_log_det


class Squeeze(Bijection):
    """Fold each 2×2 block of pixels into channels: (B, C, H, W) to (B, 4C, H/2, W/2).

    Source: RealNVP (Dinh et al. 2017), section 3.6. One channel, seen from above::

        1 2 5 6
        3 4 7 8   ->   1 5   2 6   3 7   4 8
        9 a d e        9 d   a e   b f   c g
        b c f g
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fold x; raises ValueError for an odd height or width."""
        self.output_shape(tuple(x.shape[1:]))
        return _squeeze(x), zero_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Unfold z."""
        return _unsqueeze(z)

    def output_shape(self, shape: Shape) -> Shape:
        """(4C, H/2, W/2); raises ValueError for an odd height or width."""
        channels, height, width = shape
        if height % 2 or width % 2:
            raise ValueError(f"Squeeze needs even sides, not {height}×{width}.")
        return 4 * channels, height // 2, width // 2


class Unsqueeze(Bijection):
    """The inverse of `Squeeze` as a bijection: (B, 4C, H, W) to (B, C, 2H, 2W)."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Unfold x."""
        return _unsqueeze(x), zero_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Fold z."""
        return _squeeze(z)

    def output_shape(self, shape: Shape) -> Shape:
        """(C/4, 2H, 2W); raises ValueError where 4 does not divide C."""
        channels, height, width = shape
        if channels % 4:
            raise ValueError(f"Unsqueeze needs a multiple of 4 channels, not {channels}.")
        return channels // 4, 2 * height, 2 * width


def _squeeze(x: Tensor) -> Tensor:
    folded = rearrange(x, "b c (h i) (w j) -> b h w (c i j)", i=2, j=2)
    return folded.permute(0, 3, 1, 2)  # channels-last, as whatever comes next wants it


def _unsqueeze(z: Tensor) -> Tensor:
    return rearrange(z, "b (c i j) h w -> b c (h i) (w j)", i=2, j=2)
