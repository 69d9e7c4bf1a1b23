"""Networks that predict a bijection's parameters; the only part that runs in low precision."""

from glowscale.networks.convolutional import ContextNetwork, ConvolutionalNetwork, zero_conv
from glowscale.networks.gated import GatedAttentionNetwork
from glowscale.networks.transformer import VisionTransformer

__all__ = [
    "ContextNetwork",
    "ConvolutionalNetwork",
    "GatedAttentionNetwork",
    "VisionTransformer",
    "zero_conv",
]
