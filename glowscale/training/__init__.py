"""Training: the loop, the optimizer, averaged weights, checkpoints and the run folder."""

from glowscale.training.checkpoint import CheckpointError, find_checkpoint, load_model
from glowscale.training.trainer import NonFiniteError, Trainer

__all__ = ["CheckpointError", "NonFiniteError", "Trainer", "find_checkpoint", "load_model"]
