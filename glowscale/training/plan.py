"""What a run would take, told before it starts: parameters, memory, steps, legal processes."""

from typing import Any

import torch
from torch import Tensor

from glowscale.config import Config, ConfigError
from glowscale.data.stream import Lanes
from glowscale.models import MultiscaleFlow, build_model

COPIES = 5
"""Of the weights: themselves, gradients, averages, and the optimizer's two quantities."""
SAVED = 4
"""Of them, in a checkpoint: all but the gradients."""


def plan(
    config: Config,
    image_shape: tuple[int, int, int],
    grey_levels: int,
    classes: int,
    samples: int,
) -> dict[str, Any]:
    """What the run of a config would take on a data set.

    Args:
        config: the run.
        image_shape: (C, H, W).
        grey_levels: number of values that a pixel takes.
        classes: number of classes.
        samples: training images of an epoch.

    Returns:
        `parameters`, `steps`, `epochs`, `legal_processes`, `weights_bytes` (weights, gradients,
        averages and optimizer), `activation_bytes_per_image` (kept for the backward pass, in
        float32), `memory_bytes` (of one process where a single one runs), and `checkpoint_bytes`
        (on disk, and again in the main process's host memory).
    """
    with torch.device("meta"):  # shapes without memory, so any model can be planned anywhere
        try:
            model = build_model(
                config.model.model_dump(),
                image_shape,
                grey_levels,
                classes,
                config.train.activations,
            )
        except ValueError as error:
            raise ConfigError(f"The model does not fit the data: {error}") from None
        activations = activation_bytes(model)
    parameters = sum(p.numel() for p in model.parameters())
    weights = COPIES * 4 * parameters
    settings = config.train
    held = min(settings.micro_batch or settings.batch, settings.batch)
    steps = -(-settings.images // settings.batch)
    return {
        "parameters": parameters,
        "steps": steps,
        "epochs": round(steps * settings.batch / samples, 2),
        "legal_processes": Lanes(samples, config.data.lanes).legal_processes(),
        "weights_bytes": weights,
        "activation_bytes_per_image": activations,
        "memory_bytes": weights + held * activations,
        "checkpoint_bytes": SAVED * 4 * parameters,
    }


def activation_bytes(model: MultiscaleFlow) -> int:
    """Bytes that the forward pass of one image keeps for the backward pass; weights apart."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # by storage; the tensors too, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    images = torch.zeros(1, *model.image_shape, dtype=torch.uint8, device=model.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images, torch.zeros(1, dtype=torch.int64, device=model.device))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def describe_plan(facts: dict[str, Any]) -> str:
    """The facts of a plan for people, one a line."""
    memory = facts["memory_bytes"] / 2**30
    activations = facts["activation_bytes_per_image"] / 2**20
    return "\n".join(
        [
            f"parameters: {facts['parameters']:,}",
            f"steps: {facts['steps']:,} ({facts['epochs']:,} epochs)",
            f"memory of a single process: about {memory:.2f} GiB ({activations:.1f} MiB of "
            f"activations an image, in float32)",
            f"a checkpoint: about {facts['checkpoint_bytes'] / 2**20:,.1f} MiB on disk, and a "
            f"copy in host memory from which it is written",
            f"legal process counts: {', '.join(map(str, facts['legal_processes']))}",
        ]
    )
