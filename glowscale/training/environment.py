"""Where a run is made: versions and machine, to be read beside its figures."""

import platform
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator

import glowscale


def describe_environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, device and processes, as plain values."""
    device = accelerator.device
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": f"{device.type} ({named})",
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "precision": accelerator.mixed_precision,
        "python": platform.python_version(),
        "glowscale": glowscale.__version__,
        **{name: version(name) for name in ("torch", "accelerate", "torchdiffeq", "safetensors")},
        "system": f"{platform.system()} {platform.release()}",
    }


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
