"""Generating images: image i is a function of (checkpoint, seed, i, temperature) alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from glowscale.bijections import Guidance, Jacobi, keeping_inverses
from glowscale.bijections.autoregressive import (
    Autoregressive,
    guiding,
    sampled_in_steps,
    solving_inverses,
)
from glowscale.data.sources import Sample
from glowscale.data.writer import Encoded, encode, write_shard
from glowscale.errors import UserError
from glowscale.files import claim_folder
from glowscale.models import MultiscaleFlow
from glowscale.pictures import save_grid

JOB = "job.json"
BLOCK = 50
"""Images that are computed together."""


class NonFiniteSampleError(UserError):
    """Samples of a model that blew up."""


@torch.inference_mode()
def sample_images(
    model: MultiscaleFlow,
    seed: int,
    indices: range,
    temperature: float = 1.0,
    label: int | None = None,
) -> Tensor:
    """The images with these indices, uint8 (B, C, H, W), on the CPU.

    Args:
        model: what to sample from.
        seed: with an image's index, it determines the image's noise.
        indices: which images.
        temperature: scale of the latents.
        label: class of a conditional model's images; if not given, they take turns by index.

    Raises:
        NonFiniteSampleError: if the model blew up, which would else pass for black pixels.
    """
    images = model.denoise(*draw_continuous(model, seed, indices, temperature, label))
    return _pixels(model, images, seed, indices, temperature)


def _pixels(
    model: MultiscaleFlow, images: Tensor, seed: int, indices: range, temperature: float
) -> Tensor:
    """Pixels of continuous images; raises NonFiniteSampleError."""
    finite = images.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        raise NonFiniteSampleError(
            f"Sample {indices[finite.index(False)]} of seed {seed} is not finite; lower the "
            f"temperature from {temperature}, or train longer."
        )
    return model.quantize(images).cpu()


def draw_continuous(
    model: MultiscaleFlow,
    seed: int,
    indices: range,
    temperature: float = 1.0,
    label: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `sample_images`, before pixels are made of them; also the images' labels (B,)."""
    labels = torch.tensor(labels_of(model, indices, label), device=model.device)
    return model.decode(model.draw_latents(seed, indices, temperature), labels), labels


@contextmanager
def inverting(
    model: MultiscaleFlow, guidance: Guidance | None = None, solver: Jacobi | None = None
) -> Iterator[None]:
    """Within it a model's autoregressive flows are guided, and solved in parallel passes.

    Raises:
        UserError: where there are none that are sampled in steps, or nothing to be guided by.
    """
    flows = sampled_in_steps(model)
    if (guidance or solver) and not flows:
        raise UserError(
            "Guidance and parallel passes are for autoregressive flows that are sampled in steps; "
            "this model has none."
        )
    if guidance:
        refuse_unguided(model, flows, guidance.temperature)
    with guiding(model, guidance), solving_inverses(model, solver):
        yield


def refuse_unguided(
    model: MultiscaleFlow, flows: Sequence[Autoregressive], temperature: float
) -> None:
    """Raise UserError where a guided network would say nothing else, or nothing it has learned."""
    if model.classes and not model.class_dropout:
        raise UserError(
            "Guidance needs a model that knows images of no class too, but this one was trained "
            "with model.class_dropout=0."
        )
    if temperature == 1 and not model.classes:
        raise UserError("Guidance of a model without classes needs a temperature other than 1.")
    if temperature != 1 and any(not flow.network.has_attention for flow in flows):
        raise UserError("A temperature of guidance is for attention; this model has convolutions.")


def labels_of(model: MultiscaleFlow, indices: range, label: int | None) -> list[int]:
    """The class of each image: the one given, or in turn; -1 of a model without classes."""
    if not model.classes:
        return [-1] * len(indices)
    return [index % model.classes if label is None else label for index in indices]


