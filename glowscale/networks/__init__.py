"""Networks that predict a bijection's parameters; the only part that runs in low precision."""

from glowscale.networks.convolutional import ContextNetwork, ConvolutionalNetwork, zero_conv

__all__ = ["ContextNetwork", "ConvolutionalNetwork", "zero_conv"]
