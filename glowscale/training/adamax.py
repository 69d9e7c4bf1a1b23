"""Adamax with the switch that fused AdamW has: a step that does nothing, decided on the device."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Tensors = list[Tensor]


class Adamax(torch.optim.Optimizer):
    """Adam with the infinity norm (Kingma & Ba 2015, algorithm 2), L2 weight decay.

    Where `found_inf`, a tensor that torch's fused optimizers know too, is 1, a step leaves
    weights and state as they are. The host reads it on the CPU alone: it never waits for a GPU.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay of the mean and of the norm.
        eps: added to the gradient's size in the norm.
        weight_decay: L2 penalty.

    >>> parameter = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = Adamax([parameter], lr=0.1)
    >>> parameter.grad = torch.tensor([float("nan")])
    >>> optimizer.found_inf = torch.ones(())
    >>> optimizer.step()
    >>> parameter.item()
    1.0
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the weights; a closure is not supported."""
        if closure is not None:
            raise ValueError("Adamax takes no closure; compute the gradients before its step.")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if self.found_inf is not None and self.found_inf.is_cuda:
                self._update_unless(self.found_inf, parameters, gradients, group)
            elif not self.found_inf:
                self._update(parameters, gradients, group)

    def _update(self, parameters: Tensors, gradients: Tensors, group: dict[str, Any]) -> None:
        """Take a step."""
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        steps, means, norms = self._state_of(parameters)
        if decay:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=decay))
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        sizes = torch._foreach_abs(gradients)
        torch._foreach_add_(sizes, group["eps"])
        torch._foreach_mul_(norms, beta2)
        torch._foreach_maximum_(norms, sizes)
        torch._foreach_add_(steps, 1)
        rate = group["lr"] / (1 - beta1 ** float(steps[0]))
        torch._foreach_addcdiv_(parameters, means, norms, value=-rate)

    def _update_unless(
        self, masked: Tensor, parameters: Tensors, gradients: Tensors, group: dict[str, Any]
    ) -> None:
        """Take a step, which changes nothing where `masked` is 1; only its device knows."""
        (beta1, beta2), eps = group["betas"], group["eps"]
        kept = 1 - masked.double()
        steps, means, norms = self._state_of(parameters)
        gradients = [gradient.masked_fill(kept == 0, 0) for gradient in gradients]
        if group["weight_decay"]:
            torch._foreach_add_(gradients, parameters, alpha=group["weight_decay"])
            torch._foreach_mul_(gradients, kept)
        torch._foreach_mul_(means, 1 - (1 - beta1) * kept)
        torch._foreach_add_(means, gradients, alpha=1 - beta1)
        sizes = torch._foreach_abs(gradients)
        torch._foreach_add_(sizes, eps)
        torch._foreach_mul_(sizes, kept)
        torch._foreach_mul_(norms, 1 - (1 - beta2) * kept)
        torch._foreach_maximum_(norms, sizes)
        torch._foreach_add_(steps, kept)
        rate = group["lr"] * kept / (1 - beta1 ** steps[0].clamp(min=1))
        changes = torch._foreach_clamp_min(norms, eps)  # a first step that is masked has none
        torch._foreach_reciprocal_(changes)
        torch._foreach_mul_(changes, means)
        torch._foreach_mul_(changes, rate)
        torch._foreach_sub_(parameters, changes)

    def _state_of(self, parameters: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """Steps, means and norms of the parameters; zeros at first."""
        for p in parameters:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float64, device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_inf"] = torch.zeros_like(p)
        states = [self.state[p] for p in parameters]
        steps, means, norms = ([s[key] for s in states] for key in ("step", "exp_avg", "exp_inf"))
        return steps, means, norms
