"""A convolution's gradients, as products of matrices where those are faster: on the CPU.

A 3×3 convolution between few channels and many is, unfolded, one product of tall matrices; the
side with few channels is the one to unfold. The products' speed beats the convolutions' own
backward pass on CPUs by a tenth or more, `pipelines/benchmark.py train`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glowscale.pixels import image_of, pixels_of

ConvPullback = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""From the gradient of the result to those of x, the weight and the bias."""


def differentiate_conv(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, ConvPullback]:
    """A convolution of x (B, C, H, W), outside of any graph, and the way back.

    Args:
        conv: 1×1 or 3×3, of stride 1 and padding `same`, with a bias.
        x: cast to autocast's type where that is active.
    """
    weight, bias = conv.weight, conv.bias
    assert bias is not None
    dtype = _dtype(x)
    x, low, low_bias = x.to(dtype), weight.detach().to(dtype), bias.detach().to(dtype)
    if low.shape[2] == 1:
        y = image_of(F.linear(pixels_of(x), low.flatten(1), low_bias), x)
    else:
        y = F.conv2d(x, low, low_bias, padding="same")

    def pullback(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_bias = gradient.sum((0, 2, 3), dtype=bias.dtype)
        if low.shape[2] == 1:
            pixels = pixels_of(gradient)
            of_weight = (pixels.T @ pixels_of(x))[:, None, None].permute(0, 3, 1, 2)
            of_x = image_of(pixels @ low.flatten(1), x)
        elif x.is_cuda:
            of_x, of_weight = _by_convolutions(gradient, x, low)
        elif x.shape[1] <= gradient.shape[1]:
            of_x, of_weight = _unfolding_input(gradient, x, low)
        else:
            of_x, of_weight = _unfolding_gradient(gradient, x, low)
        return of_x, of_weight.to(weight.dtype), of_bias

    return y, pullback


def relu_backward_(gradient: Tensor, y: Tensor) -> Tensor:
    """The gradient of relu's input from that of its result y, in its place."""
    return torch.ops.aten.threshold_backward.grad_input(gradient, y, 0, grad_input=gradient)


def _by_convolutions(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight of a 3×3 convolution, by the device's own."""
    no, one = [0, 0], [1, 1]
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, one, one, one, False, no, 1, [True, True, False]
    )
    return of_x, of_weight


def _unfolding_input(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight of a 3×3 convolution of few channels."""
    out_channels, channels = weight.shape[:2]
    pixels = pixels_of(gradient)
    of_weight = (pixels.T @ _unfold(x)).view(out_channels, 3, 3, channels).permute(0, 3, 1, 2)
    taps = pixels @ weight.permute(0, 2, 3, 1).reshape(out_channels, 9 * channels)
    return _fold(taps, x), of_weight


def _unfolding_gradient(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight of a 3×3 convolution to few channels."""
    out_channels, channels = weight.shape[:2]
    taps = _unfold(gradient)  # seen from x, a kernel is turned around
    turned = weight.flip(2, 3).permute(2, 3, 0, 1).reshape(9 * out_channels, channels)
    of_turned = (taps.T @ pixels_of(x)).view(3, 3, out_channels, channels).flip(0, 1)
    of_weight = of_turned.permute(2, 0, 1, 3).contiguous().permute(0, 3, 1, 2)
    return image_of(taps @ turned, x), of_weight


def _unfold(x: Tensor) -> Tensor:
    """The 3×3 surroundings of every pixel: (B, C, H, W) to (B·H·W, 9C), tap by tap."""
    batch, channels, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    image, row, column, channel = padded.stride()
    taps = padded.as_strided(
        (batch, height, width, 3, 3, channels), (image, row, column, row, column, channel)
    )
    return taps.reshape(-1, 9 * channels)


def _fold(taps: Tensor, like: Tensor) -> Tensor:
    """The adjoint of `_unfold`: every tap is added to the pixel that it is of."""
    batch, channels, height, width = like.shape
    taps = taps.view(batch, height, width, 3, 3, channels)
    rows = taps.new_zeros(batch, height, width + 2, 3, channels)
    for j in range(3):
        rows[:, :, j : j + width] += taps[:, :, :, :, j]
    padded = taps.new_zeros(batch, height + 2, width, channels)
    for i in range(3):
        padded[:, i : i + height] += rows[:, :, 1:-1, i]
    return padded[:, 1:-1].permute(0, 3, 1, 2)


def _dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if x.is_meta or x.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
