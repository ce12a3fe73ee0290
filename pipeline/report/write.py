"""The report of one run: ``report.json`` (the contract), ``report.html`` (for people), ``junit.xml`` (for CI)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from pipeline.report import check, page
from pipeline.report.check import STYLES, Check
from pipeline.report.phrases import NONE, percent
from pipeline.report.schema import Backend, Result, parse
from pipeline.runs.files import disk_errors_named, require_free_space, write_atomic, write_json
from pipeline.runs.text import clean, visible


@dataclass(frozen=True)
class ReportPaths:
    """Where the three files are."""

    json: Path
    html: Path
    junit: Path


def write_report(result: Mapping[str, Any], folder: Path) -> ReportPaths:
    """Check ``result`` against the contract and write all three files; InputError names a missing or wrong key.

    NaN and infinity are written as null, secrets in environment variables are masked. Each file appears whole.
    """
    data = clean(result)
    html, junit = render_html(data), junit_xml(data)  # both checked before the first file changes
    paths = paths_in(folder)
    # three files that belong together: all of them fit, or none is touched
    require_free_space(folder, 2 * len(html.encode()) + (1 << 20), "the report")
    with disk_errors_named(folder):
        write_json(paths.json, data)
        write_atomic(paths.html, html)
        write_atomic(paths.junit, junit)
    return paths


def render_again(result: Mapping[str, Any], folder: Path) -> ReportPaths:
    """Write report.html and junit.xml from what report.json holds, leaving report.json as it is."""
    html, junit, paths = render_html(result), junit_xml(result), paths_in(folder)
    write_atomic(paths.html, html)
    write_atomic(paths.junit, junit)
    return paths


def paths_in(folder: Path) -> ReportPaths:
    """The names of the three files in a report folder."""
    return ReportPaths(folder / "report.json", folder / "report.html", folder / "junit.xml")


def render_html(result: Mapping[str, Any]) -> str:
    """The page; InputError when the result does not follow the contract."""
    return page.render(parse(clean(result)))


def junit_xml(result: Mapping[str, Any]) -> str:
    """One suite for the line and one per backend, one test case per check."""
    run = parse(clean(result))
    suites = [("line", run.line_checks), *((b.name, _backend_checks(run.checks_of(b), b)) for b in run.backends)]
    return check.junit_xml(run.run, [(name, f"{run.run}.{name}", checks) for name, checks in suites])


def summary_table(result: Mapping[str, Any]) -> Table:
    """Scores and backends for the terminal; untrusted text cannot style or control it."""
    run = parse(clean(result))
    verdict = page.verdict(run)
    colour = {"passed": "bold green", "failed": "bold red"}.get(verdict.state, "bold yellow")
    caption = Text("\n".join([visible(verdict.text), *_probe_lines(run)]))
    title = Text(visible(verdict.title), style=colour)
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    heads = ("", "status", "exact", "prompt parity", "stops", "first token ms", "tokens/s")
    for head in heads:
        table.add_column(head, justify="left" if head in ("", "status", "prompt parity") else "right")
    for name, scores in (("before", run.evaluation.base), ("after", run.evaluation.tuned)):
        table.add_row(name, "", percent(scores.exact), "", percent(scores.shares.get("finish_stop")), "", "")
    for backend in run.backends:
        table.add_row(*_row(backend))
    return table


def _probe_lines(run: Result) -> list[str]:
    """A line a backend: what raw control tokens in a user's text would do, and which features were seen to work."""
    found = []
    for backend in run.backends:
        tried = (("JSON schema", backend.structured_output), ("tool calls", backend.tool_calls))
        parts = [f"{name}: {page.feature(tried)}" for name, tried in tried if tried]
        if backend.injection:
            parts.insert(0, backend.injection.detail)
        if backend.plain_client:
            parts.append(f"a client without sampling settings: {backend.plain_client.detail}")
        if parts:
            found.append(visible(f"{backend.shown}: {'; '.join(parts)}"))
    return found


def _row(backend: Backend) -> list[Text]:
    parity = {True: "equal", False: "differs", None: NONE}[backend.prompt_parity]
    first = f"{backend.ttft_ms.p50:.0f}" if backend.ttft_ms else NONE
    speed = f"{backend.tokens_per_second:.1f}" if backend.tokens_per_second is not None else NONE
    status = Text(backend.status, style=STYLES[backend.status])
    figures = [percent(backend.exact), parity, percent(backend.finish_stop), first, speed]
    return [Text(backend.shown), status, *(Text(figure) for figure in figures)]


def _backend_checks(checks: Sequence[Check], backend: Backend) -> list[Check]:
    """The backend's checks, plus one for the backend itself when no check tells its status."""
    if backend.status == "passed" or any(c.status == backend.status for c in checks):
        return list(checks)
    return [*checks, Check("backend", backend.status, backend.reason or "no reason given")]
