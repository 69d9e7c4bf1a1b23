"""Fixed maps of single values: pixel preprocessing, and the sigmoid of a dequantizer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from glowscale.bijections.base import Bijection, sum_per_image, zero_log_det


class AffinePixels(Bijection):
    """Map dequantized pixels in [0, grey_levels] linearly to [-½, ½].

    >>> z, log_det = AffinePixels(grey_levels=2)(torch.tensor([[0.0, 1.0, 2.0]]))
    >>> z.tolist(), round(log_det.item() / math.log(2), 6)
    ([[-0.5, 0.0, 0.5]], -3.0)
    """

    def __init__(self, grey_levels: int) -> None:
        super().__init__()
        self.grey_levels = grey_levels

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and centre x (B, ...)."""
        log_det = zero_log_det(x) - math.prod(x.shape[1:]) * math.log(self.grey_levels)
        return x / self.grey_levels - 0.5, log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Back to grey levels."""
        return (z + 0.5) * self.grey_levels


class LogitPixels(Bijection):
    """Map dequantized pixels in [0, grey_levels] to the whole line: z = logit(α + (1 − 2α) v).

    v = x / grey_levels. Source: RealNVP (Dinh et al. 2017), section 4.1, with 1 − 2α for its
    1 − α, so that both ends are alike. At the ends of its range the inverse rounds to where the
    logit is infinite; there the largest representable one stands for it, so that every sample can
    be encoded.

    Args:
        grey_levels: number of values that a pixel takes.
        alpha: how far the ends are moved inwards, in (0, ½). At 1e-6 practically no density
            can lie outside the pixels' range.
    """

    def __init__(self, grey_levels: int, alpha: float = 0.05) -> None:
        super().__init__()
        if not 0 < alpha < 0.5:
            raise ValueError(f"LogitPixels needs 0 < alpha < 0.5, not {alpha}.")
        self.grey_levels = grey_levels
        self.alpha = alpha

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The logit of x (B, ...), its ends moved inwards by alpha."""
        slope = (1 - 2 * self.alpha) / self.grey_levels
        p = self.alpha + slope * x
        q = self.alpha + slope * (self.grey_levels - x)  # 1 - p, without cancellation near 1
        floor = min(self.alpha, torch.finfo(x.dtype).eps)  # no pixel is beyond alpha
        log_p, log_q = p.clamp(min=floor).log(), q.clamp(min=floor).log()
        return log_p - log_q, sum_per_image(math.log(slope) - log_p - log_q)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Back to grey levels."""
        return (z.sigmoid() - self.alpha) * self.grey_levels / (1 - 2 * self.alpha)


class Sigmoid(Bijection):
    """z = sigmoid(slope · x), onto (0, 1).

    Args:
        slope: at 1.702 a standard normal x becomes nearly uniform, for the logistic function
            is then within 0.01 of the normal distribution's.
    """

    def __init__(self, slope: float = 1.702) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Squash x (B, ...)."""
        y = self.slope * x
        return y.sigmoid(), sum_per_image(
            math.log(self.slope) + F.logsigmoid(y) + F.logsigmoid(-y)
        )

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Unsquash z in (0, 1)."""
        return torch.logit(z) / self.slope
