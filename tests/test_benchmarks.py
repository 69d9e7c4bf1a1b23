"""The benchmarks run as their commands say, and end with one JSON object."""

from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Runner, last_json


@pytest.mark.long
def test_memory_by_what_is_kept(tmp_path: Path, run_job: Runner) -> None:
    picture = tmp_path / "memory.png"
    sizes = ["--size", 64, "--batch", 4, "--levels", 1, "--width", 16, "--depths", 2, 12]
    options = [*sizes, "--repeats", 1, "--picture", picture, "--json"]
    found = last_json(run_job("benchmark.py", "memory", *options))
    growth = {
        way: by_depth["12"]["activation_mb"] / by_depth["2"]["activation_mb"]
        for way, by_depth in found["activation_mb"].items()
    }
    assert growth["store"] > 3
    assert growth["invert"] < 1.05
    assert growth["invert"] < growth["recompute"] < growth["store"]
    assert Image.open(picture).size[0] > 300


@pytest.mark.long
def test_training_and_sampling_beside_a_peer(run_job: Runner) -> None:
    pytest.importorskip("normflows")
    sizes = ["--size", 8, "--batch", 4, "--levels", 1, "--depth", 2, "--width", 8]
    found = last_json(run_job("benchmark.py", "train", *sizes, "--repeats", 2, "--json"))
    speeds = {name: found[name] for name in ("ours", "normflows", "floor")}
    assert all(speed > 0 for speed in speeds.values())
    ratio = speeds["ours"] / speeds["normflows"]
    assert found["ours_over_normflows"] == pytest.approx(ratio, rel=0.01)
    assert found["ours_over_floor"] == pytest.approx(speeds["ours"] / speeds["floor"], rel=0.01)
    scaling = ["--sizes", 8, 16, "--depths", 1, 2, "--repeats", 1, "--turns", 2]
    grown = last_json(run_job("benchmark.py", "scaling", *sizes, *scaling, "--json"))
    assert grown["ms"].keys() == {"1", "2"}
    assert grown["two_processes_over_one"] > 0


def test_linear_flows_by_dimension(run_job: Runner) -> None:
    found = last_json(run_job("benchmark.py", "linear", "--dims", 4, 16, "--repeats", 1, "--json"))
    for rows in found.values():
        assert rows.keys() == {"lu", "plain", "qr"}
        for row in rows.values():
            assert row["over_plain"]["16"] == pytest.approx(
                row["ms"]["16"] / rows["plain"]["ms"]["16"], abs=0.02
            )
            growth = row["ms"]["16"] / row["ms"]["4"]
            assert 4 ** row["exponent"] == pytest.approx(growth, rel=0.05)


def test_sampling_takes_a_step_for_every_position_or_one_for_all(run_job: Runner) -> None:
    sizes = ["--sides", 2, 4, "--batch", 2, "--width", 8, "--repeats", 1]
    found = last_json(run_job("benchmark.py", "inverse", *sizes, "--json"))
    passes = {
        name: [row["by_positions"][str(n)]["passes"] for n in (4, 16)]
        for name, row in found.items()
    }
    parallel = ["coupling, density", "coupling, sampling", "causal transformer, density"]
    parallel += ["masked autoregressive, density", "inverse autoregressive, sampling"]
    for name in parallel:
        assert passes.pop(name) == [1, 1]
    for kind in ("masked autoregressive", "causal transformer"):
        assert passes.pop(f"{kind}, sampling") == [4, 16]
        few, more = passes.pop(f"{kind}, sampling by Jacobi")
        assert 1 < few <= 4
        assert 1 < more < 16
    assert passes == {"inverse autoregressive, density": [4, 16]}
