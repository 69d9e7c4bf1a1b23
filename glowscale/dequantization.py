"""Dequantization: from integer pixels to continuous ones, with the density of the noise.

With v = x + u, u in (0, 1) drawn from q(u|x), log p(x) ≥ E_q[log p(v) − log q(u|x)].
"""

from typing import ClassVar, Literal

from torch import Tensor, nn

from glowscale.bijections import (
    Affine,
    Bijection,
    Coupling,
    FlowStep,
    Sequential,
    Sigmoid,
    Squeeze,
    Unsqueeze,
)
from glowscale.bijections.activations import Activations, apply_keeping
from glowscale.distributions import standard_normal_log_prob
from glowscale.networks import ContextNetwork, ConvolutionalNetwork

NoiseKind = Literal["uniform", "normal"]


class Dequantizer(nn.Module):
    """Adds noise within a grey level to integer pixels.

    `forward(images, noise) -> (continuous, log_q)`: images (B, C, H, W) with integer values;
    noise of their shape, of the kind that `noise_kind` names, in the model's dtype; continuous
    images in [0, grey_levels] and log q(u|x) in nats, (B,).
    """

    name: ClassVar[str]
    noise_kind: ClassVar[NoiseKind]
    is_bound: ClassVar[bool] = True
    """Whether log p(v) − log q(u|x) bounds the log-likelihood of the pixels."""
    std: float = 0.0
    """Of noise that hides the images, in grey levels."""

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Dequantize images (B, C, H, W); return them with log q, (B,)."""
        raise TypeError(f"{type(self).__name__} must define forward(images, noise).")


class UniformDequantizer(Dequantizer):
    """q(u|x) is uniform: log q = 0."""

    name = "uniform"
    noise_kind = "uniform"

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Add the noise (B, C, H, W) in (0, 1)."""
        return images.to(noise.dtype) + noise, noise.new_zeros(noise.shape[0])


class NoiseAugmentation(Dequantizer):
    """Gaussian noise, wider than a grey level: the model learns the density of noisy images.

    So its bits/dim are those of noisy images, no bound on those of pixels; its samples are noisy
    too, until `MultiscaleFlow.denoise`. Source: TarFlow (Zhai et al. 2024), section 3.3.

    Args:
        std: of the noise, in grey levels; the paper's 0.05 on a range of 2 are 6.4 of 256.
    """

    name = "noise"
    noise_kind = "normal"
    is_bound = False

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Add the noise (B, C, H, W) to the middles of the grey levels."""
        return images.to(noise.dtype) + 0.5 + self.std * noise, noise.new_zeros(noise.shape[0])


class VariationalDequantizer(Dequantizer):
    """q(u|x) is a flow from normal noise, conditional on the image; trained with the model.

    Source: Flow++ (Ho et al. 2019), section 3.1. The couplings start as the identity, so q
    starts as nearly uniform noise.

    Args:
        image_shape: (C, H, W) of the images, H and W even.
        grey_levels: number of values that a pixel takes.
        depth: coupling steps.
        hidden_channels: channels of the couplings' networks.
        context_channels: features that the couplings read of the image.
        activations: what the steps keep for the backward pass, see `apply_keeping`.
    """

    name = "variational"
    noise_kind = "normal"

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        grey_levels: int,
        depth: int = 4,
        hidden_channels: int = 64,
        context_channels: int = 32,
        activations: Activations = "store",
    ) -> None:
        super().__init__()
        self.activations = activations
        self.grey_levels = grey_levels
        self.squeeze = Squeeze()
        channels = self.squeeze.output_shape(image_shape)[0]
        self.context = ContextNetwork(channels, context_channels)
        steps: list[Bijection] = []
        for _ in range(depth):
            network = ConvolutionalNetwork(
                channels // 2, channels, hidden_channels, context_channels
            )
            steps.append(FlowStep(channels, Coupling(network, Affine())))
        self.flow = Sequential([self.squeeze, *steps, Unsqueeze()])
        self.sigmoid = Sigmoid()  # whose inverse is not exact enough to rebuild its input

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Turn normal noise (B, C, H, W) into u ~ q(u|x) and add it."""
        pixels = images.to(noise.dtype)
        folded, _ = self.squeeze(pixels / self.grey_levels - 0.5)
        context = self.context(folded)
        y, log_det = apply_keeping(self.activations, self.flow, noise, context)
        u, sigmoid_log_det = self.sigmoid(y)
        return pixels + u, standard_normal_log_prob(noise) - log_det - sigmoid_log_det
