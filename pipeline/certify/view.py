"""How the report shows a certificate: one line a link, its findings below, a matrix of the backends, charts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipeline import charts as report_charts
from pipeline.certify import charts
from pipeline.certify.finding import TITLES
from pipeline.phrases import words

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
        "Before and after, with intervals": charts.intervals(data("tuned.scores").get("fields", {})),
        "Divergence from the trained model": charts.divergence(spread),
        "Error by tensor": charts.tensor_errors({"merged": data("merge.tensors").get("errors", []), "GGUF": data("gguf.tensors").get("errors", [])}),
    }  # fmt: skip
