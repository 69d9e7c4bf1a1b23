"""A run's page: all there is to see, nothing from elsewhere, in a real browser."""

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from glowscale.errors import UserError
from glowscale.report import MOST_GRIDS, write_report
from tests.conftest import Caller

REQUIRE = "GLOWSCALE_REQUIRE_BROWSER"


class References(HTMLParser):
    """What a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]


@pytest.fixture
def run(config_dict: dict[str, Any], tmp_path: Path, call_job: Caller) -> Path:
    config_dict["train"]["images"] = 64
    config_dict["evaluate"]["every"] = config_dict["samples"]["every"] = 32
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_dict))
    assert call_job("train.py", tmp_path / "c.yaml")[0] == 0
    assert call_job("evaluate.py", tmp_path / "run", "--importance-samples", "2")[0] == 0
    return tmp_path / "run"


def test_the_page_holds_the_run_and_loads_nothing(run: Path) -> None:
    page = (run / "report.html").read_text()
    references = References()
    references.feed(page)
    grids = len([*(run / "samples").glob("*.png")])
    assert len(references.found) == 2 + min(
        grids, MOST_GRIDS
    )  # curves, samples, samples over time
    assert all(x.startswith("data:image/png;base64,") for x in references.found)
    assert not re.search(r"@import|url\(|<script|<link", page)
    text = re.sub(r'src="[^"]*"', "", page)
    evaluations = [*run.glob("evaluations/*/result.json")]
    assert len(evaluations) == 1
    for told in (
        "64 images seen in training",
        "bits/dim on 37 held-out images",
        evaluations[0].parent.name,
        "variational",
        "hidden_channels: 8",
        "torchdiffeq",
        "images a second",
        "by class",
    ):
        assert told in text, told


def test_what_a_config_holds_stays_text(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text() + "# <b onclick='alert()'>bold</b>\n")
    page = write_report(run).read_text()
    assert "<b onclick" not in page
    assert "&lt;b onclick" in page


def test_a_folder_that_is_no_run_s_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no folder of a run: it lacks config\.yaml"):
        write_report(tmp_path)


def test_a_browser_shows_every_picture(run: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{REQUIRE}=1, but there is no chromium")
        pytest.skip("no chromium to look with")
    probe = tmp_path / "probe.html"  # the page, and a script that tells what became of it
    script = """<script>addEventListener("load", () => {
    const images = [...document.images];
    document.title = `shown ${images.filter(x => x.naturalWidth > 0).length} of ${images.length}`
        + ` wide ${document.documentElement.scrollWidth <= innerWidth}`;
    });</script>"""
    probe.write_text((run / "report.html").read_text() + script)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,800", "--dump-dom"]
    shown = subprocess.run(
        [*command, probe.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    title = re.search(r"<title>(.*?)</title>", shown.stdout)
    assert title
    found = re.fullmatch(r"shown (\d+) of (\d+) wide true", title[1])
    assert found, title[1]
    assert found[1] == found[2]
    assert int(found[2]) >= 4
