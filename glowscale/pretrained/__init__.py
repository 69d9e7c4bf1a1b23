"""Trained models to share: loading, saving, the model card, and uint8 in and out."""

from glowscale.pretrained.description import PretrainedError
from glowscale.pretrained.facade import UInt8Flow
from glowscale.pretrained.model import ImageModel, load

__all__ = ["ImageModel", "PretrainedError", "UInt8Flow", "load"]
