"""How the report shows a certificate: one line a link, its findings below, a matrix of the backends, charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.certify.finding import TITLES
from pipeline.errors import InputError
from pipeline.report import charts as report_charts
from pipeline.report.charts import PALETTE, Canvas
from pipeline.report.phrases import words
from pipeline.runs.files import read_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import HashCache

_BINS = tuple(range(-9, 2))  # powers of ten of the divergence, in nats


def intervals(fields: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Share of held-out rows right by field, before and after, each with its 95 % interval; '' without a field."""
    if not fields:
        return ""
    canvas = Canvas("intervals", "Held-out rows right by field, with 95 % intervals", 1.1 + 0.42 * len(fields))
    for role, offset in (("before", -0.17), ("after", 0.17)):
        rows = [(name, [value * 100 for value in sides[role]]) for name, sides in fields.items()]
        for i, (_, (mean, low, high)) in enumerate(rows):
            canvas.axes.plot([low, high], [i + offset] * 2, color=PALETTE[role], linewidth=5, solid_capstyle="butt", alpha=0.55)
            label = f"{role} fine-tuning" if i == 0 else None
            canvas.mark(mean, i + offset, PALETTE[role], f"{rows[i][0]}, {role}: {mean:.1f} % ({low:.1f} to {high:.1f})", label)
    canvas.axes.set_yticks(range(len(fields)), [name.replace("_", " ")[:22] for name in fields], color=PALETTE["ink"])
    canvas.axes.set_ylim(len(fields) - 0.4, -0.6)
    canvas.axes.set_xlim(-3, 103)
    canvas.axes.set_xticks([0, 25, 50, 75, 100])
    canvas.axes.set_xlabel("% of held-out rows, band: 95 % interval")
    canvas.axes.grid(axis="x", color=PALETTE["grid"], linewidth=0.8)
    canvas.legend()
    return canvas.svg()


def divergence(series: Mapping[str, Sequence[float]]) -> str:
    """Histogram of the divergence by position, one line a comparison, on a logarithmic axis; '' without a value."""
    drawn = {name: values for name, values in series.items() if values}
    if not drawn:
        return ""
    canvas = Canvas("divergence", "Divergence from the in-process model, by position", 3.6)
    colours = [PALETTE["after"], PALETTE["second"], PALETTE["before"], PALETTE["ink"]]
    for (name, values), colour in zip(drawn.items(), colours, strict=False):
        counts = _histogram(values)
        shares = [100 * count / len(values) for count in counts]
        canvas.axes.step([*_BINS, _BINS[-1] + 1], [*shares, shares[-1]], where="post", color=colour, linewidth=2, label=name)
    canvas.axes.set_xticks(_BINS[::2], [f"1e{power}" for power in _BINS[::2]])
    canvas.axes.set_xlabel("KL divergence in nats (leftmost: that or less)")
    canvas.axes.set_ylabel("% of positions")
    canvas.axes.set_ylim(bottom=0)
    canvas.axes.grid(axis="y", color=PALETTE["grid"], linewidth=0.8)
    canvas.legend()
    return canvas.svg()


def _histogram(values: Sequence[float]) -> list[int]:
    counts = [0] * len(_BINS)
    for value in values:
        power = math.floor(math.log10(value)) if value > 0 else _BINS[0]
        counts[min(max(power, _BINS[0]), _BINS[-1]) - _BINS[0]] += 1
    return counts


def tensor_errors(series: Mapping[str, Sequence[Sequence[Any]]]) -> str:
    """Largest error of each tensor as a share of its bound, in file order; those above it are named; '' without one."""
    drawn = {name: errors for name, errors in series.items() if errors}
    if not drawn:
        return ""
    canvas = Canvas("tensors", "Largest error by tensor, as a share of the bound", 3.2)
    highest = 1.0
    for (name, errors), colour in zip(drawn.items(), (PALETTE["after"], PALETTE["second"]), strict=False):
        ratios = [min(float(ratio), 1e6) if ratio is not None else 1e6 for _, ratio in errors]
        highest = max(highest, *ratios)
        canvas.axes.plot(range(len(ratios)), ratios, ".", color=colour, markersize=4, label=name)
        for i, ratio in enumerate(ratios):
            if ratio > 1:
                canvas.mark(i, ratio, colour, f"{name}, {errors[i][0]}: {ratio:.3g} of the bound")
    canvas.axes.axhline(1, color=PALETTE["ink"], linewidth=1, linestyle=(0, (4, 3)))
    if highest > 2:
        canvas.axes.set_yscale("log")
    else:
        canvas.axes.set_ylim(0, 1.15)
    canvas.axes.set_xlabel("tensor, in file order")
    canvas.axes.set_ylabel("error / bound")
    canvas.legend()
    return canvas.svg()


_COLUMNS = {
    "file": "Serves this run's file",
    "prompts": "Same prompt tokens",
    "answers": "Same greedy answers",
    "logprobs": "Same distributions",
    "canaries": "Not the base",
    "controls": "Same drift elsewhere",
    "stops": "Stops",
}