def sample_blocks(
    model: MultiscaleFlow,
    seed: int,
    indices: range,
    temperature: float,
    block: int,
    label: int | None = None,
) -> Tensor:
    """As `sample_images`, in blocks whose bounds are multiples of `block` whatever is asked for.

    A convolution's last bits may depend on its batch, so every block is computed whole.
    """
    first, last = indices.start // block, -(-indices.stop // block)
    parts = []
    for start in range(first * block, last * block, block):
        whole = range(start, start + block)
        images = model.denoise(*draw_continuous(model, seed, whole, temperature, label))
        asked = range(max(start, indices.start), min(start + block, indices.stop))
        part = images[asked.start - start : asked.stop - start]
        parts.append(_pixels(model, part, seed, asked, temperature))
    return torch.cat(parts)


def generate(
    model: MultiscaleFlow,
    out: Path,
    *,
    count: int,
    seed: int,
    temperature: float,
    identity: dict[str, Any],
    label: int | None = None,
    classes: Sequence[str] = (),
    shard_size: int = 1000,
    block: int = BLOCK,
    part: int = 0,
    parts: int = 1,
    quiet: bool = False,
) -> list[Path]:
    """Write `count` images as shards of PNGs; only the shards that are missing are made.

    Args:
        model: what to sample from.
        out: folder of the shards `shard-000000.tar ...`; parts take them in turn.
        count: number of images.
        seed: with an image's index, it determines the image's noise.
        temperature: scale of the latents.
        identity: what else the images depend on; a folder of another job is refused.
        label: class of a conditional model's images; if not given, they take turns by index.
        classes: names of the classes, which the images are noted with.
        shard_size: images a shard.
        block: images that are computed together.
        part: which of the parts to make, from 0 on.
        parts: into how many the work is divided, over processes and jobs.
        quiet: show no progress bar.

    Returns:
        The paths of all shards, those of the other parts too, in order.

    Raises:
        ClaimError: if `out` holds another job's images.
    """
    job = {
        **identity,
        "count": count,
        "seed": seed,
        "temperature": temperature,
        "label": label,
        "shard_size": shard_size,
        "block": block,
    }
    claim_folder(out, JOB, job)
    shards = list(_shard_ranges(out, count, shard_size))
    own = shards[part::parts]
    missing = [(path, indices) for path, indices in own if not path.exists()]
    left = sum(len(indices) for _, indices in missing)
    total = sum(len(indices) for _, indices in own)
    made_by = {"seed": seed, "temperature": temperature}
    bar = tqdm(total=total, initial=total - left, desc="sampling", unit="img", disable=quiet)
    with bar as progress, ThreadPoolExecutor(1, "shards") as writer, keeping_inverses(model):
        writing: Future[None] | None = None
        for path, indices in missing:
            images = sample_blocks(model, seed, indices, temperature, block, label).numpy()
            labels = labels_of(model, indices, label)
            if writing:  # one shard at a time, while the next is sampled
                writing.result()
            writing = writer.submit(_write, path, indices, images, labels, classes, made_by)
            progress.update(len(indices))
        if writing:
            writing.result()
    return [path for path, _ in shards]


def _write(
    path: Path,
    indices: range,
    images: np.ndarray,
    labels: list[int],
    classes: Sequence[str],
    made_by: Mapping[str, Any],
) -> None:
    """Encode and write a shard of images, each with a note of what made it."""

    def encoded() -> Iterator[Encoded]:
        for index, image, label in zip(indices, images, labels, strict=True):
            sample = encode(Sample(f"{index:09d}", image, label if label >= 0 else None))
            name = classes[label] if 0 <= label < len(classes) else None
            note = {"index": index, **made_by, "class": name}
            yield sample._replace(notes=json.dumps(note).encode())

    write_shard(path, encoded())


def save_preview(
    model: MultiscaleFlow,
    path: Path,
    count: int,
    seed: int,
    temperature: float,
    label: int | None = None,
    block: int = BLOCK,
) -> None:
    """Save a grid of the first `count` images of a job."""
    images = sample_blocks(model, seed, range(count), temperature, block, label)
    save_grid(images, model.grey_levels, path)


def _shard_ranges(out: Path, count: int, shard_size: int) -> Iterator[tuple[Path, range]]:
    for number, start in enumerate(range(0, count, shard_size)):
        yield out / f"shard-{number:06d}.tar", range(start, min(start + shard_size, count))
