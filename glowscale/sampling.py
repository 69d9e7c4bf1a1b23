"""Generating images: image i is a function of (checkpoint, seed, i, temperature) alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from glowscale.data.sources import Sample
from glowscale.data.writer import write_shard
from glowscale.errors import UserError
from glowscale.files import claim_folder
from glowscale.models import MultiscaleFlow
from glowscale.pictures import save_grid

JOB = "job.json"


@torch.inference_mode()
def sample_images(
    model: MultiscaleFlow, seed: int, indices: range, temperature: float = 1.0
) -> Tensor:
    """The images with these indices, uint8 (B, C, H, W), on the CPU.

    Raises:
        UserError: if the model blew up, which would else pass for black pixels.
    """
    images = model.decode(model.draw_latents(seed, indices, temperature))
    finite = images.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        raise UserError(
            f"Sample {indices[finite.index(False)]} of seed {seed} is not finite; lower the "
            f"temperature from {temperature}, or train longer."
        )
    return model.quantize(images).cpu()


def sample_blocks(
    model: MultiscaleFlow, seed: int, indices: range, temperature: float, block: int
) -> Tensor:
    """As `sample_images`, in blocks whose bounds are multiples of `block` whatever is asked for.

    A convolution's last bits may depend on its batch, so every block is computed whole.
    """
    first, last = indices.start // block, -(-indices.stop // block)
    blocks = [
        sample_images(model, seed, range(b * block, (b + 1) * block), temperature)
        for b in range(first, last)
    ]
    offset = indices.start - first * block
    return torch.cat(blocks)[offset : offset + len(indices)]


def generate(
    model: MultiscaleFlow,
    out: Path,
    *,
    count: int,
    seed: int,
    temperature: float,
    identity: dict[str, Any],
    shard_size: int = 1000,
    block: int = 50,
    rank: int = 0,
    world_size: int = 1,
) -> list[Path]:
    """Write `count` images as shards of PNGs; only the shards that are missing are made.

    Args:
        model: what to sample from.
        out: folder of the shards `shard-000000.tar ...`; ranks take them in turn.
        count: number of images.
        seed: with an image's index, it determines the image's noise.
        temperature: scale of the latents.
        identity: what else the images depend on; a folder of another job is refused.
        shard_size: images a shard.
        block: images that are computed together.
        rank: this process.
        world_size: number of processes.

    Returns:
        The paths of all shards, in order.

    Raises:
        ClaimError: if `out` holds another job's images.
    """
    job = {
        **identity,
        "count": count,
        "seed": seed,
        "temperature": temperature,
        "shard_size": shard_size,
        "block": block,
    }
    claim_folder(out, JOB, job)
    shards = list(_shard_ranges(out, count, shard_size))
    missing = [(path, indices) for path, indices in shards if not path.exists()]
    with tqdm(total=count, desc="sampling", unit="img", disable=rank > 0) as progress:
        progress.update(count - sum(len(indices) for _, indices in missing))
        for path, indices in shards[rank::world_size]:
            if path.exists():
                continue
            images = sample_blocks(model, seed, indices, temperature, block).numpy()
            rows = zip(indices, images, strict=True)
            write_shard(path, [Sample(f"{i:09d}", image, None) for i, image in rows])
            progress.update(len(indices))
    return [path for path, _ in shards]


def save_preview(
    model: MultiscaleFlow, path: Path, count: int, seed: int, temperature: float, block: int = 50
) -> None:
    """Save a grid of the first `count` images of a job."""
    images = sample_blocks(model, seed, range(count), temperature, block)
    save_grid(images, model.grey_levels, path)


def _shard_ranges(out: Path, count: int, shard_size: int) -> Iterator[tuple[Path, range]]:
    for number, start in enumerate(range(0, count, shard_size)):
        yield out / f"shard-{number:06d}.tar", range(start, min(start + shard_size, count))
