"""Causal convolutions: what is said of a pixel was read above it and to its left."""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glowscale.networks.convolutional import zero_conv


class MaskedConvolutionalNetwork(nn.Module):
    """A gated PixelCNN: two stacks of causal convolutions, without a blind spot.

    The vertical stack reads all rows above, the horizontal stack what stands to the left and, in
    every block, the vertical one. Kernels are cut to what they may read, not masked: images are
    moved by padding instead. The last layer starts at zero. Source: van den Oord et al. 2016,
    sections 2.1 to 2.3; the padding is that of PixelCNN++ (Salimans et al. 2017).

    Args:
        in_channels: channels of x.
        out_channels: channels of the result.
        hidden_channels: channels of either stack.
        blocks: gated residual ones, after the first convolutions.
        context_channels: channels of the context, 0 where there is none.
        kernel_size: of the square that a kernel is the causal half of; odd, else a ValueError.
    """

    has_attention: ClassVar[bool] = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        blocks: int,
        context_channels: int = 0,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"Causal convolutions need an odd kernel_size, not {kernel_size}.")
        self.reach = kernel_size // 2
        self.above = causal_conv(in_channels, hidden_channels, (self.reach + 1, kernel_size))
        self.left = causal_conv(in_channels, hidden_channels, (1, self.reach + 1), bias=False)
        self.blocks = cast(
            "Sequence[GatedBlock]",
            nn.ModuleList(
                GatedBlock(hidden_channels, context_channels, kernel_size) for _ in range(blocks)
            ),
        )
        self.output = zero_conv(hidden_channels, out_channels, 1)

    def forward(
        self, x: Tensor, context: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Map x (B, in_channels, H, W) and context (B, context_channels, H or 1, W or 1)."""
        _refuse_temperature(temperature)
        reach = self.reach
        v = self.above(F.pad(x, (reach, reach, reach + 1, -1)))  # moved down by a row
        h = self.left(F.pad(x, (reach + 1, -1))) + v  # to the right by a pixel
        for block in self.blocks:
            v, h = block(v, h, context)
        return self.output(F.gelu(h))

    def start(
        self, like: Tensor, context: Tensor | None = None, temperature: float = 1.0
    ) -> "ConvolutionalStepper":
        """Begin to step over an image like `like` (B, in_channels, H, W), features kept."""
        _refuse_temperature(temperature)
        return ConvolutionalStepper(self, like, context)


class GatedBlock(nn.Module):
    """One layer of both stacks, each added to what it read.

    Args:
        channels: of either stack.
        context_channels: channels of the context, 0 where there is none.
        kernel_size: of the square that a kernel is the causal half of.
    """

    def __init__(self, channels: int, context_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.reach = kernel_size // 2
        self.vertical = causal_conv(channels, 2 * channels, (self.reach + 1, kernel_size))
        self.horizontal = causal_conv(channels, 2 * channels, (1, self.reach + 1), bias=False)
        self.link = causal_conv(2 * channels, 2 * channels, (1, 1))
        self.output = causal_conv(channels, channels, (1, 1))
        self.context = (
            causal_conv(context_channels, 2 * channels, (1, 1), bias=False)
            if context_channels
            else None
        )

    def forward(self, v: Tensor, h: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both stacks' features (B, channels, H, W) a layer on."""
        reach = self.reach
        change, told = self.read_above(F.pad(v, (reach, reach, reach, 0)))
        told = told + self.read_context(context)
        return v + change, h + self.read_left(F.pad(h, (reach, 0)), told)

    def read_above(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """From padded v, its change and what the horizontal stack is told."""
        read = self.vertical(v)
        return gate(read), self.link(read)

    def read_left(self, h: Tensor, told: Tensor) -> Tensor:
        """The change of h, from padded h and what it is told."""
        return self.output(gate(self.horizontal(h) + told))

    def read_context(self, context: Tensor | None) -> Tensor | float:
        """What the context adds to that, (B, 2 · channels, H or 1, W or 1)."""
        return 0.0 if self.context is None or context is None else self.context(context)


class ConvolutionalStepper:
    """Steps pixel by pixel; every feature is computed once.

    A row's vertical features need the rows above alone and are computed when it begins; of a
    pixel's horizontal features each layer reads the last few. Source: Ramachandran et al. 2017.
    """

    def __init__(
        self, network: MaskedConvolutionalNetwork, like: Tensor, context: Tensor | None
    ) -> None:
        self.network = network
        batch, channels, _, width = like.shape
        layers = [channels, *[network.output.in_channels] * len(network.blocks)]
        size = network.reach + 1
        self.rows = [like.new_zeros(batch, n, size, width) for n in layers]
        self.no_columns = [like.new_zeros(batch, n, 1, size) for n in layers]
        self.columns = self.no_columns
        self.contexts = [_spread(block.read_context(context), like) for block in network.blocks]
        self.found: list[Tensor] = []

    def next(self, previous: Tensor | None) -> Tensor:
        """Parameters (B, out_channels) of the next pixel, after `previous` (B, in_channels)."""
        if previous is not None:
            self.found.append(previous[:, :, None, None])
        row, column = divmod(len(self.found), self.rows[0].shape[3])
        if column == 0:
            self._begin(row)
        h = self._slide_columns(0, self.found[-1] if column else None)
        h = self.network.left(h) + self.told[0][..., column : column + 1]
        for i, block in enumerate(self.network.blocks, 1):
            h = h + block.read_left(
                self._slide_columns(i, h), self.told[i][..., column : column + 1]
            )
        return self.network.output(F.gelu(h))[:, :, 0, 0]

    def _begin(self, row: int) -> None:
        """Compute what the vertical stack tells the pixels of a row, in `told`."""
        self.columns = list(self.no_columns)
        width, reach = self.rows[0].shape[3], self.network.reach
        if row:
            self.rows[0] = _slide(self.rows[0], torch.cat(self.found[-width:], 3), 2)
        v = self.network.above(F.pad(self.rows[0], (reach, reach)))
        self.told = [v]
        for i, (block, context) in enumerate(
            zip(self.network.blocks, self.contexts, strict=True), 1
        ):
            self.rows[i] = _slide(self.rows[i], v, 2)
            change, told = block.read_above(F.pad(self.rows[i], (reach, reach)))
            self.told.append(told + context[:, :, row : row + 1])
            v = v + change

    def _slide_columns(self, layer: int, new: Tensor | None) -> Tensor:
        """The last columns of a layer's input, with the new one."""
        if new is not None:
            self.columns[layer] = _slide(self.columns[layer], new, 3)
        return self.columns[layer]


def gate(x: Tensor) -> Tensor:
    """Tanh of the first half of the channels, times the second half's sigmoid."""
    values, gates = x.chunk(2, dim=1)
    return torch.tanh(values) * torch.sigmoid(gates)


def causal_conv(
    in_channels: int, out_channels: int, kernel_size: tuple[int, int], bias: bool = True
) -> nn.Conv2d:
    """A convolution of what is padded already, which keeps variances; its bias starts at zero."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=bias)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _slide(window: Tensor, new: Tensor, dim: int) -> Tensor:
    """Put what is new at the end of a window, and drop its beginning."""
    return torch.cat([window.narrow(dim, 1, window.shape[dim] - 1), new], dim)


def _spread(context: Tensor | float, like: Tensor) -> Tensor:
    """What is added of a context, as an image of the sides of `like`."""
    if isinstance(context, float):
        return like.new_full((1, 1, *like.shape[2:]), context)
    return context.expand(-1, -1, *like.shape[2:])


def _refuse_temperature(temperature: float) -> None:
    if temperature != 1:
        raise ValueError(
            f"Convolutions have no attention that a temperature of {temperature} could be for; "
            "guide them by the context alone, with a temperature of 1."
        )
