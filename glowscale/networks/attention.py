"""Self-attention over tokens, at once or token by token with what was computed before."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyValues:
    """Keys and values of the tokens so far, of one attention, for stepping on.

    Args:
        length: how many tokens there will be; their memory is taken with the first.
    """

    keys: Tensor
    """(B, heads, length, F / heads), of which the first `filled` count; so too the values."""
    values: Tensor

    def __init__(self, length: int) -> None:
        self.length = length
        self.filled = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of one token, (B, heads, 1, F / heads) each; returns those of all so far."""
        if self.filled == self.length:
            raise ValueError(f"All {self.length} tokens of the cache are filled; make a new one.")
        if not self.filled:
            batch, heads, _, size = keys.shape
            self.keys = keys.new_empty(batch, heads, self.length, size)
            self.values = torch.empty_like(self.keys)
        self.keys[:, :, self.filled] = keys[:, :, 0]
        self.values[:, :, self.filled] = values[:, :, 0]
        self.filled += 1
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]


class SelfAttention(nn.Module):
    """Multi-head self-attention: every token reads all tokens, or all up to itself.

    Source: Vaswani et al. 2017, section 3.2. Queries, keys and values have no bias: a key's would
    cancel, and a value's is that of the result.

    Args:
        features: of every token; a multiple of `heads`, else a ValueError.
        heads: attentions side by side.
        out_features: of every token of the result; as many as went in by default.
    """

    def __init__(self, features: int, heads: int, out_features: int | None = None) -> None:
        super().__init__()
        if heads < 1 or features % heads:
            raise ValueError(f"{features} features cannot be shared by {heads} heads evenly.")
        self.heads = heads
        self.queries_keys_values = linear(features, 3 * features, bias=False)
        self.output = linear(features, out_features or features)

    def forward(self, tokens: Tensor, causal: bool = False, temperature: float = 1.0) -> Tensor:
        """Map tokens (B, N, F) to (B, N, out_features).

        Args:
            tokens: in the order that `causal` is about.
            causal: whether a token reads only itself and those before it.
            temperature: divides the logits.
        """
        return self._attend(*self._split(tokens), causal, temperature)

    def step(self, token: Tensor, cache: KeyValues, temperature: float = 1.0) -> Tensor:
        """As `forward`, causal, of the next token (B, 1, F) alone; the cache has those before."""
        queries, keys, values = self._split(token)
        return self._attend(queries, *cache.append(keys, values), False, temperature)

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, heads, N, F / heads) each, without a copy."""
        parts = self.queries_keys_values(tokens).chunk(3, dim=2)
        queries, keys, values = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts
        )
        return queries, keys, values

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, causal: bool, temperature: float
    ) -> Tensor:
        scale = queries.shape[3] ** -0.5 / temperature
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=causal, scale=scale
        )
        return self.output(mixed.transpose(1, 2).flatten(2))


def linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """A linear layer that keeps variances (Glorot & Bengio 2010); its bias starts at zero."""
    layer = nn.Linear(in_features, out_features, bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that starts at zero."""
    layer = nn.Linear(in_features, out_features)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
