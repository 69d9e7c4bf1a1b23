"""A causal transformer, with a token a pixel."""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from glowscale.networks.attention import KeyValues, linear, zero_linear
from glowscale.networks.positions import positions_2d
from glowscale.networks.transformer import TransformerBlock
from glowscale.pixels import image_of


class CausalTransformer(nn.Module):
    """What it says of a pixel, it read in those before, in raster order.

    The token of a pixel carries the pixel before it, and the first a learned beginning; so the
    first pixel's parameters are learned too. The last layer starts at zero. Source: TarFlow (Zhai
    et al. 2024), which shifts the result instead.

    Args:
        in_channels: channels of x.
        out_channels: channels of the result.
        hidden_channels: features of every token, a multiple of `heads`.
        blocks: of attention and perceptron.
        heads: attentions side by side.
        context_channels: channels of the context, 0 where there is none.
    """

    has_attention: ClassVar[bool] = True

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
        self.beginning = nn.Parameter(torch.zeros(hidden_channels))
        self.embedding = linear(in_channels, hidden_channels)
        self.context = (
            linear(context_channels, hidden_channels, bias=False) if context_channels else None
        )
        self.blocks = cast(
            "Sequence[TransformerBlock]",
            nn.ModuleList(TransformerBlock(hidden_channels, heads) for _ in range(blocks)),
        )
        self.norm = nn.LayerNorm(hidden_channels)
        self.output = zero_linear(hidden_channels, out_channels)

    def forward(
        self, x: Tensor, context: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Map x (B, in_channels, H, W) and context (B, context_channels, H or 1, W or 1)."""
        before = self.embedding(x.flatten(2).transpose(1, 2)[:, :-1])
        tokens = torch.cat([self.first(len(x)), before], 1) + self.places(x, context)
        for block in self.blocks:
            tokens = block(tokens, causal=True, temperature=temperature)
        return image_of(self.output(self.norm(tokens)).flatten(0, 1), x)

    def start(
        self, like: Tensor, context: Tensor | None = None, temperature: float = 1.0
    ) -> "TransformerStepper":
        """Begin to step over an image like `like` (B, in_channels, H, W), keys and values kept."""
        return TransformerStepper(self, like, context, temperature)

    def first(self, batch: int) -> Tensor:
        """The token that has nothing before it, (batch, 1, hidden_channels)."""
        return self.beginning.expand(batch, 1, -1)

    def places(self, like: Tensor, context: Tensor | None) -> Tensor:
        """What every token is told of its place and the context, (B or 1, H · W, features)."""
        features = positions_2d(like, len(self.beginning))[None]
        if self.context is not None and context is not None:
            features = features + self.context(context.permute(0, 2, 3, 1))
        return features.flatten(1, 2)


class TransformerStepper:
    """Steps token by token; each goes through every layer once."""

    def __init__(
        self,
        network: CausalTransformer,
        like: Tensor,
        context: Tensor | None,
        temperature: float,
    ) -> None:
        self.network = network
        self.batch = len(like)
        self.temperature = temperature
        self.places = iter(network.places(like, context).unbind(1))
        positions = like.shape[2] * like.shape[3]
        self.caches = [KeyValues(positions) for _ in network.blocks]

    def next(self, previous: Tensor | None) -> Tensor:
        """Parameters (B, out_channels) of the next pixel, after `previous` (B, in_channels)."""
        network = self.network
        if previous is None:
            token = network.first(self.batch)[:, 0]
        else:
            token = network.embedding(previous)
        token = (token + next(self.places))[:, None]
        for block, cache in zip(network.blocks, self.caches, strict=True):
            token = block.step(token, cache, self.temperature)
        return network.output(network.norm(token))[:, 0]
