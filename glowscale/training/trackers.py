"""Experiment trackers, through Accelerate: TensorBoard and what else it knows."""

from typing import Any

import numpy as np
from accelerate import Accelerator

from glowscale.config import Config

PROJECT = "glowscale"


def start_trackers(accelerator: Accelerator, config: Config, images: int) -> None:
    """Begin or continue the run in the trackers that the config names.

    Args:
        accelerator: started with these trackers.
        config: of the run; every key becomes a hyper-parameter.
        images: where the run stands. What TensorBoard has from later, a kill has undone.
    """
    if accelerator.log_with:
        plain = _flatten(config.model_dump(mode="json"))
        options = {"tensorboard": {"purge_step": images + 1}} if images else {}
        accelerator.init_trackers(PROJECT, config=plain, init_kwargs=options)


def log_picture(accelerator: Accelerator, name: str, picture: np.ndarray, images: int) -> None:
    """Show a picture, uint8 (H, W, 3), in those trackers that have pictures."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: picture[None]}, step=images, **layout)


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys; what is no number or truth value becomes text."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (bool, int, float)) else str(value)
    return flat
