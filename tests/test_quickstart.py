"""The README's first command, as it stands: what a newcomer sees in the first minutes."""

from pathlib import Path

from PIL import Image

from tests.conftest import ROOT, Runner, last_json


def test_quickstart_beats_the_histogram_and_leaves_its_pictures(
    tmp_path: Path, run_job: Runner
) -> None:
    overrides = [f"run.dir={tmp_path / 'run'}", f"data.dir={tmp_path / 'data'}"]
    config = ROOT / "configs" / "quickstart.yaml"
    result = last_json(run_job("train.py", config, *overrides, "--json"))
    assert result["images"] == 297
    assert 2.3 < result["histogram_bits_per_dim"] < 2.5
    assert result["bits_per_dim"] <= result["histogram_bits_per_dim"] - 0.15
    assert result["round_trip_error"] < 1e-4
    for name in ("samples.png", "curves.png"):
        assert min(Image.open(tmp_path / "run" / name).size) > 300
