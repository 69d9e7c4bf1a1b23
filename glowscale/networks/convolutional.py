"""Convolutional networks that predict a bijection's parameters."""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glowscale.networks.convolution import differentiate_conv, relu_backward_


class ConvolutionalNetwork(nn.Module):
    """Glow's coupling network: 3×3, 1×1 and 3×3 convolutions with ReLU between.

    Its last layer starts at zero, so a coupling starts as the identity. Source: Glow (Kingma &
    Dhariwal 2018), appendix B.

    Args:
        in_channels: channels of x.
        out_channels: channels of the result.
        hidden_channels: channels between the convolutions.
        context_channels: channels of the context, 0 where there is none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        context_channels: int = 0,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            he_conv(in_channels + context_channels, hidden_channels, 3),
            nn.ReLU(inplace=True),
            he_conv(hidden_channels, hidden_channels, 1),
            nn.ReLU(inplace=True),
            zero_conv(hidden_channels, out_channels, 3),
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map x (B, in_channels, H, W) and context (B, context_channels, H or 1, W or 1)."""
        if not torch.is_grad_enabled():  # the same arithmetic as where it is differentiated
            return self.differentiate(x, context)[0]
        if context is not None:
            x = torch.cat([x, context.expand(-1, -1, *x.shape[2:])], 1)
        return self.layers(x)

    def differentiate(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Callable[[Tensor], list[Tensor | None]]]:
        """As `forward`, outside of any graph, with the way back written out.

        Returns:
            The result, in autocast's type where that is active, and what takes its gradient back
            to x, the context and the parameters, once.
        """
        first, second, third = (cast("nn.Conv2d", self.layers[i]) for i in (0, 2, 4))
        kept = x.shape[1]
        with torch.no_grad():
            if context is not None:
                x = torch.cat([x, context.expand(-1, -1, *x.shape[2:])], 1)
            a, of_first = differentiate_conv(first, x)
            b, of_second = differentiate_conv(second, a.relu_())
            y, of_third = differentiate_conv(third, b.relu_())

        def pullback(gradient: Tensor) -> list[Tensor | None]:
            gradient, *of_weights = of_third(gradient)
            gradient, *of_second_weights = of_second(relu_backward_(gradient, b))
            gradient, *of_first_weights = of_first(relu_backward_(gradient, a))
            of_context = None
            if context is not None:
                of_context = gradient[:, kept:].sum_to_size(context.shape).to(context.dtype)
            of_parameters = [*of_first_weights, *of_second_weights, *of_weights]
            return [gradient[:, :kept], of_context, *of_parameters]

        return y, pullback


class ContextNetwork(nn.Module):
    """Reads what a conditional flow depends on: two residual blocks of 3×3 convolutions.

    Args:
        in_channels: channels of x.
        out_channels: channels of the features.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stem = he_conv(in_channels, out_channels, 3)
        self.blocks = nn.ModuleList(he_conv(out_channels, out_channels, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, in_channels, H, W) to features (B, out_channels, H, W)."""
        features = self.stem(x)
        for block in self.blocks:
            features = features + block(F.relu(features))
        return F.relu(features)


def he_conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    """A convolution that keeps a ReLU's variance (He et al. 2015); its bias starts at zero."""
    conv = zero_conv(in_channels, out_channels, kernel_size)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv


def zero_conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    """A convolution that starts at zero."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding="same")
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv
