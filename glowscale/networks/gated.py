"""Gated convolutions and self-attention that predict a bijection's parameters."""

from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glowscale.networks.attention import SelfAttention, linear
from glowscale.networks.convolutional import he_conv, zero_conv
from glowscale.networks.positions import positions_2d


class GatedAttentionNetwork(nn.Module):
    """Flow++'s coupling network: blocks of a gated convolution and gated self-attention.

    Its last layer starts at zero, so a coupling starts as the identity. Features travel as
    (B, H, W, F), which is how channels-last images lie in memory. Without Flow++'s dropout: a
    network that is run again, as inverses do, must say the same. Source: Flow++ (Ho et al. 2019),
    section 3.3.

    Args:
        in_channels: channels of x.
        out_channels: channels of the result.
        hidden_channels: F, a multiple of `heads` where there are any.
        blocks: of convolution and attention.
        heads: attentions side by side; 0 leaves the attention out.
        context_channels: channels of the context, 0 where there is none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        blocks: int,
        heads: int,
        context_channels: int = 0,
    ) -> None:
        super().__init__()
        self.input = he_conv(in_channels, hidden_channels, 3)
        self.convolutions = nn.ModuleList(
            GatedConvolution(hidden_channels, context_channels) for _ in range(blocks)
        )
        self.attentions = nn.ModuleList(
            GatedAttention(hidden_channels, heads) for _ in range(blocks if heads else 0)
        )
        self.output = zero_conv(2 * hidden_channels, out_channels, 3)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map x (B, in_channels, H, W) and context (B, context_channels, H or 1, W or 1)."""
        features = _convolve(self.input, x.permute(0, 2, 3, 1))
        if context is not None:
            context = context.permute(0, 2, 3, 1)
        positions = positions_2d(x, features.shape[3]) if self.attentions else None
        for convolution, attention in zip_longest(self.convolutions, self.attentions):
            features = convolution(features, context)
            if attention is not None:
                features = attention(features, positions)
        return _convolve(self.output, concat_elu(features)).permute(0, 3, 1, 2)


class GatedConvolution(nn.Module):
    """A 3×3 convolution between concat-ELUs that is added through a gate, then normalized.

    Args:
        features: F.
        context_channels: of the context, added to what the convolution finds.
    """

    def __init__(self, features: int, context_channels: int = 0) -> None:
        super().__init__()
        self.convolution = he_conv(2 * features, features, 3)
        self.context = linear(context_channels, features, bias=False) if context_channels else None
        self.gate = linear(2 * features, 2 * features)
        self.norm = nn.LayerNorm(features)

    def forward(self, features: Tensor, context: Tensor | None = None) -> Tensor:
        """Map features (B, H, W, F) and context (B, H or 1, W or 1, context_channels)."""
        found = _convolve(self.convolution, concat_elu(features))
        if self.context is not None:
            found = found + self.context(context)
        return self.norm(features + F.glu(self.gate(concat_elu(found))))


class GatedAttention(nn.Module):
    """Self-attention of all positions that is added through a gate, then normalized.

    Args:
        features: F, a multiple of `heads`.
        heads: attentions side by side.
    """

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(features, heads, 2 * features)
        self.norm = nn.LayerNorm(features)

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """Map features (B, H, W, F), told their positions (H, W, F)."""
        found = self.attention((features + positions).flatten(1, 2))
        return self.norm(features + F.glu(found).view_as(features))


def concat_elu(features: Tensor) -> Tensor:
    """ELU of x and of −x one after the other: (..., F) to (..., 2F).

    >>> concat_elu(torch.tensor([1.0, -2.0]))
    tensor([ 1.0000, -0.8647, -0.6321,  2.0000])
    """
    return F.elu_(torch.cat([features, -features], -1))


def _convolve(conv: nn.Conv2d, features: Tensor) -> Tensor:
    """A convolution of features (B, H, W, F)."""
    return conv(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
