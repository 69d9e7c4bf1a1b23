"""An exponential moving average of a model's weights, with its horizon in images."""

import copy
import math

import torch
from torch import Tensor

from glowscale.models import MultiscaleFlow


class EMA:
    """Keeps a copy of a model whose weights are an average over its recent past.

    Args:
        model: what is averaged; the copy starts equal to it, initialized ActNorms included.
        images: over so many images the average forgets e-fold; whatever the batch.
    """

    def __init__(self, model: MultiscaleFlow, images: int) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.images = images
        self._averages: list[Tensor] = list(self.model.parameters())
        self._weights: list[Tensor] = list(model.parameters())

    @torch.no_grad()
    def update(self, batch: int, seen: int) -> None:
        """Take in the weights after an update on `batch` images; `seen` counts them all.

        Early on the average covers a tenth of the past, so the first weights do not linger.
        """
        horizon = min(self.images, max(batch, seen / 10))
        torch._foreach_lerp_(self._averages, self._weights, 1 - math.exp(-batch / horizon))
