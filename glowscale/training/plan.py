"""What a run would take, told before it starts: parameters, memory, steps, legal processes."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        averages and optimizer), `activation_bytes_per_image` (held in a pass, in float32),
        `memory_bytes` (of one process where a single one runs), and `checkpoint_bytes` (on disk,
        and again in the main process's host memory).
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
        activations = activation_bytes(model.to(memory_format=torch.channels_last))
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
    """Bytes that a pass of one image, there and back, holds at once at most.

    Weights and their gradients do not count, nor what a convolution needs for itself.
    """
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(drop_gradient)  # type: ignore[no-untyped-call]
    images = torch.zeros(1, *model.image_shape, dtype=torch.uint8, device=model.device)
    labels = torch.zeros(1, dtype=torch.int64, device=model.device)
    with _Held(model.parameters()) as held:
        output = model(images, labels)
        (output.log_prob.sum() + sum(x.sum() for x in output.penalties.values())).backward()
    return held.most


def drop_gradient(parameter: Tensor) -> None:
    """Forget a gradient, which is a cost of parameters and not of activations."""
    parameter.grad = None


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made within it, while they are held.

    Args:
        known: tensors that do not count, nor views of them.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.most = 0
        self._known: dict[int, object] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = storage

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operation, and count what is new in its result."""
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self.now += size
        self.most = max(self.most, self.now)
        self._known[key] = weakref.ref(storage, lambda _: self._free(key, size))

    def _free(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


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
