"""What blocks are made of, by the kind that a config gives: masks, transforms and networks."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from glowscale.bijections import (
    Additive,
    Affine,
    CausalNetwork,
    ChannelMask,
    CheckerboardMask,
    InverseTransform,
    Mask,
    MixtureOfLogistics,
    RationalQuadraticSpline,
    Transform,
)
from glowscale.networks import (
    CausalTransformer,
    ConvolutionalNetwork,
    GatedAttentionNetwork,
    MaskedConvolutionalNetwork,
    VisionTransformer,
)

Arguments = Mapping[str, Any]
"""Part of a config: its `kind`, and arguments of what that names."""

MASKS: dict[str, Callable[[int, bool], Mask]] = {
    "channels": lambda index, mixed: ChannelMask(swapped=index % 2 == 1 and not mixed),
    "checkerboard": lambda index, _: CheckerboardMask(odd=index % 2 == 1),
}
"""Masks by name; each takes the index of the coupling in its row, and whether a matrix mixes the
channels before it."""
TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "affine": Affine,
    "additive": Additive,
    "gaussian": lambda scale="tanh": InverseTransform(Affine(scale)),
    "mixture": MixtureOfLogistics,
    "spline": RationalQuadraticSpline,
}
"""Transforms by kind; each takes its own arguments."""
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "convolutional": ConvolutionalNetwork,
    "gated": GatedAttentionNetwork,
    "transformer": VisionTransformer,
}
"""Conditioners by kind; each takes the channels that go in and come out, and its own arguments."""
CAUSAL_NETWORKS: dict[str, Callable[..., CausalNetwork]] = {
    "masked_convolutional": MaskedConvolutionalNetwork,
    "causal_transformer": CausalTransformer,
}
"""The same, of autoregressive flows."""


def make_transform(section: Arguments) -> Transform:
    """The transform that a section of a config describes."""
    arguments = dict(section)
    return TRANSFORMS[arguments.pop("kind")](**arguments)


def make_network(
    networks: Mapping[str, Callable[..., Any]],
    section: Arguments,
    in_channels: int,
    out_channels: int,
    context_channels: int,
) -> Any:  # noqa: ANN401
    """The conditioner, one of `networks`, that a section of a config describes."""
    arguments = dict(section)
    make = networks[arguments.pop("kind")]
    return make(in_channels, out_channels, context_channels=context_channels, **arguments)
