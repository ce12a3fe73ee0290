"""What a verification makes of the evidence: each backend's checks and entry, and the report of the whole run.

Each check of a served model against its reference has an id, a status and the figures behind it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline import engines
from pipeline.config import resolved
from pipeline.machine.hardware import Hardware
from pipeline.net.chat import Streamed
from pipeline.report import schema
from pipeline.report.check import Check, held, skipped
from pipeline.report.schema import Backend, Evaluation, Result
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest, TrainingRecord
from pipeline.verify.evidence import PLAIN, Evidence
from pipeline.verify.files import run_checks
from pipeline.verify.material import Material
from pipeline.verify.prober import as_answer
from pipeline.verify.score import Answer, HeldOut, fields_of, is_exact, rows_asked, same, score, wilson
from pipeline.verify.sheets import examples, told

# an embedded-base run on the built-in data is expected to learn the task; a user's own run decides for itself
DEMO_MIN_EXACT = 0.8
# served answers may differ from the reference by rounding (Q8_0, another kernel); this much of ``exact`` is allowed
EXACT_TOLERANCE = 0.05
FINISH_TOLERANCE = 0.05
# characters of a refusal
_SHOWN = 300


@dataclass(frozen=True)
class Outcome:
    """What became of one backend: its report entry, its checks, and its answers where it gave any."""

    entry: Backend
    checks: tuple[Check, ...]
    answers: tuple[Answer, ...] = ()


def titled(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report with the titles of its backends, which older ones lack; one that follows no contract as it is."""
    backends = report.get("backends")
    if not isinstance(backends, list) or not all(isinstance(backend, dict) for backend in backends):
        return dict(report)
    known = {name: engines.get(name).title for name in engines.NAMES}
    return {**report, "backends": [{"title": known.get(str(b.get("name"))), **b} for b in backends]}


def absent(name: str, status: str, reason: str, launched: Mapping[str, Any] | None = None) -> Outcome:
    """A backend without figures: skipped because it is not installed, or failed."""
    what, _, install = reason.partition("; to have it: ")
    missing = status == "skipped"
    check = skipped(f"{name}.available", reason) if missing else held(f"{name}.serving", False, reason)
    figures = ("exact", "prompt_parity", "finish_stop", "ttft_ms", "tokens_per_second")
    nothing = dict.fromkeys(("engine_version", "argv", "ready_seconds", *figures))
    entry = Backend(
        **{**nothing, **(launched or {})},
        name=name,
        title=engines.get(name).title,
        status="skipped" if missing else "failed",
        reason=what,
        install=install or None,
        prompts=schema.PromptCount(total=0, passed=0),
        checks=[check],
    )
    return Outcome(entry, (check,))


def judged(evidence: Evidence, material: Material) -> Outcome:
    """A backend that answered: how its evidence compares with the in-process reference."""
    name, answers, seen, parity = evidence.engine, evidence.answers, evidence.features, evidence.parity
    assert seen and parity
    again = seen.streamed or range(len(seen.streams))
    whole = seen.alone or [answers[i] for i in again]
    scores, reference, count = score(material.rows, answers), material.tuned_score, len(material.rows)
    plain = [plain_client(evidence, material)] if seen.plain or seen.plain_refused else []
    found = (
        listed(name, evidence.model, seen.listed),
        chat(name, told(material.rows[0], seen.first), told(material.rows[0], material.tuned[0])),
        parity,
        *seen.probed,
        streamed(name, seen.streams, [(material.rows[i], one) for i, one in zip(again, whole, strict=True)]),
        exact(name, scores["exact"], reference["exact"], count),
        finish(name, scores["finish_stop"], reference["finish_stop"], count),
        *plain,
    )
    failed = [check for check in found if check.status == "failed"]
    alike = sum(map(same, material.rows, answers, material.tuned))
    injection, structured, tools = seen.probed
    entry = Backend(
        **evidence.launched,
        name=name,
        title=engines.get(name).title,
        status="failed" if failed else "passed",
        reason="; ".join(f"{check.id}: {check.figure}" for check in failed) or None,
        # a prompt passes when the served answer is the one the trained model gives in process
        prompts=schema.PromptCount(total=count, passed=alike),
        exact=scores["exact"],
        fields={k: v for k, v in scores.items() if k not in ("n", "exact", "finish_stop") and v is not None},
        prompt_parity=None if parity.status == "skipped" else parity.status == "passed",
        finish_stop=scores["finish_stop"],
        ttft_ms=_first_tokens(seen.streams),
        tokens_per_second=round(evidence.tokens_per_second, 1),
        injection=schema.Injection(**injection.data, detail=injection.figure),
        structured_output=schema.Feature(**structured.data, detail=structured.figure),
        tool_calls=schema.Feature(**tools.data, detail=tools.figure),
        plain_client=schema.PlainClient(**plain[0].data, detail=plain[0].figure) if seen.plain else None,
        checks=list(found),
    )
    return Outcome(entry, found, answers)


