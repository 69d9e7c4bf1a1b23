"""Flips and crops: a function of (seed, epoch, id), of training images alone."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from glowscale.config import parse_config
from glowscale.data import Augmentation, ShardSet, training_stream
from glowscale.training import Trainer

IMAGE = torch.arange(3 * 6 * 6, dtype=torch.uint8).view(3, 6, 6)


def test_a_flip_mirrors_half_of_the_images() -> None:
    images = [Augmentation(flip=True)(IMAGE, 0, 0, i) for i in range(1000)]
    assert all(torch.equal(x, IMAGE) or torch.equal(x, IMAGE.flip(2)) for x in images)
    kept = sum(torch.equal(x, IMAGE) for x in images)
    assert 440 < kept < 560


def test_a_crop_is_a_window_of_the_image_with_its_edges_repeated() -> None:
    padded = torch.nn.functional.pad(IMAGE[None].float(), (2, 2, 2, 2), "replicate")[0].byte()
    windows = {
        (y, x): padded[:, y : y + 6, x : x + 6].contiguous() for y in range(5) for x in range(5)
    }
    counts: Counter[tuple[int, int]] = Counter()
    for i in range(1000):
        image = Augmentation(crop=2)(IMAGE, 0, 0, i)
        found = [place for place, window in windows.items() if torch.equal(window, image)]
        assert len(found) == 1
        counts.update(found)
    assert len(counts) == 25
    assert max(counts.values()) < 80  # 40 each


def test_every_seed_epoch_and_image_is_drawn_for_itself() -> None:
    augmentation = Augmentation(flip=True, crop=2)

    def course(name: str) -> list[bytes]:
        keys = [{"seed": 0, "epoch": 0, "identity": 0, name: i} for i in range(1, 40)]
        return [augmentation(IMAGE, **key).numpy().tobytes() for key in keys]

    for name in ("seed", "epoch", "identity"):
        assert course(name) == course(name)
        assert len(set(course(name))) > 15  # of 50 that there are


def images_by_row(shards: ShardSet, **arguments: Any) -> dict[tuple[int, int], Tensor]:  # noqa: ANN401
    options = {"seed": 1, "lanes": 4, "batch": 16, "shuffle_block": 10, **arguments}
    stream = training_stream(shards, **options)
    found = {}
    for _ in range(20):
        batch = next(stream).batch
        rows = zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True)
        found |= dict(zip(rows, batch.images, strict=True))
    return found


def test_the_streams_augmentation_does_not_depend_on_workers_or_the_cursor(
    data_dir: Path,
) -> None:
    shards = ShardSet(data_dir / "train")
    augmentation = Augmentation(flip=True, crop=1)
    plain = images_by_row(shards)
    whole = images_by_row(shards, augmentation=augmentation)
    resumed = images_by_row(shards, augmentation=augmentation, cursor=48, workers=2)
    assert len(plain.keys() & whole.keys() & resumed.keys()) > 200
    for row in whole.keys() & resumed.keys():
        assert torch.equal(whole[row], resumed[row])
    assert sum(not torch.equal(plain[row], whole[row]) for row in plain) > len(plain) / 2


def test_training_images_are_augmented_and_held_out_ones_are_not(
    config_dict: dict[str, Any], tmp_path: Path
) -> None:
    config_dict["train"]["images"] = 16
    trainers = []
    for name, augment in (("plain", {}), ("augmented", {"flip": True, "crop": 2})):
        config_dict["run"]["dir"] = str(tmp_path / name)
        config_dict["data"]["augment"] = augment
        trainers.append(Trainer(parse_config(config_dict), Accelerator(cpu=True)))
    plain, augmented = (trainer.state.ema.model for trainer in trainers)
    bias = "levels.0.bijections.1.bijections.0.bias"  # ActNorm saw the augmented images
    assert not torch.equal(plain.state_dict()[bias], augmented.state_dict()[bias])
    augmented.load_state_dict(plain.state_dict())
    assert trainers[0].reports.evaluate() == trainers[1].reports.evaluate()
    with pytest.raises(ValueError, match=r"'data\.augment\.crop' is -1"):
        parse_config({**config_dict, "data": {**config_dict["data"], "augment": {"crop": -1}}})
