"""Velocity fields of continuous flows, with their Jacobian's product in the same pass."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TimeConditioning = Literal["concat", "scale_shift"]
FREQUENCIES = 4
"""Of the features by which a network with scales and shifts reads the time."""


class VelocityNetwork(nn.Module):
    """A velocity f(t, x) of images: 3×3 convolutions with softplus between, each told the time.

    `product` gives f together with its Jacobian's product with a vector, forward through the
    layers: a convolution is linear, so the vector passes through the same weights, and softplus
    passes it on times its derivative, a sigmoid. That costs two passes, builds no graph that the
    solver would throw away, and is itself differentiable once more.

    Args:
        channels: of x (B, C, H, W) and of the velocity.
        hidden_channels: width of each hidden layer.
        time: `concat` appends the time as a channel to each convolution's input (FFJORD, Grathwohl
            et al. 2019, appendix B); `scale_shift` scales and shifts each convolution's output by
            a function of sines of the time, as diffusion models do.
        context_channels: channels of the context (B, F, H or 1, W or 1); 0 where there is none.
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: Sequence[int],
        time: TimeConditioning = "concat",
        context_channels: int = 0,
    ) -> None:
        super().__init__()
        widths = [channels + context_channels, *hidden_channels, channels]
        self.layers = nn.ModuleList(
            TIMED[time](before, after) for before, after in pairwise(widths)
        )
        last: nn.Conv2d = self.layers[-1].conv  # type: ignore[assignment]
        with torch.no_grad():
            last.weight.mul_(0.01)  # a flow begins near the identity, and is cheap to solve

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity (B, C, H, W) at time t, a scalar, of x (B, C, H, W)."""
        h = x if context is None else torch.cat([x, _spread(context, x)], 1)
        for index, layer in enumerate(self.layers):
            h = layer(t, F.softplus(h) if index else h)
        return h

    def product(
        self, t: Tensor, x: Tensor, vector: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The velocity at x, and the product of its Jacobian there with a vector of x's shape."""
        h, p = x, vector
        if context is not None:
            spread = _spread(context, x)
            h, p = torch.cat([h, spread], 1), torch.cat([p, torch.zeros_like(spread)], 1)
        for index, layer in enumerate(self.layers):
            if index:
                h, p = F.softplus(h), p * torch.sigmoid(h)
            h, p = cast("ConcatConv", layer).product(t, h, p)
        return h, p


class ConcatConv(nn.Module):
    """A 3×3 convolution of x and a channel that holds the time."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Conv2d(1, out_channels, 3, padding=1, bias=False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Map x (B, in_channels, H, W) at time t."""
        return self.conv(x) + self._of_time(t, x)

    def product(self, t: Tensor, x: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The map of x, and its derivative's product with a vector."""
        return self.forward(t, x), F.conv2d(vector, self.conv.weight, padding=1)

    def _of_time(self, t: Tensor, x: Tensor) -> Tensor:
        """What the channel of the time adds: the same to every image, unlike only at the rim."""
        plane = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
        return self.time(plane) * t.to(x.dtype)


class ScaleShiftConv(nn.Module):
    """A 3×3 convolution whose output is scaled and shifted by functions of the time."""

    frequencies: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = nn.Linear(2 * FREQUENCIES, 2 * out_channels)
        nn.init.zeros_(self.scale_shift.weight)
        nn.init.zeros_(self.scale_shift.bias)
        waves = math.pi / 2 * torch.arange(1, FREQUENCIES + 1)
        self.register_buffer("frequencies", waves, persistent=False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Map x (B, in_channels, H, W) at time t."""
        scale, shift = self._of_time(t, x)
        return self.conv(x) * scale + shift

    def product(self, t: Tensor, x: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The map of x, and its derivative's product with a vector."""
        scale, shift = self._of_time(t, x)
        moved = F.conv2d(vector, self.conv.weight, padding=1) * scale
        return self.conv(x) * scale + shift, moved

    def _of_time(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift of every channel, (C, 1, 1) each."""
        waves = self.frequencies.to(x.dtype) * t.to(x.dtype)
        scale, shift = self.scale_shift(torch.cat([waves.sin(), waves.cos()])).chunk(2)
        return 1 + scale[:, None, None], shift[:, None, None]


TIMED: dict[str, type[nn.Module]] = {"concat": ConcatConv, "scale_shift": ScaleShiftConv}
"""Convolutions by how they are told the time."""


def _spread(context: Tensor, x: Tensor) -> Tensor:
    return context.to(x.dtype).expand(-1, -1, *x.shape[2:])
