"""One HTML file about a run: curves, samples, thresholds and the record. It needs no other file and no network."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from eff_train.frame import checkpoint
from eff_train.frame.config import dump_yaml, read_yaml
from eff_train.frame.curves import panel
from eff_train.frame.metrics import read_metrics
from eff_train.frame.progress import clock
from eff_train.frame.runs import Run

LATEST_SAMPLES = 3
PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp"}
NOT_METRICS = {"step", "event", "seconds"}

STYLE = """
:root { --ink: #1c1c1a; --soft: #6a6963; --ground: #fff; --line: #e4e2dc; --train: #7a9cc6; --evaluation: #c2571a }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ecebe6; --soft: #a09f98; --ground: #181817; --line: #363532; --train: #6f94c4;
    --evaluation: #ee8a4b } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 960px;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem } h3 { font-size: .95rem; margin: 0 }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 1.2rem }
svg text { font-size: 11px; fill: var(--soft) } svg .grid { stroke: var(--line) }
polyline { fill: none; stroke-width: 1.5 } .train { stroke: var(--train) } .evaluation { stroke: var(--evaluation) }
circle.evaluation { fill: var(--evaluation) } .key { color: var(--soft) }
.key b { font-weight: 600 } .key .t { color: var(--train) } .key .e { color: var(--evaluation) }
table { border-collapse: collapse } td, th { text-align: left; padding: .2rem 1.2rem .2rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line) } td + td { overflow-wrap: anywhere }
.fails { color: var(--evaluation); font-weight: 600 }
pre { background: color-mix(in srgb, var(--line) 40%, transparent); padding: .7rem; overflow-x: auto;
  white-space: pre-wrap }
figure { margin: 0 0 1rem } img { max-width: 100%; image-rendering: auto } figcaption { color: var(--soft) }
"""


def write_report(run: Run, out: Path) -> None:
    """Write the report of a run as it is now, finished or not."""
    config = read_yaml(run.config_file)
    records = read_metrics(run.metrics)
    title = f"{config['recipe']}: {run.folder.name}"
    body = [
        f"<h1>{escape(title)}</h1>",
        _summary(run, records, config["config"]["steps"]),
        _evaluation(run),
        _curves(records),
        _samples(run),
        _section("Command", _pre((run.folder / "command.txt").read_text())),
        _section("Options", _pre(dump_yaml(config))),
        _events(records),
        _environment(run),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    page = (
        f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{"".join(body)}</body></html>'
    )
    out.write_text(page, encoding="utf-8")


def _summary(run: Run, records: list[dict[str, Any]], steps: int) -> str:
    done = max((r["step"] for r in records), default=0)
    saved = [str(int(p.name.removeprefix("step-"))) for p in checkpoint.folders(run.checkpoints)]
    rows: dict[str, Any] = {"Updates": f"{done} of {steps}", "Checkpoints after updates": ", ".join(saved) or "none"}
    if rates := [r["samples_per_second"] for r in records if r.get("event") == "train"]:
        rows["Samples per second"] = f"{rates[-1]:.4g}"
    if seconds := [r["seconds"] for r in records if "seconds" in r]:
        rows["Time in training"] = clock(max(seconds))
    return _table(rows)


def _evaluation(run: Run) -> str:
    if not run.evaluation.exists():
        return ""
    found = json.loads(run.evaluation.read_text())
    rows = ""
    for name, value in found["metrics"].items():
        bound = found["thresholds"].get(name)
        verdict = ""
        if bound:
            verdict = f"{'holds' if bound['holds'] else 'fails'}: {bound['bound']}"
        css = ' class="fails"' if bound and not bound["holds"] else ""
        rows += f"<tr><td>{escape(name)}</td><td>{value:.6g}</td><td{css}>{escape(verdict)}</td></tr>"
    return _section(f"Evaluation of {found['checkpoint']}", f"<table>{rows}</table>")


def _curves(records: list[dict[str, Any]]) -> str:
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in records:
        if record.get("event") in ("train", "evaluation"):
            for name, value in record.items():
                if name not in NOT_METRICS and isinstance(value, (int, float)):
                    series.setdefault(name, {}).setdefault(record["event"], []).append((record["step"], value))
    panels = [f"<div><h3>{escape(n)}</h3>{panel(s, n)}</div>" for n, s in series.items()]
    key = '<p class="key">Over the updates: <b class="t">training</b>, <b class="e">evaluation</b>.</p>'
    return _section("Curves", f'{key}<div class="curves">{"".join(panels)}</div>') if panels else ""


def _samples(run: Run) -> str:
    folders = sorted(run.samples.glob("step-*"))[-LATEST_SAMPLES:] if run.samples.is_dir() else []
    parts = []
    for folder in reversed(folders):
        parts.append(f"<h3>After update {int(folder.name.removeprefix('step-'))}</h3>")
        parts += [_sample(path) for path in sorted(folder.iterdir())]
    return _section("Samples", "".join(parts)) if parts else ""


def _sample(path: Path) -> str:
    if kind := PICTURES.get(path.suffix):
        data = base64.b64encode(path.read_bytes()).decode()
        return f'<figure><img alt="{escape(path.stem)}" src="data:{kind};base64,{data}">{_caption(path)}</figure>'
    if path.suffix == ".txt":
        return f"<figure>{_caption(path)}{_pre(path.read_text(errors='replace'))}</figure>"
    return f"<figure>{_caption(path)}</figure>"


def _events(records: list[dict[str, Any]]) -> str:
    found = [r for r in records if r.get("event") not in ("train", "evaluation")]
    rows = {f"Update {r['step']}: {r['event']}": r.get("reason", "") for r in found}
    return _section("Events", _table(rows)) if rows else ""


def _environment(run: Run) -> str:
    found: Mapping[str, Any] = json.loads((run.folder / "environment.json").read_text())
    packages = found.get("packages", {})
    rows = {k: _listed(v) if isinstance(v, dict) else v for k, v in found.items() if k != "packages"}
    listing = " ".join(f"{n}=={v}" for n, v in packages.items())
    folded = f"<details><summary>{len(packages)} packages</summary>{_pre(listing)}</details>"
    return _section("Environment", _table(rows) + folded)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}"


def _table(rows: Mapping[str, Any]) -> str:
    lines: Iterable[str] = (f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in rows.items())
    return f"<table>{''.join(lines)}</table>"


def _pre(text: str) -> str:
    return f"<pre>{escape(text.strip())}</pre>"


def _caption(path: Path) -> str:
    return f"<figcaption>{escape(path.name)}</figcaption>"
