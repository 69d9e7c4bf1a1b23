"""Optimizers and the learning rate, a function of the images seen."""

import math

import torch
from torch import Tensor, nn

from glowscale.checkpoint import CheckpointError
from glowscale.training.adamax import Adamax


def build_optimizer(
    model: nn.Module,
    kind: str,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Adamax or AdamW over a model's parameters; only convolution weights decay.

    Decaying the scales, biases and 1×1 matrices of the bijections would pull the density
    itself towards a fixed one. The decay is AdamW's (decoupled), and L2 under Adamax. Both skip
    a step where their attribute `found_inf`, a tensor on the device, is 1.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() == 4], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() != 4], "weight_decay": 0.0},
    ]
    betas = (beta1, beta2)
    match kind:
        case "adamax":
            return Adamax(groups, lr=lr, betas=betas)
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    raise ValueError(f"There is no optimizer {kind!r}, only adamax, adamw.")


def learning_rate(
    images: int, total: int, lr: float, warmup_images: int, decay: str, final_factor: float
) -> float:
    """The rate for an update after which `images` of `total` have been seen.

    It depends on nothing else, so nothing about it is saved and the number of processes does
    not matter.

    >>> [learning_rate(n, 400, 1.0, 100, "cosine", 0.0) for n in (50, 100, 250, 400)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if images < warmup_images:
        return lr * images / warmup_images
    if decay == "constant":
        return lr
    if decay != "cosine":
        raise ValueError(f"There is no decay {decay!r}, only constant, cosine.")
    progress = min(1.0, (images - warmup_images) / max(1, total - warmup_images))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return lr * (final_factor + (1 - final_factor) * cosine)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as tensors named `<parameter>.<quantity>`."""
    return {
        f"{name}.{quantity}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for quantity, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, in each parameter's memory layout and device.

    Raises:
        CheckpointError: if it is the state of other parameters than the model's.
    """
    parameters = dict(model.named_parameters())
    names = {key.rpartition(".")[0] for key in tensors}
    if tensors and names != parameters.keys():
        wrong = min(names ^ parameters.keys())
        raise CheckpointError(f"The optimizer's state does not fit the model at {wrong!r}.")
    for key, value in tensors.items():
        name, _, quantity = key.rpartition(".")
        parameter = parameters[name]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).detach().copy_(value)
        else:  # steps, which are counted on the device
            value = value.to(parameter.device)
        optimizer.state[parameter][quantity] = value
