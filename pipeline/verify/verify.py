"""Verify: put every held-out prompt to every backend and judge the answers against the in-process reference."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from pipeline.config import Settings, resolved
from pipeline.errors import PipelineError, VerificationFailed
from pipeline.machine.hardware import Hardware
from pipeline.net.client import wait_for
from pipeline.report.check import Check, held
from pipeline.report.write import ReportPaths, write_report
from pipeline.runs import interrupt, lock
from pipeline.runs import log as runlog
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest, ServedRecord, TrainingRecord
from pipeline.serve import backends, start
from pipeline.serve.start import Endpoint, Options
from pipeline.verify import checks
from pipeline.verify import outcome as verify_kept
from pipeline.verify.files import run_checks
from pipeline.verify.material import Material, read_material
from pipeline.verify.outcome import Kept, Outcome, absent, key_of, launched
from pipeline.verify.prober import Prober, Streamed, ask_all
from pipeline.verify.probes import probe as probe_injection
from pipeline.verify.probes import structured_output, tool_call
from pipeline.verify.score import score

log = logging.getLogger(__name__)
BACKENDS = ("vllm", "llamacpp", "ollama")
_STREAMED = 4
_EXAMPLES = 12
_CONCURRENCY = 32
# an embedded-base run on the built-in data is expected to learn the task; a user's own run decides for itself
DEMO_MIN_EXACT = 0.8


def verify(run: RunFolder, names: Sequence[str], settings: Settings, progress: Callable[[str], None], *, keep: bool = False, limit: int | None = None) -> dict[str, Any]:  # fmt: skip
    """Verify the run on each backend and return the report (see ``report.json``'s contract).

    A backend that already runs for this run is used; one that does not is started and stopped again. ``keep`` leaves
    running what was running. A backend that cannot be had here is skipped with its reason, never passed.
    """
    material = read_material(run, limit)
    with lock.held(run, "verify"), runlog.written(run, "verify"), interrupt.graceful(log):
        return _verify(run, names, settings, material, progress, keep=keep, limit=limit)


def publish(run: RunFolder, report: Mapping[str, Any]) -> ReportPaths:
    """Write the report into the run folder; what was kept for an interrupted verification is then no longer needed."""
    with lock.held(run, "verify"):
        paths = write_report(report, run.report)
        verify_kept.clear(run)
    return paths


def _verify(run: RunFolder, names: Sequence[str], settings: Settings, material: Material, progress: Callable[[str], None], *, keep: bool, limit: int | None) -> dict[str, Any]:  # fmt: skip
    kept, outcomes = Kept(run, key_of(run, settings, limit)), {}
    for name in names:
        before = kept.read(name)
        outcomes[name] = outcome = before or _backend(run, name, settings, material, progress, keep=keep)
        if before is None:
            kept.write(name, outcome)
            interrupt.leave_if_asked(f"what {', '.join(outcomes)} answered is kept where it passed")
    report = _assemble(run, material, outcomes)
    Manifest(run.manifest).record_served({name: ServedRecord.from_json(one.entry) for name, one in outcomes.items()})
    return report


def _backend(run: RunFolder, name: str, settings: Settings, material: Material, progress: Callable[[str], None], *, keep: bool) -> Outcome:  # fmt: skip
    attached = backends.find(run, name, settings) is not None
    started = backends.start(run, name, settings, Options(purpose="verify", owner=os.getpid()))
    if started.endpoint is None:
        return absent(name, started.status, started.reason)
    try:
        progress(f"{name}: {len(material.rows)} prompts")
        return wait_for(_question(started.endpoint, material, progress))
    except PipelineError as error:
        return absent(name, "failed", str(error), started.endpoint)
    finally:
        if not (keep and attached):
            start.stop(run.path, name)


async def _question(endpoint: Endpoint, material: Material, progress: Callable[[str], None]) -> Outcome:
    rows, name = material.rows, endpoint.engine
    async with Prober(endpoint, material.max_tokens) as prober:
        found = [checks.listed(name, endpoint.model, await prober.models())]
        first, _ = await prober.chat(rows[0])
        found.append(checks.chat(name, first.text, material.tuned[0].text))
        parity = await checks.parity(prober, rows, material.prompts)
        probed, facts = await _probe(prober, material)
        found += [parity, *probed]
        streams = [await prober.stream(row) for row in rows[:_STREAMED]]
        count = 0

        def done() -> None:
            nonlocal count
            count += 1
            if count % 20 == 0 or count == len(rows):
                progress(f"{name}: {count} of {len(rows)} prompts answered")

        answers, speed = await ask_all(prober, rows, _concurrency(endpoint), done)
    scores = score(rows, answers)
    found.append(checks.streamed(name, streams, [a.text for a in answers[:_STREAMED]]))
    found.append(checks.exact(name, scores["exact"], material.tuned_score["exact"], len(material.rows)))
    found.append(checks.finish(name, scores["finish_stop"], material.tuned_score["finish_stop"], len(material.rows)))
    status = "failed" if any(check.status == "failed" for check in found) else "passed"
    same = sum(answer.text.strip() == reference.text.strip() for answer, reference in zip(answers, material.tuned, strict=True))
    entry = {
        **launched(endpoint),
        "status": status,
        "reason": "; ".join(f"{c.id}: {c.figure}" for c in found if c.status == "failed") or None,
        # a prompt passes when the served answer is the one the trained model gives in process
        "prompts": {"total": len(rows), "passed": same},
        "exact": scores["exact"],
        "fields": {k: v for k, v in scores.items() if k not in ("n", "exact", "finish_stop") and v is not None},
        "prompt_parity": None if parity.status == "skipped" else parity.status == "passed",
        "finish_stop": scores["finish_stop"],
        "ttft_ms": _first_tokens(streams),
        "tokens_per_second": round(speed, 1),
        **facts,
        "checks": [{"id": c.id, "status": c.status, "detail": c.figure} for c in found],
    }
    return Outcome(entry, found, answers)


async def _probe(prober: Prober, material: Material) -> tuple[list[Check], dict[str, Any]]:
    """What attacks, JSON schemas and tool calls do here: checks, and their part of the report entry."""
    probes = {
        "injection": await probe_injection(prober, material.yardstick),
        "structured_output": await structured_output(prober, material.rows[0]),
        "tool_calls": await tool_call(prober, material.yardstick.template.source),
    }
    return [check for check, _ in probes.values()], {name: facts for name, (_, facts) in probes.items()}


def _concurrency(endpoint: Endpoint) -> int:
    planned = (endpoint.plan or {}).get("max_num_seqs") or _CONCURRENCY
    return max(1, min(_CONCURRENCY, int(planned)))


def _first_tokens(streams: Sequence[Streamed]) -> dict[str, float] | None:
    """Median and 95th percentile of the time to the first token, ms; None when no answer had a token."""
    times = sorted(1000 * s.first_token for s in streams if s.chunks)
    if not times:
        return None
    return {name: round(times[min(len(times) - 1, int(share * len(times)))], 1) for name, share in (("p50", 0.5), ("p95", 0.95))}


def summary_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a backend, for a table."""
    shown = (
        "name",
        "status",
        "engine_version",
        "exact",
        "prompt_parity",
        "finish_stop",
        "ready_seconds",
        "tokens_per_second",
        "reason",
    )
    rows = [{key: entry.get(key) for key in shown} for entry in report["backends"]]
    return [
        {**row, **{f"TTFT {k}, ms": v for k, v in (e["ttft_ms"] or {}).items()}}
        for row, e in zip(rows, report["backends"], strict=True)
    ]


def require_passed(report: Mapping[str, Any]) -> None:
    """Raise VerificationFailed with the failed checks when the report did not pass."""
    failed = [f"{check['id']}: {check['detail']}" for check in report["checks"] if check["status"] == "failed"]
    if failed:
        raise VerificationFailed("verification failed", evidence="\n".join(failed), remedy="open the run's report/report.html")


def _assemble(run: RunFolder, material: Material, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    manifest = Manifest(run.manifest)
    training = manifest.require_training()
    evaluation = {"base": score(material.rows, material.base), "tuned": material.tuned_score}
    found = [*_line_checks(training, evaluation), *run_checks(run), *(c for o in outcomes.values() for c in o.checks)]
    served = [o for o in outcomes.values() if o.entry["status"] != "skipped"]
    if not served:
        found.append(Check("backends", "failed", "no backend could be started on this machine"))
    return {
        "schema": 1,
        "run": run.name,
        "passed": all(check.status != "failed" for check in found),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": asdict(training.base),
        "eval": evaluation,
        "training": {
            **{key: getattr(training, key) for key in ("method", "trainer", "dtype", "steps", "tokens_per_second", "history")},
            "seconds": training.train_seconds,
            "parameters": training.parameters,
        },
        "backends": [outcome.entry for outcome in outcomes.values()],
        "checks": [{"id": c.id, "status": c.status, "detail": c.figure} for c in found],
        "examples": _examples(material, outcomes),
        "manifest": {
            name: {key: stage.raw[key] for key in ("artefacts", "seconds", "finished_at")}
            for name, stage in manifest.stages.items()
        },
        "hardware": Hardware.detect().to_json(),
        "settings": [asdict(setting) for setting in resolved()],
        "not_tested": _not_tested(),
    }


def _line_checks(training: TrainingRecord, evaluation: dict[str, Any]) -> list[Check]:
    loss, base, tuned = training.eval_loss, evaluation["base"], evaluation["tuned"]
    asked = training.parameters
    # a run cut short on purpose (a test, a try-out) is not held to what the whole one reaches
    demo = asked["base"] == "embedded" and asked["data"] == "soc" and not training.cut_short
    found = [
        held(
            "training.learned",
            loss["after"] < loss["before"],
            f"held-out loss {loss['before']:.3f} before, {loss['after']:.3f} after",
        ),
        held(
            "eval.not_worse",
            tuned["exact"] >= base["exact"],
            f"exact {base['exact']:.3f} before, {tuned['exact']:.3f} after, {tuned['n']} rows",
        ),
    ]
    if demo:
        found.append(
            held(
                "eval.exact", tuned["exact"] >= DEMO_MIN_EXACT, f"exact {tuned['exact']:.3f}, at least {DEMO_MIN_EXACT} expected"
            )
        )
    return found


def _examples(material: Material, outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    """Some rows with every answer: first those that any backend gets wrong, then the others."""
    answered = {name: o.answers for name, o in outcomes.items() if o.answers}

    def trouble(i: int) -> int:
        return -sum(answers[i].text.strip() != material.rows[i].expected.strip() for answers in answered.values())

    wrong_first = sorted(range(len(material.rows)), key=trouble)
    chosen = sorted({*wrong_first[: _EXAMPLES // 3], *range(_EXAMPLES - _EXAMPLES // 3)} & set(range(len(material.rows))))
    return [
        {
            "prompt": material.rows[i].prompt,
            "expected": material.rows[i].expected,
            "base": material.base[i].text,
            "tuned": material.tuned[i].text,
            "answers": {name: answers[i].text for name, answers in answered.items()},
        }
        for i in chosen
    ]


def _not_tested() -> list[str]:
    hardware = Hardware.detect()
    notes = [] if hardware.gpus else ["No GPU on this machine: GPU training and GPU serving were not run."]
    return [*notes, "Load beyond 32 requests at a time was not measured."]
