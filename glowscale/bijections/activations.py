"""What is kept of a forward pass for the backward pass: everything, inputs only, or the end only.

A bijection's activations need not be stored: they can be computed again from its input (gradient
checkpointing, Chen et al. 2016), or rebuilt from its output, going backwards (reversible networks,
Gomez et al. 2017), in memory that does not grow with depth.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glowscale.bijections.base import Bijection, Sequential, zero_log_det

Activations = Literal["store", "recompute", "invert"]


def apply_keeping(
    activations: Activations, chain: Bijection, x: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `chain(x, context)`, whose backward pass computes again what was not kept.

    Args:
        activations: `store` keeps all that autograd would; `recompute` the input of every
            bijection of the chain; `invert` the chain's output, and notes in the bijections'
            `drift` how far what was rebuilt of it is off.
        chain: a bijection, of a `Sequential` each part by itself.
        x: (B, ...).
        context: what the chain is conditional on.
    """
    if activations == "store" or not torch.is_grad_enabled():
        return chain(x, context)
    bijections = list(chain.bijections) if isinstance(chain, Sequential) else [chain]
    tape = _Tape()
    total = zero_log_det(x)
    for number, bijection in enumerate(bijections, 1):
        if activations == "recompute":
            x, log_det = _Differentiated.apply(bijection, False, x, context, *bijection.leaves)
        else:
            is_last = number == len(bijections)
            x, log_det = _Rebuilt.apply(bijection, tape, is_last, x, context, *bijection.leaves)
        total = total + log_det
    return x, total


def apply_stored(bijection: Bijection, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `bijection(x, context)`, whose gradients are those of its `differentiate`."""
    return _Differentiated.apply(bijection, True, x, context, *bijection.leaves)


class _Differentiated(torch.autograd.Function):
    """One bijection; kept is its input, and where `stored` what its pullback needs."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        bijection: Bijection,
        stored: bool,
        x: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.bijection = bijection
        ctx.autocast = _Autocast.now(x)
        ctx.save_for_backward(x, context)
        if not stored:
            ctx.pullback = None
            return bijection(x, context)
        z, log_det, ctx.pullback = bijection.differentiate(x, context)
        return z, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor) -> Any:  # noqa: ANN401
        pullback, ctx.pullback = ctx.pullback, None  # it serves once
        if pullback is None:
            with ctx.autocast.again():
                _, _, pullback = ctx.bijection.differentiate(*ctx.saved_tensors)
        gradients = pullback(grad_z, grad_log_det)
        return None, None, gradients.x, gradients.context, *gradients.parameters


class _Tape:
    """What goes back along a chain from one bijection to the one before it."""

    rebuilt: Tensor | None = None


class _Rebuilt(torch.autograd.Function):
    """One bijection of a chain, whose input is rebuilt from its output.

    The chain's output is kept. In the backward pass each hands what it rebuilt to the one before
    it, whose output that is, so gradients go to the parameters one by one as they usually do.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        bijection: Bijection,
        tape: _Tape,
        is_last: bool,
        x: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.bijection, ctx.tape = bijection, tape
        ctx.autocast = _Autocast.now(x)
        ctx.mark = _mark(x)
        z, log_det = bijection(x, context)
        ctx.save_for_backward(z if is_last else None, context)
        return z, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor) -> Any:  # noqa: ANN401
        z, context = ctx.saved_tensors
        with ctx.autocast.again():
            x, pullback = ctx.bijection.rebuild(ctx.tape.rebuilt if z is None else z, context)
        ctx.tape.rebuilt = x
        ctx.bijection.note_drift(_mark(x) - ctx.mark)
        gradients = pullback(grad_z, grad_log_det)
        return None, None, None, gradients.x, gradients.context, *gradients.parameters


def _mark(x: Tensor) -> Tensor:
    """What of an input (B, ...) is kept to compare with: of images (B, C, H, W) one pixel each."""
    return x[..., x.shape[-2] // 2, x.shape[-1] // 2].clone() if x.dim() == 4 else x[:, :8].clone()


class _Autocast(NamedTuple):
    """The autocast that was active in a forward pass, for the backward pass, where it is not."""

    device: str
    dtype: torch.dtype | None
    enabled: bool

    @classmethod
    def now(cls, x: Tensor) -> "_Autocast":
        """That of x's device."""
        device = x.device.type
        if not torch.amp.is_autocast_available(device):
            return cls(device, None, False)
        return cls(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def again(self) -> AbstractContextManager[object]:
        """A context in which it is active."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(  # each weight is used once, so none is kept
            self.device, self.dtype, self.enabled, cache_enabled=False
        )
