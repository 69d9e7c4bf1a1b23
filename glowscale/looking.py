"""What a model's latents hold, as rows of images to look at, denoised as samples are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from glowscale.models import MultiscaleFlow
from glowscale.sampling import draw_continuous


@torch.inference_mode()
def interpolate(
    model: MultiscaleFlow, ends: tuple[Tensor, Tensor], labels: Tensor, steps: int
) -> Tensor:
    """Images between pairs of images, along great circles of their latents.

    Gaussian latents of many dimensions lie near a sphere; a straight line would leave it.

    Args:
        model: in evaluation mode.
        ends: first and last images of the rows, uint8 (B, C, H, W) each.
        labels: classes (B,), of both ends; models without classes ignore them.
        steps: images a row, with both ends.

    Returns:
        Images, uint8 (B · steps, C, H, W), row by row.
    """
    device = model.device
    labels = labels.to(device)
    first, last = (model.encode(_centred(x, model), labels)[0] for x in ends)
    columns = []
    for part in torch.linspace(0, 1, steps).tolist():
        between = [_along_circle(a, b, part) for a, b in zip(first, last, strict=True)]
        columns.append(_images(model, between, labels))
    return torch.stack(columns, 1).flatten(0, 1)


@torch.inference_mode()
def resample_levels(
    model: MultiscaleFlow, images: Tensor, labels: Tensor, seed: int, temperature: float = 1.0
) -> Tensor:
    """Each image, then with the latents of its finest level drawn anew, of its finest two, ...

    What stays in a column is what the coarser levels hold; the last column keeps nothing.

    Args:
        model: in evaluation mode.
        images: uint8 (B, C, H, W).
        labels: classes (B,); models without classes ignore them.
        seed: of the new latents, by row.
        temperature: their scale.

    Returns:
        Images, uint8 (B · (levels + 1), C, H, W), row by row.
    """
    labels = labels.to(model.device)
    latents, _ = model.encode(_centred(images, model), labels)
    drawn = model.draw_latents(seed, range(len(images)), temperature)
    columns = [
        _images(model, [*drawn[:anew], *latents[anew:]], labels)
        for anew in range(len(latents) + 1)
    ]
    return torch.stack(columns, 1).flatten(0, 1)


@torch.inference_mode()
def sweep_temperatures(
    model: MultiscaleFlow, temperatures: Sequence[float], seed: int, count: int
) -> Tensor:
    """The same latents at several scales.

    Args:
        model: in evaluation mode.
        temperatures: one a row.
        seed: of the latents.
        count: images a row.

    Returns:
        Images, uint8 (temperatures · count, C, H, W), row by row.
    """
    rows = [
        model.denoise(*draw_continuous(model, seed, range(count), temperature))
        for temperature in temperatures
    ]
    return torch.cat([model.quantize(row.nan_to_num()).cpu() for row in rows])


def _centred(images: Tensor, model: MultiscaleFlow) -> Tensor:
    """Pixels as continuous images in the middle of their grey levels."""
    return images.to(model.device, model.dtype) + 0.5


def _images(model: MultiscaleFlow, latents: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Images uint8 of latents, on the CPU."""
    return model.quantize(model.denoise(model.decode(latents, labels), labels)).cpu()


def _along_circle(a: Tensor, b: Tensor, part: float) -> Tensor:
    """Latents (B, ...) a part of the way from a to b, on great circles."""
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = torch.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    angle = cosine.acos().clamp(min=1e-4, max=torch.pi - 1e-4)
    weights = torch.stack([((1 - part) * angle).sin(), (part * angle).sin()]) / angle.sin()
    return (weights[0][:, None] * flat_a + weights[1][:, None] * flat_b).view_as(a)
