"""Verify: put every held-out prompt to every backend and judge the answers against the in-process reference."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline import engines
from pipeline.config import Settings
from pipeline.errors import PipelineError, VerificationFailed
from pipeline.net.client import wait_for
from pipeline.report.schema import parse
from pipeline.report.write import write_report
from pipeline.runs import interrupt
from pipeline.runs.files import read_json, write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_json
from pipeline.runs.manifest import Manifest, ServedRecord
from pipeline.runs.stages import Force, Partial, forced, product, run_stage
from pipeline.serve import backends
from pipeline.serve.start import explained
from pipeline.verify.assemble import Outcome, absent, assemble, judged
from pipeline.verify.evidence import Evidence, Plan, interrogate, launched, read_evidence, restored, stored
from pipeline.verify.material import Material, read_material

log = logging.getLogger(__name__)
BACKENDS = ("vllm", "llamacpp", "ollama")
STAGE = "verify"


def verify(
    run: RunFolder,
    names: Sequence[str],
    settings: Settings,
    *,
    keep: bool = False,
    limit: int | None = None,
    force: Force = False,
) -> dict[str, Any]:
    """Verify the run on each backend, write the report, and return it (see ``report.json``'s contract).

    A backend that already runs for this run is asked in any case; one that does not is started and stopped again. With none up
    and nothing changed since a verification that passed, nothing is done. ``keep`` leaves running what was running. A
    backend that cannot be had here is skipped with its reason, never passed. One that is not asked now stays in the report as it
    was, failed or skipped too, as long as the same is asked.
    """
    material, inputs = read_material(run, limit), inputs_of(run, settings, limit)

    def work() -> dict[str, Any]:
        # whichever backends were asked for then
        partial = Partial(run.report / "verify.part", sha256_json(inputs))
        report = _verify(run, names, settings, material, partial, keep=keep, kept=kept, left=left)
        partial.remove()
        return report

    manifest = Manifest(run.manifest)
    before = manifest.stage(STAGE)
    # backends that are not asked now keep what they answered, as long as the same was asked
    same = before is not None and {**before.inputs, "backends": None} == {**inputs, "backends": None}
    kept = read_evidence(run) if same else {}
    left = _without_answers(run, {*names, *kept}) if same else {}
    then = before.inputs if before and same else {"backends": []}
    passed = before is not None and before.result["passed"] and run.report_file.is_file()
    again = forced(force, STAGE) or not passed or any(backends.find(run, name, settings) for name in names)
    # those that were asked then, if that is still so; what is asked anew vouches only for itself and for what has answers
    unchanged = not again and {*names} <= {*then["backends"]} and manifest.holds(before, then)
    wanted = then if unchanged else {**inputs, "backends": list(dict.fromkeys([*kept, *names]))}
    run_stage(run, STAGE, wanted, [run.evidence], work, force=again)
    report: dict[str, Any] = read_json(run.report_file)
    return report


def inputs_of(run: RunFolder, settings: Settings, limit: int | None) -> dict[str, Any]:
    """Everything that a backend's outcome depends on: artefacts, rows, references, settings, this product, its packages."""
    manifest = Manifest(run.manifest)
    parts = [run.merged, run.gguf, run.modelfile, run.heldout, run.reference("base"), run.reference("tuned")]
    seals = {path.name: manifest.sha256(path) for path in parts if path.exists()}
    # a permission changes no answer
    said = {key: value for key, value in settings.model_dump(mode="json").items() if not key.endswith("_remote_ok")}
    return {"artefacts": seals, "settings": sha256_json(said), "limit": limit, **product()}


def _verify(
    run: RunFolder,
    names: Sequence[str],
    settings: Settings,
    material: Material,
    partial: Partial,
    *,
    keep: bool,
    kept: Mapping[str, Evidence],
    left: Mapping[str, Outcome],
) -> dict[str, Any]:
    collected, outcomes = restored(partial.done), dict[str, Outcome]()
    others = {name: evidence for name, evidence in kept.items() if name not in names}
    for name, said in others.items():
        log.info("%s: not asked now, its answers of %s stay in the report", name, said.at)
        outcomes[name] = judged(said, material)
    for name, outcome in left.items():
        again = f"granite-pipeline verify --backends {name}"
        log.warning("%s: not asked now, and %s before; %s asks it again", name, outcome.entry.status, again)
        outcomes[name] = outcome
    for name in names:
        if name in collected:
            log.info("%s: passed before the interruption, not asked again", name)
            outcomes[name] = judged(collected[name], material)
            continue
        outcomes[name], evidence = _backend(run, name, settings, material, keep=keep)
        if evidence is not None:
            collected[name] = evidence
            if outcomes[name].entry.status == "passed":  # another would be worth a second try
                partial.add(stored({name: evidence}))
        interrupt.leave_if_asked(f"what {', '.join(outcomes)} answered is kept where it passed")
    report = assemble(run, material, outcomes)
    write_report(report.model_dump(mode="json", by_alias=True, exclude_unset=True), run.report)
    write_json(run.evidence, stored({**others, **{name: collected[name] for name in names if name in collected}}))
    served = {name: ServedRecord.from_json(outcome.entry.model_dump()) for name, outcome in outcomes.items()}
    Manifest(run.manifest).record_served(served)
    return {"passed": report.passed}


def _without_answers(run: RunFolder, others: Collection[str]) -> dict[str, Outcome]:
    """Backends but the ``others`` that failed or were skipped in the run's last verification, as its report has them."""
    try:
        entries = {entry.name: entry for entry in parse(read_json(run.report_file)).backends}
    except (PipelineError, OSError, ValueError):
        entries = {}
    found = {}
    for name, record in Manifest(run.manifest).served.items():
        if name in others or name not in engines.NAMES:
            continue
        entry = entries.get(name)
        if entry is None or entry.status == "passed":
            status = "skipped" if record.status == "skipped" else "failed"
            entry = absent(name, status, "what it answered in an earlier verification is gone").entry
        found[name] = Outcome(entry, tuple(entry.checks))
    return found


def _backend(run: RunFolder, name: str, settings: Settings, material: Material, *, keep: bool) -> tuple[Outcome, Evidence | None]:
    with backends.borrowed(run, name, settings, keep=keep) as started:
        if started.endpoint is None:
            return absent(name, started.status, started.reason), None
        try:
            plan = Plan(tuple(range(len(material.rows))), features=True)
            evidence = wait_for(interrogate(started.endpoint, run, material, plan, log.info))
            return judged(evidence, material), evidence
        except PipelineError as error:
            said = launched(started.endpoint, run)
            return absent(name, "failed", str(explained(started.endpoint, error)), said), None


def summary_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a backend, for a table."""
    shown = ("name", "status", "engine_version", "exact", "prompt_parity", "finish_stop", "ready_seconds", "tokens_per_second")
    return [
        {key: entry.get(key) for key in (*shown, "reason")}
        | {f"TTFT {share}, ms": value for share, value in (entry["ttft_ms"] or {}).items()}
        for entry in report["backends"]
    ]


def require_passed(report: Mapping[str, Any]) -> None:
    """Raise VerificationFailed with the failed checks when the report did not pass."""
    failed = [f"{check['id']}: {check['detail']}" for check in report["checks"] if check["status"] == "failed"]
    if failed:
        broken = [str(entry["name"]) for entry in report["backends"] if entry["status"] == "failed"]
        again = f"; `granite-pipeline verify --backends {','.join(broken)}` asks again" if broken else ""
        remedy = f"open the run's report/report.html{again}"
        raise VerificationFailed("verification failed", evidence="\n".join(failed), remedy=remedy)
