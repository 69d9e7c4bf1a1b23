"""What a save costs the training: steps with one save among them beside as many without.

The two kinds take turns, a few steps each, so that a machine whose speed drifts hits both alike;
one turn of the first kind begins with the save. What the turns without it show of each other's
time is the measurement's own noise.
"""

import argparse
import statistics
from pathlib import Path

from benchmarks.images import pack_shapes
from benchmarks.updates import Updates
from glowscale.distributed import start_accelerator
from glowscale.jobs import positive, say

TURNS = 10
"""Of each kind in a measurement."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark is told."""
    parser.add_argument("--steps", type=positive, default=50, help=f"of each kind; {TURNS} turns")
    parser.add_argument("--batch", type=positive, default=8, help="images of a step")
    parser.add_argument("--depth", type=positive, default=32, help="of the Glow, per level")
    parser.add_argument("--width", type=positive, default=512, help="of its networks")
    parser.add_argument("--repeats", type=positive, default=3, help="measurements")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds a step with and without a save among so many, and their ratio."""
    pack_shapes(folder / "data", (3, 32, 32))
    model = {
        "family": "glow",
        "levels": 3,
        "depth": arguments.depth,
        "hidden_channels": arguments.width,
    }
    train = {"batch": arguments.batch, "optimizer": {"kind": "adamax", "lr": 1e-6}}
    updates = Updates(model, train, folder / "data", folder / "run", start_accelerator())
    updates.seconds(2)
    updates.seconds_to_save()  # the memory of its copies is taken once
    updates.seconds_to_finish_saving()
    length = max(1, arguments.steps // TURNS)
    runs = [Turns(updates, length) for _ in range(arguments.repeats)]
    trainer = updates.trainer
    newest = max(trainer.folder.checkpoints.glob("images-*"))
    figures = {
        "parameters": sum(p.numel() for p in trainer.state.model.parameters()),
        "bytes": sum(path.stat().st_size for path in newest.iterdir()),
        "steps": length * TURNS,
        "seconds_per_step": statistics.median(sum(run.without) for run in runs) / length / TURNS,
        "ratio": statistics.median(run.ratio for run in runs),
        "lowest_ratio": min(run.ratio for run in runs),
        "highest_ratio": max(run.ratio for run in runs),
        "ratio_of_the_other_turns": statistics.median(run.ratio_of_the_others for run in runs),
        "seconds_blocked": statistics.median(run.blocked for run in runs),
        "seconds_left_after_its_turn": max(run.left for run in runs),
    }
    say(
        f"{figures['parameters']:,} parameters, {figures['bytes'] / 1e6:,.0f} MB a checkpoint; "
        f"{figures['steps']} steps of {arguments.batch} images, {figures['seconds_per_step']:.3f} "
        f"s each without a save\n"
        f"  with one save among them they take {figures['ratio']:.4f} times as long "
        f"({figures['lowest_ratio']:.4f} to {figures['highest_ratio']:.4f} in "
        f"{arguments.repeats} measurements; without any, {figures['ratio_of_the_other_turns']:.4f}"
        f")\n  the training waits {figures['seconds_blocked']:.3f} s for the save to begin"
    )
    return {key: round(value, 4) for key, value in figures.items()}


class Turns:
    """One measurement."""

    def __init__(self, updates: Updates, length: int) -> None:
        self.without: list[float] = []
        self.with_save: list[float] = []
        for turn in range(TURNS):
            kinds = (self.without, self.with_save)
            for kind in kinds if turn % 2 else reversed(kinds):
                saving = kind is self.with_save and turn == TURNS // 2
                blocked = updates.seconds_to_save() if saving else 0.0
                kind.append(blocked + updates.seconds(length))
                if saving:
                    self.blocked = blocked
                    self.left = updates.seconds_to_finish_saving()
                    kind[-1] += self.left

    @property
    def ratio(self) -> float:
        """Of the times with a save and without."""
        return sum(self.with_save) / sum(self.without)

    @property
    def ratio_of_the_others(self) -> float:
        """The same without the turn of the save and its neighbour."""
        others = [turn for turn in range(TURNS) if turn != TURNS // 2]
        return sum(self.with_save[i] for i in others) / sum(self.without[i] for i in others)