def _first_tokens(streams: Sequence[Streamed]) -> schema.Milliseconds | None:
    """Median and 95th percentile of the time to the first token, ms; None when no answer had a token."""
    times = sorted(1000 * s.first_token for s in streams if s.chunks)
    p50, p95 = (round(times[min(len(times) - 1, int(share * len(times)))], 1) if times else 0.0 for share in (0.5, 0.95))
    return schema.Milliseconds(p50=p50, p95=p95) if times else None


def chat(engine: str, answer: str, reference: str) -> Check:
    """The engine answers at all, where the model in this process does."""
    silent = "; the trained model itself answers nothing here" if not reference.strip() else ""
    return held(f"{engine}.chat", bool(answer.strip() or silent), f"answered {len(answer)} characters{silent}")


def listed(engine: str, model: str, names: Sequence[str]) -> Check:
    """The model is among those the server lists."""
    known = model in names or f"{model}:latest" in names
    return held(f"{engine}.model_listed", known, f"{model} among {', '.join(names) or 'no models'}")


def streamed(engine: str, answers: Sequence[Streamed], whole: Sequence[tuple[HeldOut, Answer]]) -> Check:
    """Streaming delivers in pieces what the unstreamed answer says; ``whole`` are the rows and their unstreamed answers."""
    if not answers:
        return skipped(f"{engine}.streaming", "no row is asked as a chat, which could be streamed")
    pairs = zip(answers, whole, strict=True)
    alike = sum(same(row, as_answer(a, "", told=other.calls is not None), other) for a, (row, other) in pairs)
    pieces = all(a.chunks > 1 for a in answers if len(a.text) > 20)
    ok = pieces and alike >= len(answers) - 1  # batches of another size may tip one near-tie
    return held(f"{engine}.streaming", ok, f"{alike} of {len(answers)} streamed answers equal the unstreamed ones")


def allowed(tolerance: float, count: int) -> float:
    """A tolerance for a share of ``count`` answers, and room for one near-tie that tipped."""
    return max(tolerance, 1 / max(count, 1))


def exact(engine: str, served: float, reference: float, count: int) -> Check:
    """The served model scores what the trained one scores, within EXACT_TOLERANCE or one of ``count`` answers."""
    most = allowed(EXACT_TOLERANCE, count)
    detail = f"exact {served:.3f} served, {reference:.3f} in process (allowed difference {most:.2g})"
    # scores are rounded to four digits
    return held(f"{engine}.exact", abs(served - reference) <= most + 1e-4, detail)


def finish(engine: str, served: float, reference: float, count: int) -> Check:
    """Answers end by themselves as often as they do in process, within FINISH_TOLERANCE or one of ``count`` answers."""
    detail = f"{served:.1%} of answers ended with stop, {reference:.1%} in process"
    return held(f"{engine}.finish_stop", served >= reference - allowed(FINISH_TOLERANCE, count) - 1e-4, detail)


