"""Transformers that predict a bijection's parameters, with a token a pixel."""

from torch import Tensor, nn

from glowscale.networks.attention import KeyValues, SelfAttention, linear, zero_linear
from glowscale.networks.positions import positions_2d
from glowscale.pixels import image_of


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each added to what it reads normalized.

    Source: Vaswani et al. 2017, with the norm first as Dosovitskiy et al. 2021 have it.

    Args:
        features: of every token; a multiple of `heads`, else a ValueError.
        heads: attentions side by side.
        expansion: how many times as wide the perceptron's hidden layer is.
    """

    def __init__(self, features: int, heads: int, expansion: int = 4) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(features)
        self.attention = SelfAttention(features, heads)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(features),
            linear(features, expansion * features),
            nn.GELU(),
            linear(expansion * features, features),
        )

    def forward(self, tokens: Tensor, causal: bool = False, temperature: float = 1.0) -> Tensor:
        """Map tokens (B, N, F) to as many.

        Args:
            tokens: in the order that `causal` is about.
            causal: whether a token reads only itself and those before it.
            temperature: divides the attention's logits.
        """
        read = self.attention(self.attention_norm(tokens), causal, temperature)
        tokens = tokens + read
        return tokens + self.perceptron(tokens)

    def step(self, token: Tensor, cache: KeyValues, temperature: float = 1.0) -> Tensor:
        """As `forward`, causal, of the next token (B, 1, F) alone; the cache has those before."""
        read = self.attention.step(self.attention_norm(token), cache, temperature)
        token = token + read
        return token + self.perceptron(token)


class VisionTransformer(nn.Module):
    """A plain transformer on the pixels of an image that was squeezed into patches before.

    Its last layer starts at zero, so a coupling starts as the identity. Source: Jet (Kolesnikov
    et al. 2024), section 3; Dosovitskiy et al. 2021.

    Args:
        in_channels: channels of x.
        out_channels: channels of the result.
        hidden_channels: features of every token, a multiple of `heads`.
        blocks: of attention and perceptron.
        heads: attentions side by side.
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
        self.embedding = linear(in_channels, hidden_channels)
        self.context = linear(context_channels, hidden_channels) if context_channels else None
        self.blocks = nn.Sequential(
            *(TransformerBlock(hidden_channels, heads) for _ in range(blocks))
        )
        self.norm = nn.LayerNorm(hidden_channels)
        self.output = zero_linear(hidden_channels, out_channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map x (B, in_channels, H, W) and context (B, context_channels, H or 1, W or 1)."""
        features = self.embedding(x.permute(0, 2, 3, 1))
        features = features + positions_2d(x, features.shape[3])
        if context is not None:
            context = context.permute(0, 2, 3, 1)
        if self.context is not None:
            features = features + self.context(context)
        tokens = self.norm(self.blocks(features.flatten(1, 2)))
        return image_of(self.output(tokens).flatten(0, 1), x)
