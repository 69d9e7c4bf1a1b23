"""Training: the loop, the masked update, the optimizer, averaged weights and the run folder."""

from glowscale.training.trainer import Trainer
from glowscale.training.update import NonFiniteError

__all__ = ["NonFiniteError", "Trainer"]