def plain_client(evidence: Evidence, material: Material) -> Check:
    """What a client gets that names no sampling settings, beside the same rows asked with them; a warning when it is something else.

    One answer of PLAIN may differ: in another batch a near-tie may tip. Refused rows count as different and are in no share;
    skipped where all are.
    """
    assert evidence.features
    engine, plain, keys = engines.get(evidence.engine), evidence.features.plain, fields_of(material.rows)
    refused = list(evidence.features.plain_refused.values())
    why = (
        f"{len(refused)} of {len(plain) + len(refused)} rows got no answer ({' '.join(refused[0].split())[:_SHOWN]})"
        if refused
        else ""
    )
    if not plain:
        return skipped(f"{engine.name}.plain_client", f"without sampling settings {why}")
    triples = [(material.rows[i], answer, evidence.answers[i]) for i, answer in plain.items()]
    count, alike = len(triples), sum(same(row, answer, other) for row, answer, other in triples)
    got = sum(is_exact(row, answer, keys) for row, answer, _ in triples) / count
    greedy = sum(is_exact(row, other, keys) for row, _, other in triples) / count
    facts = {"rows": count, "exact": round(got, 4), "exact_greedy": round(greedy, 4), "same": alike}
    said = f"exact {got:.3f} of {count} rows without sampling settings, {greedy:.3f} with; {alike} answers are the same{why and f'; {why}'}"
    if count + len(refused) - alike <= (count + len(refused)) // PLAIN:
        return Check(f"{engine.name}.plain_client", "passed", said, data=facts)
    told = f"{said}. {engine.to_clients()}"
    return Check(f"{engine.name}.plain_client", "warning", told, data=facts)


def assemble(run: RunFolder, material: Material, outcomes: Mapping[str, Outcome]) -> Result:
    """The report: the run's own checks and those of its backends, with everything they are judged by."""
    manifest = Manifest(run.manifest)
    training = manifest.require_training()
    asked = {i: answer for i, answer in enumerate(material.base) if answer is not None}
    before, after = (
        schema.Scores(**score(*rows_asked(material.rows, asked), material.rows)),
        schema.Scores(**material.tuned_score),
    )
    # the same rows of both, where the base was asked a sample
    again = score(*rows_asked(material.rows, {i: material.tuned[i] for i in asked}), material.rows)["exact"]
    evaluation, kept = Evaluation(base=before, tuned=after), ("artefacts", "seconds", "finished_at")
    found = [*_line_checks(training, evaluation, again), *run_checks(run), *(c for o in outcomes.values() for c in o.checks)]
    if all(outcome.entry.status == "skipped" for outcome in outcomes.values()):
        found.append(Check("backends", "failed", "no backend could be started on this machine"))
    hardware = Hardware.detect()
    return Result(
        schema=1,
        run=run.name,
        passed=all(check.status != "failed" for check in found),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        base_model=schema.BaseModelId(**asdict(training.base)),
        eval=evaluation,
        training=schema.Training(
            **{key: getattr(training, key) for key in ("method", "trainer", "dtype", "steps", "tokens_per_second")},
            history=[schema.Point(**entry) for entry in training.history],
            seconds=training.train_seconds,
            parameters=dict(training.parameters),
            account=schema.Account(**training.account),
        ),
        backends=[outcome.entry for outcome in outcomes.values()],
        checks=found,
        examples=examples(material, {name: outcome.answers for name, outcome in outcomes.items() if outcome.answers}),
        manifest={name: {key: stage.raw[key] for key in kept} for name, stage in manifest.stages.items()},
        hardware=hardware.to_json(),
        settings=[schema.EffectiveSetting(**asdict(setting)) for setting in resolved()],
        not_tested=[
            *([] if hardware.gpus else ["No GPU on this machine: GPU training and GPU serving were not run."]),
            "Load beyond 32 requests at a time was not measured.",
        ],
    )


def _line_checks(training: TrainingRecord, evaluation: Evaluation, same_rows: float) -> list[Check]:
    """``same_rows``: exact of the tuned model in the rows that the base was asked."""
    loss, base, tuned, asked = training.eval_loss, evaluation.base, evaluation.tuned, training.parameters
    fell = f"held-out loss {loss['before']:.3f} before, {loss['after']:.3f} after"
    low, high = wilson(base.exact, base.n)
    gain = f"exact {base.exact:.3f} before ({low:.3f} to {high:.3f}), {same_rows:.3f} after, {base.n} rows asked of both"
    gain += "" if base.n == tuned.n else f"; {tuned.exact:.3f} after in {tuned.n} rows"
    found = [held("training.learned", loss["after"] < loss["before"], fell)]
    found.append(held("eval.not_worse", same_rows >= base.exact, gain))
    # a run cut short on purpose (a test, a try-out) is not held to what the whole one reaches
    if asked["base"] == "embedded" and asked["data"] == "soc" and not training.cut_short:
        expected = f"exact {tuned.exact:.3f}, at least {DEMO_MIN_EXACT} expected"
        found.append(held("eval.exact", tuned.exact >= DEMO_MIN_EXACT, expected))
    return found
