"""The monotone rational-quadratic spline: an elementwise map whose inverse is written out."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from glowscale.bijections.base import soft_clamp, sum_per_image
from glowscale.bijections.transforms import Transform

LEAST_SHARE = 0.1
"""Of an equal bin's width and height, that every bin has."""
LARGEST_DERIVATIVE = 20.0
"""At a knot; the least is its inverse.

In the middle of a bin of slope s between derivatives d ≫ s the slope is but 2 s² / d, and by as
much the inverse magnifies roundings. With both limits a spline of 8 bins within ±3 comes back in
float32 to about 0.01, whatever its parameters; with a hundredth as share and derivatives without
limit it may be off by more than 1.
"""


class Bin(NamedTuple):
    """The bin that a value lies in: its sides, and the derivatives at both; each (B, C, ...)."""

    left: Tensor
    right: Tensor
    bottom: Tensor
    top: Tensor
    first: Tensor
    last: Tensor

    @property
    def width(self) -> Tensor:
        """Of x."""
        return self.right - self.left

    @property
    def height(self) -> Tensor:
        """Of z."""
        return self.top - self.bottom


class RationalQuadraticSpline(Transform):
    """A smooth map of [-bound, bound] onto itself, piecewise rational; outside the identity.

    Source: Neural spline flows (Durkan et al. 2019), section 3.1; Gregory & Delbourgo 1982. It
    is written with θ, the share of its bin before a value, and with the share after it, 1 − θ,
    found from the other end: then sums have positive terms alone, and nothing cancels at a knot.

    Its parameters are the bins' widths, their heights, and the derivatives at the knots between
    them; at the ends the derivative is 1.

    Args:
        bins: their number, at least 2.
        bound: half the width of what is bent; positive.
    """

    def __init__(self, bins: int, bound: float) -> None:
        if bins < 2:
            raise ValueError(f"A spline needs at least 2 bins, not {bins}.")
        if not bound > 0:
            raise ValueError(f"A spline needs a bound above 0, not {bound}.")
        self.bins = bins
        self.bound = bound
        self.parameters_per_value = 3 * bins - 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Bend x (B, C, ...)."""
        clamped = x.clamp(-self.bound, self.bound)
        knots = self._knots(parameters)
        at = _find_bin(clamped, knots, knots[:, 0])
        slope = at.height / at.width
        before, after = (clamped - at.left) / at.width, (at.right - clamped) / at.width
        product, squared, squared_after = before * after, before.square(), after.square()
        scale = slope * (squared + squared_after) + (at.first + at.last) * product
        z = at.bottom + at.height * (slope * squared + at.first * product) / scale
        growth = at.last * squared + at.first * squared_after + 2 * slope * product
        log_slope = growth.log() + 2 * (slope / scale).log()
        is_inside = x == clamped
        return torch.where(is_inside, z, x), sum_per_image(log_slope * is_inside)

    def inverse(self, z: Tensor, parameters: Tensor) -> Tensor:
        """Unbend z, by the positive root r = θ / (1 − θ) of a quadratic equation.

        With the share t of the bin's height below z it is s (1 − t) r² + linear · r − s t = 0,
        whose discriminant is a sum of squares.
        """
        clamped = z.clamp(-self.bound, self.bound)
        knots = self._knots(parameters)
        at = _find_bin(clamped, knots, knots[:, 1])
        slope = at.height / at.width
        below, above = (clamped - at.bottom) / at.height, (at.top - clamped) / at.height
        linear = at.first * above - at.last * below
        root = (linear.square() + 4 * slope.square() * below * above).sqrt()
        larger, rises = linear.abs() + root, linear >= 0  # the sum in which nothing cancels
        before = torch.where(rises, 2 * slope * below, larger)
        after = torch.where(rises, larger, 2 * slope * above)
        x = at.left + at.width * before / (before + after)
        return torch.where(z == clamped, x, z)

    def _knots(self, parameters: Tensor) -> Tensor:
        """Of all knots the places, the heights and the derivatives, (B, 3, bins + 1, C, ...)."""
        groups = torch.unflatten(parameters, 1, (self.parameters_per_value, -1))
        sizes, raw = torch.split(groups, [2 * self.bins, self.bins - 1], 1)
        shares = torch.unflatten(sizes, 1, (2, self.bins)).softmax(2)
        shares = LEAST_SHARE / self.bins + (1 - LEAST_SHARE) * shares
        inner = (2 * shares[:, :, :-1].cumsum(2) - 1) * self.bound
        slopes = soft_clamp(raw, math.log(LARGEST_DERIVATIVE)).exp().unsqueeze(1)
        bounds = torch.full_like(inner[:, :, :1], self.bound)
        ones = torch.ones_like(bounds[:, :1])
        first, last = torch.cat([-bounds, ones], 1), torch.cat([bounds, ones], 1)
        return torch.cat([first, torch.cat([inner, slopes], 1), last], 2)


def _find_bin(x: Tensor, knots: Tensor, ascending: Tensor) -> Bin:
    """The bin of x (B, C, ...) among the knots (B, 3, bins + 1, C, ...).

    `ascending` is that row of theirs in which x is looked up: places, or heights.
    """
    number = (x.unsqueeze(1) >= ascending[:, 1:-1]).sum(1)
    index = torch.stack([number, number + 1], 1).unsqueeze(1).expand(-1, 3, -1, *x.shape[1:])
    return Bin(*knots.gather(2, index).flatten(1, 2).unbind(1))
