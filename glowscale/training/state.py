"""The state of a training: everything that updates change, and so all that a checkpoint holds."""

from typing import Any

import torch
from torch import Tensor

from glowscale.checkpoint import Checkpoint, load_tensors
from glowscale.models import MultiscaleFlow
from glowscale.training.ema import EMA
from glowscale.training.optimizer import load_optimizer_tensors, optimizer_tensors


class TrainingState:
    """Weights, averaged weights, optimizer, the cursor, and the metrics' open window.

    The learning rate and all randomness are functions of the cursor, so they need no state.

    Args:
        model: on its device, its ActNorms initialized; the averages begin as its copy.
        optimizer: of the model's parameters.
        ema_images: horizon of the averages, see `EMA`.
    """

    def __init__(
        self, model: MultiscaleFlow, optimizer: torch.optim.Optimizer, ema_images: int
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.ema = EMA(model, ema_images)
        self.images = 0
        """Images of the stream that have been trained on: its cursor."""
        self.window = torch.zeros(3, dtype=torch.float64, device=model.device)
        """Since the last line of metrics: bits/dim, images, masked updates."""
        self.masked_in_a_row = 0
        """Updates in a row, up to the last, that were not finite."""
        self.stiff_in_a_row = 0
        """Updates in a row, up to the last, in which solves passed their limits."""
        self.due: list[str] = []
        """What is still to be looked at after so many images, if a stop came before."""
        self.lost_shards: list[str] = []
        """Names of the shards of which something could not be read, in order."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where a checkpoint stands; raises CheckpointError if it does not fit."""
        path, tensors = checkpoint.path, checkpoint.tensors
        load_tensors(self.model, tensors["model"], path / "model.safetensors")
        load_tensors(self.ema.model, tensors["ema"], path / "ema.safetensors")
        load_optimizer_tensors(self.optimizer, self.model, tensors["optimizer"])
        self.images = checkpoint.state["images"]
        self.masked_in_a_row = checkpoint.state.get("masked_in_a_row", 0)
        self.stiff_in_a_row = checkpoint.state.get("stiff_in_a_row", 0)
        self.due = checkpoint.state.get("due", [])
        self.lost_shards = checkpoint.state.get("lost_shards", [])
        self.window.copy_(torch.tensor(checkpoint.state["window"], dtype=torch.float64))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint, by part."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.model),
        }

    def counters(self) -> dict[str, Any]:
        """The numbers of a checkpoint."""
        return {
            "images": self.images,
            "window": self.window.tolist(),
            "masked_in_a_row": self.masked_in_a_row,
            "stiff_in_a_row": self.stiff_in_a_row,
            "due": list(self.due),
            "lost_shards": list(self.lost_shards),
        }

    def non_finite_tensor(self) -> str | None:
        """Name of a tensor of a checkpoint that is not finite, None if all are."""
        for part, tensors in self.tensors().items():
            floating = {key: x for key, x in tensors.items() if x.is_floating_point()}
            if not bool(torch.nn.utils.get_total_norm(list(floating.values())).isfinite()):
                for key, x in floating.items():  # the norm of finite values may overflow
                    if not bool(x.isfinite().all()):
                        return f"{part}/{key}"
        return None
