"""How the cost of Glow's training grows: with pixels, with depth, and over two processes.

The table's steps are ours as in `train`, each size and depth of one process. Then the same step by
one process of two threads and by two processes of one thread, which share its batch, in turn: all
are there from the start, and idle while others work.
"""

import argparse
import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.training import add_model_arguments, glow_updates
from benchmarks.turns import in_turn
from benchmarks.updates import Updates
from glowscale.distributed import start_accelerator
from glowscale.jobs import positive, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark is told."""
    add_model_arguments(parser)
    parser.add_argument("--sizes", type=positive, nargs="+", default=[16, 32, 64])
    parser.add_argument("--depths", type=positive, nargs="+", default=[4, 8, 16])
    parser.add_argument("--repeats", type=positive, default=7, help="steps of each")
    parser.add_argument("--turns", type=positive, default=15, help="of one and two processes")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Milliseconds of a step by size and depth, how they grow, and the two processes' speed."""
    table = {
        depth: {
            size: 1000 * seconds_of(with_size(arguments, size, depth), folder / f"{size}-{depth}")
            for size in arguments.sizes
        }
        for depth in arguments.depths
    }
    lines = [
        f"{'ms a step':>12}" + "".join(f"{size}×{size}".rjust(10) for size in arguments.sizes)
    ]
    for depth, row in table.items():
        lines.append(f"{'K=' + str(depth):>12}" + "".join(f"{row[s]:10.1f}" for s in row))
    large = max(arguments.sizes)
    shallow, deep = min(arguments.depths), max(arguments.depths)
    middle = sorted(arguments.sizes)[len(arguments.sizes) // 2]
    by_pixels = table[deep][large] / table[deep][middle] / (large / middle) ** 2
    by_depth = table[deep][large] / table[shallow][large] / (deep / shallow)
    say(
        "\n".join(lines) + f"\nfrom {middle}×{middle} to {large}×{large} a pixel costs "
        f"{by_pixels:.2f} times as much; from K={shallow} to K={deep} a step of flow "
        f"{by_depth:.2f} times"
    )
    with Team(arguments, 1, folder / "one") as one, Team(arguments, 2, folder / "two") as two:
        steps: dict[str, Callable[[], object]] = {"one": one.step, "two": two.step}
        seconds = in_turn(steps, arguments.turns)
    ratio = seconds["one"] / seconds["two"]
    say(f"two processes of one thread train at {ratio:.3f} of the speed of one of two threads")
    return {
        "ms": {
            str(depth): {str(s): round(x, 2) for s, x in row.items()}
            for depth, row in table.items()
        },
        "pixel_cost_growth": round(by_pixels, 4),
        "depth_cost_growth": round(by_depth, 4),
        "two_processes_over_one": round(ratio, 4),
    }


def with_size(arguments: argparse.Namespace, size: int, depth: int) -> argparse.Namespace:
    """The same model for other images, of another depth."""
    return argparse.Namespace(**{**vars(arguments), "size": size, "depth": depth})


def seconds_of(arguments: argparse.Namespace, folder: Path) -> float:
    """Median seconds of a step in this process."""
    updates = glow_updates(arguments, folder, start_accelerator(arguments.precision))
    return in_turn({"ours": lambda: updates.seconds(1)}, arguments.repeats)["ours"]


class Team:
    """Fresh processes that train one model together and share two threads; idle between steps.

    Args:
        arguments: the model's size, and the whole batch.
        processes: one or two.
        folder: for the data and the run.
    """

    def __init__(self, arguments: argparse.Namespace, processes: int, folder: Path) -> None:
        plain = argparse.Namespace(**{k: v for k, v in vars(arguments).items() if k != "measure"})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pools: list[ProcessPoolExecutor] = []
        for rank in range(processes):
            environment = {
                "OMP_NUM_THREADS": str(2 // processes),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(1, context, join_team, (environment, plain, folder))
            self.pools.append(pool)

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self.pools:
            pool.shutdown()

    def step(self) -> None:
        """One step by all of them."""
        for future in [pool.submit(step_of_member) for pool in self.pools]:
            future.result()


MEMBER: list[Updates] = []
"""What a member of a team trains, in its process."""


def join_team(environment: dict[str, str], arguments: argparse.Namespace, folder: Path) -> None:
    """Become a member, in a process that has done nothing before."""
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    MEMBER.append(glow_updates(arguments, folder, start_accelerator(arguments.precision)))


def step_of_member() -> None:
    """One step, together with the others."""
    MEMBER[0].seconds(1)
