"""Networks that predict a bijection's parameters; the only part that runs in low precision."""

from glowscale.networks.causal import CausalTransformer
from glowscale.networks.convolutional import ContextNetwork, ConvolutionalNetwork, zero_conv
from glowscale.networks.gated import GatedAttentionNetwork
from glowscale.networks.masked import MaskedConvolutionalNetwork
from glowscale.networks.transformer import VisionTransformer

__all__ = [
    "CausalTransformer",
    "ContextNetwork",
    "ConvolutionalNetwork",
    "GatedAttentionNetwork",
    "MaskedConvolutionalNetwork",
    "VisionTransformer",
    "zero_conv",
]
