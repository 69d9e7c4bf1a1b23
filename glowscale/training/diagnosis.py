"""Where numbers cease to be finite: which images, and which layer of the model is first."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Diagnosis(NamedTuple):
    """What is not finite."""

    ids: list[int]
    """Images whose log-likelihood is not."""
    place: str
    """The first layer whose output is not, or a parameter whose gradient is not; may be empty."""


@contextmanager
def first_non_finite(model: nn.Module) -> Iterator[list[str]]:
    """Within it, the names of the layers whose output is not finite are noted, in order.

    A layer runs after the ones inside it, so the first name is the innermost.
    """
    found: list[str] = []
    names = {layer: name for name, layer in model.named_modules() if name}

    def note(layer: nn.Module, _: Any, output: Any) -> None:  # noqa: ANN401
        if not all(bool(tensor.isfinite().all()) for tensor in _tensors(output)):
            found.append(f"{names[layer]} ({type(layer).__name__})")

    hooks = [layer.register_forward_hook(note) for layer in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def non_finite_gradient(loss: Tensor, model: nn.Module) -> str:
    """Name of the last parameter whose gradient of the loss is not finite; empty if all are.

    The gradient flows from the last layer to the first: the last bad one is where it begins.
    """
    named = list(model.named_parameters())
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    bad = [
        name
        for (name, _), gradient in zip(named, gradients, strict=True)
        if gradient is not None and not bool(gradient.isfinite().all())
    ]
    return f"the gradient of {bad[-1]}" if bad else ""


def _tensors(output: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """The tensors in what a layer returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
