"""Adamax with the switch that fused AdamW has: a step that does nothing, decided on the device."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Tensors = list[Tensor]


class Adamax(torch.optim.Optimizer):
    """Adam with the infinity norm (Kingma & Ba 2015, algorithm 2), L2 weight decay.

    Where `found_inf`, a tensor that torch's fused optimizers know too, is 1, a step leaves
    weights and state as they are. On a GPU the host need not know, and never waits for it.

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
            if parameters:
                self._update(parameters, self._kept(parameters[0]), group)

    def _update(self, parameters: Tensors, kept: Tensor | float, group: dict[str, Any]) -> None:
        """Take a step of which `kept`, 1 or 0, is kept."""
        (beta1, beta2), eps = group["betas"], group["eps"]
        steps, means, norms = self._state_of(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if isinstance(kept, Tensor):
            gradients = [g.masked_fill(kept == 0, 0) for g in gradients]
        elif not kept:
            return
        if group["weight_decay"]:
            decay = torch._foreach_mul(parameters, group["weight_decay"] * kept)
            gradients = list(torch._foreach_add(gradients, decay))
        torch._foreach_mul_(means, 1 - (1 - beta1) * kept)
        torch._foreach_add_(means, gradients, alpha=1 - beta1)
        sizes = torch._foreach_abs(gradients)
        torch._foreach_add_(sizes, eps)
        torch._foreach_mul_(norms, 1 - (1 - beta2) * kept)
        if isinstance(kept, Tensor):
            torch._foreach_mul_(sizes, kept)
        torch._foreach_maximum_(norms, sizes)
        torch._foreach_add_(steps, kept)
        rate = group["lr"] * kept / (1 - beta1 ** steps[0].clamp(min=1))
        if isinstance(kept, Tensor):
            changes = torch._foreach_clamp_min(norms, eps)  # a first step that is masked has none
            torch._foreach_reciprocal_(changes)
            torch._foreach_mul_(changes, means)
            torch._foreach_mul_(changes, rate)
            torch._foreach_sub_(parameters, changes)
        else:
            torch._foreach_addcdiv_(parameters, means, norms, value=-float(rate))

    def _kept(self, like: Tensor) -> Tensor | float:
        """1 where the step is taken, 0 where it is masked; a number where the host knows it."""
        if self.found_inf is None:
            return 1.0
        kept = 1 - self.found_inf.double()
        return kept if like.is_cuda else float(kept)

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
