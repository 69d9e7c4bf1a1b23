"""Pictures of latents: their ends are the images themselves, and levels hold what they hold."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from glowscale.dequantization import NoiseAugmentation
from glowscale.looking import interpolate, resample_levels, sweep_temperatures
from glowscale.models import MultiscaleFlow
from glowscale.sampling import sample_images
from tests.conftest import Caller, tiny_glow


@pytest.fixture
def model() -> MultiscaleFlow:
    return tiny_glow((1, 8, 8), 16, levels=3).eval()


def test_rows_begin_and_end_with_their_images(model: MultiscaleFlow) -> None:
    first, last = torch.randint(0, 16, (2, 3, 1, 8, 8), dtype=torch.uint8)
    labels = torch.full((3,), -1)
    rows = interpolate(model, (first, last), labels, steps=5).view(3, 5, 1, 8, 8)
    assert torch.equal(rows[:, 0], first)
    assert torch.equal(rows[:, -1], last)
    assert not torch.equal(rows[:, 2], first)
    same = interpolate(model, (first, first), labels, steps=3).view(3, 3, 1, 8, 8)
    assert torch.equal(same[:, 1], first)


def test_latents_between_stay_on_their_sphere(model: MultiscaleFlow) -> None:
    first, last = torch.randint(0, 16, (2, 1, 1, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([-1])
    with torch.no_grad():
        ends = [model.encode(x + 0.5, labels)[0] for x in (first, last)]
    seen: list[list[torch.Tensor]] = []
    decode = model.decode
    model.decode = lambda z, y=None: seen.append(list(z)) or decode(z, y)  # type: ignore[method-assign, assignment, func-returns-value, misc]
    interpolate(model, (first, last), labels, steps=7)
    for level, (a, b) in enumerate(zip(*ends, strict=True)):
        norms = [float(z[level].norm()) for z in seen]
        assert min(norms) > 0.7 * min(float(a.norm()), float(b.norm()))
        assert max(norms) <= 1.3 * max(float(a.norm()), float(b.norm()))


def test_the_first_column_keeps_all_and_the_last_nothing(model: MultiscaleFlow) -> None:
    images = torch.randint(0, 16, (4, 1, 8, 8), dtype=torch.uint8)
    labels = torch.full((4,), -1)
    columns = resample_levels(model, images, labels, seed=3).view(4, 4, 1, 8, 8)
    assert torch.equal(columns[:, 0], images)
    assert torch.equal(columns[:, -1], sample_images(model, 3, range(4)))
    other = resample_levels(model, images.flip(0), labels, seed=3).view(4, 4, 1, 8, 8)
    assert torch.equal(other[:, -1], columns[:, -1])
    assert not torch.equal(other[:, 1], columns[:, 1])


def test_temperatures_are_the_same_latents_at_other_scales(model: MultiscaleFlow) -> None:
    images = sweep_temperatures(model, (0.0, 0.7), seed=1, count=4).view(2, 4, 1, 8, 8)
    assert bool((images[0] == images[0, :1]).all())
    assert torch.equal(images[1], sample_images(model, 1, range(4), 0.7))


def test_pictures_of_a_model_of_noisy_images_are_denoised(model: MultiscaleFlow) -> None:
    model.dequantizer = NoiseAugmentation(std=1.5)
    images = torch.randint(0, 16, (4, 1, 8, 8), dtype=torch.uint8)
    labels = torch.full((4,), -1)
    drawn = sample_images(model, 3, range(4))
    columns = resample_levels(model, images, labels, seed=3).view(4, 4, 1, 8, 8)
    assert torch.equal(columns[:, -1], drawn)
    assert torch.equal(sweep_temperatures(model, (1.0,), seed=3, count=4), drawn)
    rows = interpolate(model, (images, images), labels, steps=2).view(4, 2, 1, 8, 8)
    denoised = model.quantize(model.denoise(images + 0.5, labels))
    assert torch.equal(rows[:, 0], denoised)
    assert not torch.equal(denoised, images)


def test_the_job_draws_three_grids(
    config_dict: dict[str, Any], tmp_path: Path, call_job: Caller
) -> None:
    config_dict["train"]["images"] = 16
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    assert call_job("train.py", tmp_path / "c.yaml")[0] == 0
    code, _, err = call_job("look.py", tmp_path / "run", "--out", tmp_path / "look", "--rows", 4)
    assert code == 0, err
    for name in ("between", "levels", "temperatures"):
        assert min(Image.open(tmp_path / "look" / f"{name}.png").size) > 100
    code, _, err = call_job("look.py", tmp_path / "run", "--out", tmp_path, "--rows", 40)
    assert code == 1
    assert "has only 18 pairs of images, not 40" in err
