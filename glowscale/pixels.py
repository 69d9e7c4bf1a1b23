"""Images as matrices with a row a pixel, which is how channels-last images lie in memory."""

from torch import Tensor


def pixels_of(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B·H·W, C); of images channels-last without a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def image_of(pixels: Tensor, like: Tensor) -> Tensor:
    """(B·H·W, C) to (B, C, H, W), channels-last, with the B, H and W of `like`."""
    batch, _, height, width = like.shape
    return pixels.view(batch, height, width, pixels.shape[1]).permute(0, 3, 1, 2)
