"""The processes of a job: starting them through Accelerate, and sums over them."""

import os
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from glowscale.errors import UserError

Precision = Literal["float32", "bf16", "float64"]


class LaunchError(UserError):
    """Processes that were not started as the launcher meant it."""


def start_accelerator(precision: Precision = "float32") -> Accelerator:
    """Join the job's processes; without a launcher, a job of one.

    Raises:
        LaunchError: if Accelerate counts other processes than the launcher started.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="bf16" if precision == "bf16" else "no",
        )
    except ValueError as error:  # Accelerate's own complaint about the launcher's variables
        raise LaunchError(
            f"The launcher says WORLD_SIZE={launched}, but its processes cannot join: {error}."
        ) from None
    if accelerator.num_processes != launched:
        raise LaunchError(
            f"The launcher started {launched} processes (WORLD_SIZE), but Accelerate joined "
            f"{accelerator.num_processes}; launch with a config file of configs/accelerate/."
        )
    return accelerator


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on each of them; all must call it."""
    if dist.is_available() and dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor
