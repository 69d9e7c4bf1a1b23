"""What every bijection is: `forward` maps data to latent and measures it, `inverse` undoes it."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
"""A tensor's shape without its batch dimension; an image's is (C, H, W)."""


class Gradients(NamedTuple):
    """Of a loss, with respect to what went into a bijection."""

    x: Tensor
    context: Tensor | None
    parameters: tuple[Tensor | None, ...]
    """In the order of the bijection's `leaves`."""


Pullback = Callable[[Tensor, Tensor], Gradients]
"""From the gradients of a bijection's z (B, ...) and log_det (B,) to those of what went in."""


class Bijection(nn.Module):
    """An invertible map whose Jacobian determinant is cheap.

    `forward(x, context) -> (z, log_det)` maps data x (B, ...) to z (B, ...), with
    `log_det` = log|det dz/dx| of shape (B,), in float32 or x's wider type, also under autocast.
    `inverse(z, context) -> x` undoes it and never changes state. `context` (B, ...) is what a
    conditional bijection depends on; others ignore it.
    """

    drift: Tensor | None = None
    """How far x was off, a scalar, where it was rebuilt from z for the gradients."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x (B, ...) to z (B, ...); return it with log|det dz/dx|, (B,)."""
        raise TypeError(f"{type(self).__name__} must define forward(x, context).")

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Map z (B, ...) back to x (B, ...)."""
        raise TypeError(f"{type(self).__name__} must define inverse(z, context).")

    def output_shape(self, shape: Shape) -> Shape:
        """Shape of z for x of `shape`, both without the batch; raises ValueError if unfit."""
        return shape

    @cached_property
    def leaves(self) -> tuple[nn.Parameter, ...]:
        """The parameters, collected once: walking over modules takes as long as a small layer."""
        return tuple(self.parameters())

    def differentiate(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Pullback]:
        """As `forward`, outside of any graph; also what takes gradients back, once."""
        (z, log_det), back = differentiate(self, (x, context), self.leaves)

        def pullback(grad_z: Tensor, grad_log_det: Tensor) -> Gradients:
            of_x, of_context, *of_parameters = back(grad_z, grad_log_det)
            return Gradients(cast("Tensor", of_x), of_context, tuple(of_parameters))

        return z, log_det, pullback

    def rebuild(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Pullback]:
        """As `inverse`, outside of any graph; also what takes gradients from z to x, once."""
        with torch.no_grad():
            x = self.inverse(z, context)
        return x, self.differentiate(x, context)[2]

    def note_drift(self, difference: Tensor) -> None:
        """Note by how much some x that was rebuilt differs, in `drift`; of several the largest.

        It is the root of the mean square, for what bf16 rounds to the other side of a boundary
        moves single values by a hundredth, and the gradients by little.
        """
        if not difference.numel():
            return
        drift = difference.square().mean().sqrt().nan_to_num(nan=math.inf)
        self.drift = drift if self.drift is None else torch.maximum(self.drift, drift)


class Sequential(Bijection):
    """Bijections applied one after the other; their log-dets add.

    >>> from glowscale.bijections import ActNorm, Squeeze
    >>> chain = Sequential([Squeeze(), ActNorm(4)])
    >>> z, log_det = chain(torch.zeros(2, 1, 4, 4))
    >>> z.shape, log_det.shape
    (torch.Size([2, 4, 2, 2]), torch.Size([2]))
    """

    def __init__(self, bijections: Iterable[Bijection]) -> None:
        super().__init__()
        self.bijections = cast("Sequence[Bijection]", nn.ModuleList(bijections))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the bijections first to last."""
        total = zero_log_det(x)
        for bijection in self.bijections:
            x, log_det = bijection(x, context)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Undo the bijections last to first."""
        for bijection in reversed(self.bijections):
            z = bijection.inverse(z, context)
        return z

    def differentiate(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Pullback]:
        """As `forward`, outside of any graph; also what takes gradients back, once."""
        total = zero_log_det(x)
        pullbacks = []
        for bijection in self.bijections:
            x, log_det, pullback = bijection.differentiate(x, context)
            total = total + log_det
            pullbacks.append(pullback)
        return x, total, chain_pullbacks(pullbacks)

    def rebuild(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Pullback]:
        """As `inverse`, outside of any graph; also what takes gradients from z to x, once."""
        pullbacks = []
        for bijection in reversed(self.bijections):
            z, pullback = bijection.rebuild(z, context)
            pullbacks.append(pullback)
        return z, chain_pullbacks(pullbacks[::-1])

    def output_shape(self, shape: Shape) -> Shape:
        """Shape after the last bijection."""
        for bijection in self.bijections:
            shape = bijection.output_shape(shape)
        return shape


def chain_pullbacks(pullbacks: Sequence[Pullback]) -> Pullback:
    """Back through bijections that were applied one after the other, last to first."""

    def pullback(grad_z: Tensor, grad_log_det: Tensor) -> Gradients:
        of_context: Tensor | None = None
        of_parameters: tuple[Tensor | None, ...] = ()
        for part in reversed(pullbacks):
            gradients = part(grad_z, grad_log_det)
            grad_z, of_context = gradients.x, add_gradients(of_context, gradients.context)
            of_parameters = (*gradients.parameters, *of_parameters)
        return Gradients(grad_z, of_context, of_parameters)

    return pullback


def add_gradients(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of gradients, of which None stands for none."""
    if one is None or other is None:
        return one if other is None else other
    return one + other


def differentiate(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], Callable[..., list[Tensor | None]]]:
    """Values of a function, in a graph of their own, and what takes gradients back, once.

    Args:
        function: of the inputs; it reads the parameters too.
        inputs: whatever is known of them before is of no account.
        parameters: which gradients are wanted of besides; those without `requires_grad` get none.

    Returns:
        The values without a graph, and a function from their gradients to those of inputs and
        parameters, in order; None for what the values do not depend on.
    """
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        values = function(*inputs)
    sources = [*inputs, *parameters]

    def pullback(*gradients: Tensor) -> list[Tensor | None]:
        pairs = [(y, g) for y, g in zip(values, gradients, strict=True) if y.requires_grad]
        wanted = [x for x in sources if x is not None and x.requires_grad]
        ends, starts = [y for y, _ in pairs], [g for _, g in pairs]
        found = torch.autograd.grad(ends, wanted, starts, allow_unused=True) if pairs else ()
        by_source = dict(zip(map(id, wanted), found, strict=bool(pairs)))
        return [by_source.get(id(x)) for x in sources]

    return tuple(y.detach() for y in values), pullback


def sum_per_image(x: Tensor) -> Tensor:
    """Sum all but the batch dimension: (B, ...) to (B,)."""
    return x.sum(tuple(range(1, x.dim())))


def zero_log_det(x: Tensor) -> Tensor:
    """The log-det of a map that preserves volume: zeros (B,), at least float32."""
    return x.new_zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


def soft_clamp(x: Tensor, bound: float) -> Tensor:
    """Bound x smoothly to (-bound, bound), the identity near zero."""
    return bound * torch.tanh(x / bound)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast leaves flow arithmetic alone."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
