"""Pictures of a run: grids of images, and the course of bits/dim."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glowscale.data.images import encode_png
from glowscale.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAP_SHADE = 64
"""Dark grey, which is told from black and from white images."""
GRID_SIDE = 512
"""Small images are magnified until a grid is about so many pixels wide."""


def save_grid(images: Tensor, grey_levels: int, path: Path, columns: int | None = None) -> None:
    """Save uint8 images (B, C, H, W) as a PNG grid, the brightest level white.

    It is near-square unless the number of columns is given.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    factor = max(1, GRID_SIDE // (columns * images.shape[-1]))
    scaled = (images[:, :3].float() * (255 / (grey_levels - 1))).round().to(torch.uint8)
    large = scaled.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    write_atomically(path, encode_png(_arrange(large, columns, factor).numpy()))


def _arrange(images: Tensor, columns: int, gap: int) -> Tensor:
    """Lay uint8 images (B, C, H, W) out as one (3, rows, columns), with gaps between them."""
    _, _, height, width = images.shape
    rows = math.ceil(len(images) / columns)
    size = (3, rows * (height + gap) + gap, columns * (width + gap) + gap)
    grid = torch.full(size, GAP_SHADE, dtype=torch.uint8)
    for index, image in enumerate(images):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    return grid


def save_curves(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw over the images seen bits/dim, and what solving took where equations are solved."""
    from matplotlib.figure import Figure  # slow to import, and only one process draws

    solves = any("forward_evaluations" in m for m in metrics)
    figure = Figure(figsize=(7, 6 if solves else 4), layout="constrained")
    if solves:
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(2, 1))
        _draw_evaluations(lower, metrics)
    else:
        upper = lower = figure.subplots()
    _draw_bits(upper, metrics)
    lower.set_xlabel("images seen")
    save_figure(figure, path)


def save_figure(figure: "Figure", path: Path) -> None:
    """Save a figure as a PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    write_atomically(path, buffer.getvalue())


def _draw_bits(axes: "Axes", metrics: Sequence[dict[str, Any]]) -> None:
    """Bits/dim in training and on held-out images."""
    series = {
        "training": ("train", "-", 1.2),
        "held out (averaged weights)": ("held_out", "o-", 2),
    }
    lowest = math.inf
    for label, (kind, style, width) in series.items():
        points = [(m["images"], m["bits_per_dim"]) for m in metrics if m["kind"] == kind]
        points = [(images, bits) for images, bits in points if bits is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=width)
            lowest = min(lowest, *(bits for _, bits in points))
    known = [m["bits_per_dim"] for m in metrics if m.get("bits_per_dim") is not None]
    settled = known[len(known) // 10 :]
    if settled:  # the first steps would squash the rest
        axes.set_ylim(lowest - 0.1, max(settled) + 0.1)
    axes.set_ylabel("bits/dim")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_evaluations(axes: "Axes", metrics: Sequence[dict[str, Any]]) -> None:
    """How often an update evaluated the velocities."""
    for way, style in (("forward", "-"), ("backward", "--")):  # they are often equal
        key = f"{way}_evaluations"
        points = [(m["images"], m[key]) for m in metrics if key in m]
        axes.plot(*zip(*points, strict=True), style, label=way, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("evaluations (NFE)")
    axes.grid(alpha=0.3)
    axes.legend()
