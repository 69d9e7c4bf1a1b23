"""Causal networks: all positions in one pass, or one after the other; and how they are guided."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Stepper(Protocol):
    """What a causal network says position by position, in raster order."""

    def next(self, previous: Tensor | None) -> Tensor:
        """The parameters of the next position.

        Args:
            previous: what was found at the position before, (B, in_channels); None at the first.

        Returns:
            (B, out_channels), as the network's one pass has them there.
        """


class CausalNetwork(Protocol):
    """A network whose result at a position reads x strictly before it, in raster order."""

    has_attention: ClassVar[bool]

    def __call__(
        self, x: Tensor, context: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Map x (B, in_channels, H, W) to (B, out_channels, H, W), in one pass.

        Args:
            x: the image.
            context: (B, context_channels, H or 1, W or 1); zeros say as much as None.
            temperature: divides the logits of attention; networks without any raise a ValueError
                for any other than 1.
        """

    def start(
        self, like: Tensor, context: Tensor | None = None, temperature: float = 1.0
    ) -> Stepper:
        """Begin to step over an image of the batch, sides, type and device of `like`."""


@dataclass(frozen=True)
class Guidance:
    """How far parameters are moved away from what a less informed network says.

    At position i of N they are told + w · i / (N - 1) · (told - untold). `untold` is what the
    network says without its context, and with the attention's logits divided by a temperature,
    which guides a network that has no context too. Source: TarFlow (Zhai et al. 2024), on
    guidance; the rising weight is that of its published code, apple/ml-tarflow. There parameters
    are those of sampling, x = z · exp(log_scale) + shift: `InverseTransform(Affine(...))` here.

    Args:
        weight: w; 0 leaves all as it is.
        temperature: of the attention for `untold`, positive; 1 leaves it as it is.
    """

    weight: float
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"Guidance needs a temperature above 0, not {self.temperature}.")


class GuidedNetwork:
    """A causal network whose every word is guided; it is one itself.

    Args:
        network: the one that is told and untold.
        guidance: how.
    """

    def __init__(self, network: CausalNetwork, guidance: Guidance) -> None:
        self.network = network
        self.guidance = guidance

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """As the network's, guided; raises ValueError where there is nothing to guide by."""
        self._refuse_idle(context)
        told = self.network(x, context)
        untold = self.network(x, None, self.guidance.temperature)
        return told + self.weights(x).view(x.shape[2:]) * (told - untold)

    def start(self, like: Tensor, context: Tensor | None = None) -> Stepper:
        """As the network's, guided; both sides keep what they computed."""
        self._refuse_idle(context)
        told = self.network.start(like, context)
        untold = self.network.start(like, None, self.guidance.temperature)
        return GuidedStepper(told, untold, self.weights(like))

    def weights(self, like: Tensor) -> Tensor:
        """Of every position of images (B, C, H, W), (H · W,)."""
        positions = like.shape[2] * like.shape[3]
        steps = torch.arange(positions, dtype=like.dtype, device=like.device)
        return self.guidance.weight / max(positions - 1, 1) * steps

    def _refuse_idle(self, context: Tensor | None) -> None:
        if context is None and self.guidance.temperature == 1:
            raise ValueError(
                "Guidance of a model without classes needs a temperature other than 1."
            )


class GuidedStepper:
    """Two steppers, one of which is to be led away from."""

    def __init__(self, told: Stepper, untold: Stepper, weights: Tensor) -> None:
        self.told = told
        self.untold = untold
        self.weights = iter(weights)

    def next(self, previous: Tensor | None) -> Tensor:
        """Parameters (B, out_channels) of the next position."""
        told, untold = self.told.next(previous), self.untold.next(previous)
        return told + next(self.weights) * (told - untold)
