"""A run as one HTML page that needs nothing beside it: a person opens it from a file browser."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from glowscale.errors import UserError
from glowscale.files import read_lines, write_atomically

REPORT = "report.html"
MOST_GRIDS = 8
"""Sample grids that are shown of a run's course."""
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ max-width: 100%; height: auto; image-rendering: pixelated; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; }}
th {{ border-bottom: 1px solid; }}
pre {{ overflow-x: auto; }}
.course {{ display: grid; gap: 1rem; }}
.course {{ grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); }}
figure {{ margin: 0; }}
figcaption {{ font-size: .85rem; opacity: .8; }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
{sections}
</html>
"""


def write_report(run: Path) -> Path:
    """Write `report.html` into a run's folder, from what else is there; return its path.

    Raises:
        UserError: if the folder is no run's.
    """
    if not (run / "config.yaml").exists():
        raise UserError(f"{run} is no folder of a run: it lacks config.yaml.")
    metrics = read_lines(run / "metrics.jsonl")
    sections = {
        "Course": _picture(run / "curves.png"),
        "Samples": _picture(run / "samples.png"),
        "Evaluations": _evaluations(run),
        "Samples over time": _course(run),
        "Speed": _speed(read_lines(run / "times.jsonl")),
        "Config": _preformatted((run / "config.yaml").read_text()),
        "Environment": _table([], _content(run / "environment.json").items()),
    }
    page = PAGE.format(
        title=escape(run.resolve().name),
        summary=escape(_summary(run, metrics)),
        sections="\n".join(f"<h2>{name}</h2>\n{body}" for name, body in sections.items() if body),
    )
    path = run / REPORT
    write_atomically(path, page.encode())
    return path


def _summary(run: Path, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Where the run stands, in a sentence."""
    images = max((line["images"] for line in metrics), default=0)
    told = f"{images:,} images seen in training."
    if final := _content(run / "evaluation.json"):
        error = final.get("standard_error")
        told += f" {final['bits_per_dim']:.4f}" + (f" ± {error:.4f}" if error else "")
        told += f" bits/dim on {final['images']:,} held-out images"
        told += "." if final.get("is_bound", True) else ", noisy ones: no bound on the pixels'."
    return told


def _evaluations(run: Path) -> str:
    """A line for every finished evaluation, the run's own first."""
    found = [("at the end of training", _content(run / "evaluation.json"))]
    found += [
        (path.parent.name, _content(path))
        for path in sorted(run.glob("evaluations/*/result.json"))
    ]
    rows = [
        (
            name,
            _figure(result["bits_per_dim"], result["standard_error"]),
            f"{result['images']:,}",
            result["dequantization"] + ("" if result.get("is_bound", True) else " (no bound)"),
            str(result["importance_samples"]),
            result["fingerprint"][:8],
            _figure(result["round_trip_error"]),
            ", ".join(f"{k} {v:.2f}" for k, v in result.get("codecs", {}).items()),
        )
        for name, result in found
        if result
    ]
    head = ["", "bits/dim", "images", "dequantization", "samples", "data", "round trip", "codecs"]
    classes = [
        _table(["class", "bits/dim"], [(k, _figure(v)) for k, v in result["per_class"].items()])
        for _, result in found[:1]
        if result and result["per_class"]
    ]
    folded = [f"<details><summary>by class</summary>{table}</details>" for table in classes]
    return _table(head, rows) + "".join(folded) if rows else ""


def _course(run: Path) -> str:
    """Sample grids, evenly spaced over the training."""
    paths = sorted((run / "samples").glob("*.png"))
    if len(paths) > MOST_GRIDS:
        last = len(paths) - 1
        paths = [paths[round(i * last / (MOST_GRIDS - 1))] for i in range(MOST_GRIDS)]
    figures = [
        f"<figure>{_picture(path)}<figcaption>{int(path.stem):,} images</figcaption></figure>"
        for path in paths
        if path.stem.isdigit()
    ]
    return f'<div class="course">{"".join(figures)}</div>' if figures else ""


def _speed(times: Sequence[Mapping[str, Any]]) -> str:
    speeds = [line["images_per_second"] for line in times if "images_per_second" in line]
    return f"<p>{median(speeds):,.1f} images a second in training (median).</p>" if speeds else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def line(cells: Sequence[object], kind: str) -> str:
        return f"<tr>{''.join(f'<{kind}>{escape(str(x))}</{kind}>' for x in cells)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table>{line(head, 'th') if head else ''}{body}</table>" if body else ""


def _picture(path: Path) -> str:
    """A PNG within the page; nothing where there is none."""
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(path.name)}" src="data:image/png;base64,{data}">'


def _preformatted(text: str) -> str:
    return f"<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"


def _figure(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.4g}" if error is None else f"{value:.4f} ± {error:.4f}"


def _content(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.exists() else {}