@dataclass(frozen=True)
class Row:
    """One finding: what was measured, the figure, the bound and where the bound comes from."""

    name: str
    status: str
    figure: str
    bound: str
    source: str


@dataclass(frozen=True)
class Line:
    """One link: its state, the finding that tells most (the first broken one, else the first), and all of them."""

    number: int
    title: str
    status: str
    lead: Row
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class View:
    """Everything the page shows of a certificate."""

    id: str
    created_at: str
    passed: bool
    offline: bool
    lines: tuple[Line, ...]
    untested: tuple[str, ...]
    heads: tuple[str, ...]
    matrix: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    charts: tuple[tuple[str, Markup], ...]
    classes: tuple[Mapping[str, Any], ...]


def view(certificate: Mapping[str, Any]) -> View:
    """The view of what ``certificate.json`` holds."""
    links = certificate["links"]
    findings = {finding["id"]: finding for link in links for finding in link["findings"]}
    heads, matrix = _matrix(findings)
    drawn = _charts(findings)
    return View(
        str(certificate["id"]),
        str(certificate["created_at"]),
        bool(certificate["passed"]),
        bool(certificate["offline"]),
        tuple(_line(link) for link in links),
        tuple(TITLES[key].lower() for key in certificate["unproven"] if key in TITLES),
        heads,
        matrix,
        tuple((name, Markup(svg)) for name, svg in drawn.items() if svg),
        tuple((findings.get("tuned.classes") or {}).get("data", {}).get("classes", [])),
    )


def _line(link: Mapping[str, Any]) -> Line:
    rows = tuple(
        Row(words(f["id"].partition(".")[2]), f["status"], f["figure"], f["bound"], f["source"]) for f in link["findings"]
    )
    lead = next((row for row in rows if row.status == link["status"]), rows[0])
    return Line(link["number"], link["title"], link["status"], lead, rows)


def _matrix(
    findings: Mapping[str, Mapping[str, Any]],
) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[tuple[str, str], ...]], ...]]:
    """Backends by checks: (engine, ((status, figure), ...)); columns that no backend has are left out."""
    engines = [
        key.removeprefix("served.").removesuffix("_answers")
        for key in findings
        if key.startswith("served.") and key.endswith("_answers")
    ]
    cells = {engine: [_cell(findings, engine, column) for column in _COLUMNS] for engine in engines}
    kept = [i for i in range(len(_COLUMNS)) if any(row[i][0] for row in cells.values())]
    heads = tuple(list(_COLUMNS.values())[i] for i in kept)
    return heads, tuple((report_charts.title(engine), tuple(row[i] for i in kept)) for engine, row in cells.items())


def _cell(findings: Mapping[str, Mapping[str, Any]], engine: str, column: str) -> tuple[str, str]:
    key = {"canaries": f"tuned.{engine}", "controls": f"tuned.{engine}_controls", "stops": f"stops.{engine}"}.get(column)
    found = findings.get(key or f"served.{engine}_{column}")
    return (found["status"], found["figure"]) if found else ("", "")


def _charts(findings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    def data(key: str) -> Mapping[str, Any]:
        return (findings.get(key) or {}).get("data") or {}

    spread = {"float16 cast": data("merge.cast_logits").get("divergences", [])}
    for key in findings:
        if key.startswith("served.") and key.endswith("_logprobs"):
            spread[report_charts.title(key.removeprefix("served.").removesuffix("_logprobs"))] = data(key).get("divergences", [])
    return {
        "Before and after, with intervals": intervals(data("tuned.scores").get("fields", {})),
        "Divergence from the trained model": divergence(spread),
        "Error by tensor": tensor_errors({"merged": data("merge.tensors").get("errors", []), "GGUF": data("gguf.tensors").get("errors", [])}),
    }  # fmt: skip


def changed_files(run: RunFolder, certificate: Mapping[str, Any]) -> list[str]:
    """Artefacts of a certificate that are gone or have another SHA-256 now; files that did not change are not read again."""
    cache = HashCache(run.path)
    artefacts: Mapping[str, str] = certificate["subject"].get("artefacts") or {}
    return [name for name, sha256 in artefacts.items() if not (run.path / name).exists() or cache.tree(run.path / name) != sha256]


def summary(run: RunFolder) -> dict[str, Any] | None:
    """Id, result and time of a run's certificate, for a status page; None when there is none.

    ``current`` is false once a file that it is about has changed: ``passed`` then says nothing about what is there now.
    """
    path = run.certificate_file
    if not path.is_file():
        return None
    held = read_json(path)
    seen = {key: held.get(key) for key in ("id", "passed", "state", "offline", "unproven", "broken", "created_at")}
    return {**seen, "current": not changed_files(run, held)}


def summaries(output: Path) -> dict[str, dict[str, Any]]:
    """The certificates of every run below a folder, by run name; a file that cannot be read counts as none."""
    found = {}
    for path in sorted(output.glob("*/certificate/certificate.json")):
        try:
            seen = summary(RunFolder(path.parents[1].name, output))
        except (InputError, AttributeError, KeyError, TypeError, OSError):
            continue
        if seen is not None:
            found[path.parents[1].name] = seen
    return found
