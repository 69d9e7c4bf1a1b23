"""Training: the loop, the optimizer, averaged weights, checkpoints and the run folder."""

from glowscale.training.checkpoint import CheckpointError, find_checkpoint, load_model
from glowscale.training.trainer import RoundTripError, Trainer
from glowscale.training.update import NonFiniteError

__all__ = [
    "CheckpointError",
    "NonFiniteError",
    "RoundTripError",
    "Trainer",
    "find_checkpoint",
    "load_model",
]
