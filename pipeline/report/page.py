"""``report.html``: one self-contained page, everything escaped, no script, nothing fetched."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipeline import __version__
from pipeline.report import charts
from pipeline.report.answers import Comparison, compare, show
from pipeline.report.certificate import view
from pipeline.report.check import Check
from pipeline.report.phrases import (
    NONE,
    TEMPLATES,
    duration,
    environment,
    first_line,
    flatten,
    listing,
    percent,
    points,
    was,
    words,
)
from pipeline.report.schema import Backend, Example, Feature, Result
from pipeline.runs.text import visible

_OPEN_EXAMPLES = 3


@dataclass(frozen=True)
class Verdict:
    """The page's first line: ``state`` is passed, failed or unverified."""

    state: str
    title: str
    text: str
    broken: tuple[Check, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A key figure: what it is, its value, and one line that explains it."""

    label: str
    value: str
    note: str
    state: str = "plain"


@dataclass(frozen=True)
class Group:
    """Checks about one backend, or about the line as a whole."""

    title: str
    status: str
    summary: str
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Answer:
    """One or several models' identical answer to a prompt."""

    labels: tuple[str, ...]
    comparison: Comparison
    before: bool = False


@dataclass(frozen=True)
class Sheet:
    """A prompt with its expected answer and everyone's."""

    prompt: str
    expected: Comparison
    answers: tuple[Answer, ...]
    open: bool


def render(result: Result) -> str:
    """The whole page."""
    titles = {backend.name: backend.shown for backend in result.backends}
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    template = environment().get_template("report.html.j2")
    return template.render(
        result=result,
        version=__version__,
        css=Markup(css),
        css_hash=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        verdict=verdict(result),
        certificate=view(result.certificate, titles) if result.certificate else None,
        figures=figures(result),
        groups=groups(result),
        charts=_charts(result),
        scores=_score_rows(result),
        table=_backend_table(result.backends),
        sheets=sheets(result.examples, titles),
        facts_run=flatten({"run": result.run, "written": result.created_at, "base model": result.base_model.model_dump()}),
    )


def verdict(result: Result) -> Verdict:
    """Passed, failed (naming the broken check) or unverified (no engine answered)."""
    served = [b.shown for b in result.backends if b.status == "passed"]
    skipped = [b.shown for b in result.backends if b.status == "skipped"]
    tail = f" {listing(skipped)} {was(skipped)} skipped, not tested." if skipped else ""
    if result.broken or not result.passed:
        broken = tuple(result.broken)
        name = f"Failed: {check_title(broken[0], result)}" if broken else "Failed"
        more = f" {len(broken) - 1} more {'check' if len(broken) == 2 else 'checks'} failed." if len(broken) > 1 else ""
        text = first_line(broken[0].figure) if broken else "The run did not pass, and no check says why."
        return Verdict("failed", name, f"{text}{more}{tail}", broken)
    if not served:
        return Verdict("unverified", "Not verified: no engine answered", f"Nothing was served, so nothing was proven.{tail}")
    text = f"{listing(served)} {'answers' if len(served) == 1 else 'answer'} held-out prompts as the fine-tuned model does.{tail}"
    return Verdict("passed", "Passed: what is served is what was trained", text)


def check_title(check: Check, result: Result) -> str:
    """``vllm.prompt_parity`` as 'vLLM, prompt parity'."""
    for backend in result.backends:
        if check.id == backend.name:
            return backend.shown
        if check.id.startswith(f"{backend.name}."):
            return f"{backend.shown}, {words(check.id.removeprefix(f'{backend.name}.'))}"
    return words(check.id)


def _rows_of(base: int, tuned: int) -> str:
    return f"of {tuned} held-out rows" if base == tuned else f"of {base} → {tuned} held-out rows"


def figures(result: Result) -> list[Figure]:
    """The row of key figures under the verdict."""
    base, tuned = result.evaluation.base, result.evaluation.tuned
    found = [Figure("Exact, before → after", f"{percent(base.exact)} → {percent(tuned.exact)}", _rows_of(base.n, tuned.n))]
    for backend in result.backends:
        if backend.exact is not None:
            note = f"{points(backend.exact - tuned.exact)} the trained model"
            found.append(Figure(f"Exact, {backend.shown}", percent(backend.exact), note, backend.status))
    parity = [b.prompt_parity for b in result.backends if b.prompt_parity is not None]
    if parity:
        state, note = "passed" if all(parity) else "failed", "engines feed the model the tokenizer's exact prompt"
        found.append(Figure("Prompt parity", f"{sum(parity)} of {len(parity)}", note, state))
    stops = [b.finish_stop for b in result.backends if b.finish_stop is not None]
    if stops:
        found.append(Figure("Stops", percent(min(stops)), "answers that end by themselves, in the worst engine"))
    training = result.training
    if training.seconds is not None:
        steps = [f"{training.steps} steps"] if training.steps is not None else []
        found.append(Figure("Training", duration(training.seconds), ", ".join([*steps, training.method or ""]).strip(", ")))
    return found


def groups(result: Result) -> list[Group]:
    """Checks by backend, the line's own first; a group that failed comes before one that did not."""
    # the certificate's links have their own section, above
    line = [check for check in result.line_checks if not (result.certificate and check.id.startswith("certificate."))]
    found = [_group("Training and export", "", line, "")] if line else []
    for backend in result.backends:
        name = " ".join(filter(None, [backend.shown, backend.engine_version]))
        found.append(_group(name, backend.status, result.checks_of(backend), backend.reason or ""))
    return sorted(found, key=lambda group: group.status != "failed")


def sheets(examples: Sequence[Example], titles: Mapping[str, str]) -> list[Sheet]:
    """Each example with identical answers shown once; ``titles`` are those of the backends, by name."""
    found = []
    for i, example in enumerate(examples):
        served = {titles.get(name, visible(name)): text for name, text in example.answers.items()}
        after: dict[str, list[str]] = {}
        for label, text in {"Fine-tuned, in process": example.tuned, **served}.items():
            if text is not None:
                after.setdefault(text, []).append(label)
        answers = [Answer(tuple(labels), compare(example.expected, text)) for text, labels in after.items()]
        if example.base is not None:
            answers.insert(0, Answer(("Before fine-tuning",), compare(example.expected, example.base), before=True))
        found.append(Sheet(visible(example.prompt), show(example.expected), tuple(answers), i < _OPEN_EXAMPLES))
    return found


def _group(name: str, status: str, checks: Sequence[Check], reason: str) -> Group:
    ran = [c for c in checks if c.status != "skipped"]
    passed = sum(c.status == "passed" for c in ran)
    if not status:
        status = "failed" if any(c.status == "failed" for c in checks) else "passed" if ran else "skipped"
    summary = f"{passed} of {len(ran)} passed" if ran else reason or "nothing was checked"
    return Group(name, status, summary, tuple(sorted(checks, key=lambda c: c.status != "failed")))


def _charts(result: Result) -> list[tuple[str, Markup]]:
    drawn = {
        "Loss": charts.loss_curve(result.training.history),
        "Before and after, by field": charts.before_after(result.evaluation.base.shares, result.evaluation.tuned.shares),
        "Time to first token": charts.latency(result.backends),
        "Throughput": charts.throughput(result.backends),
    }
    return [(name, Markup(svg)) for name, svg in drawn.items() if svg]


def _score_rows(result: Result) -> dict[str, Any]:
    base, tuned = result.evaluation.base.shares, result.evaluation.tuned.shares
    scored = [b for b in result.backends if b.exact is not None or b.fields]
    heads = ["Before", "After", *(b.shown for b in scored)]
    names = [n for n in dict.fromkeys([*tuned, *base]) if n != "exact"] + ["exact"]
    columns: list[Mapping[str, float | None]] = [base, tuned]
    columns += [{**b.fields, "finish_stop": b.finish_stop, "exact": b.exact} for b in scored]
    return {"heads": heads, "rows": [(words(name), [percent(column.get(name)) for column in columns]) for name in names]}


def _backend_table(backends: Sequence[Backend]) -> dict[str, Any]:
    """Columns that at least one backend has a figure for."""
    columns = {
        "Version": [b.engine_version or NONE for b in backends],
        "Same answers": [f"{b.prompts.passed} of {b.prompts.total}" if b.prompts.total else NONE for b in backends],
        "Exact": [percent(b.exact) for b in backends],
        "Plain client": [plain_client(b) for b in backends],
        "Prompt parity": [{True: "equal", False: "differs", None: NONE}[b.prompt_parity] for b in backends],
        "Stops": [percent(b.finish_stop) for b in backends],
        "Raw control tokens": [injection(b) for b in backends],
        "JSON schema": [feature(b.structured_output) for b in backends],
        "Tool calls": [feature(b.tool_calls) for b in backends],
        "First token": [f"{b.ttft_ms.p50:.0f} / {b.ttft_ms.p95:.0f} ms" if b.ttft_ms else NONE for b in backends],
        "Tokens/s": [f"{b.tokens_per_second:.1f}" if b.tokens_per_second is not None else NONE for b in backends],
        "Ready in": [duration(b.ready_seconds) for b in backends],
        "Memory": [_memory(b) for b in backends],
    }
    kept = {head: cells for head, cells in columns.items() if any(cell != NONE for cell in cells)}
    rows = [(b, [cells[i] for cells in kept.values()]) for i, b in enumerate(backends)]
    return {"heads": list(kept), "rows": rows}


def injection(backend: Backend) -> str:
    """What raw control tokens in a user's text do on this engine, in a word."""
    found = backend.injection
    return {True: "work", False: "stay text", None: NONE}[found.raw if found else None]


def plain_client(backend: Backend) -> str:
    """Exact of the rows that were asked without sampling settings, and of the same rows with them where that is another figure."""
    found = backend.plain_client
    if found is None:
        return NONE
    got, greedy = percent(found.exact), percent(found.exact_greedy)
    return got if got == greedy and found.same == found.rows else f"{got} ({greedy})"


def feature(tried: Feature | None) -> str:
    """How trying a feature ended, in a word or two."""
    if tried is None:
        return NONE
    return {"passed": "works", "failed": "fails", "not tested": "not tested"}.get(tried.result, "not supported")


def _memory(backend: Backend) -> str:
    measured, predicted = backend.memory_measured_gib, (backend.memory_gib or {}).get("total")
    parts = [f"{measured:.1f}"] if measured is not None else []
    parts += [f"({predicted:.1f} planned)"] if predicted is not None else []
    return " ".join([*parts, "GiB"]) if parts else NONE
