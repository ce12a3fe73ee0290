"""Certify a run: gather its base, data and evidence, judge every link, write certificate and report."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from pipeline import engines
from pipeline.certify.certificate import Certificate, Subject, make, save
from pipeline.certify.links.own import load as load_own
from pipeline.certify.links.own import run_own, run_tasks
from pipeline.certify.links.served import CAST, MEASURED, MERGE, judge
from pipeline.config import Settings
from pipeline.errors import EnvironmentFailure, InputError, Interrupted, PipelineError
from pipeline.net.client import wait_for
from pipeline.report.check import Check, Status, guarded, held, skipped
from pipeline.runs import lock
from pipeline.runs.files import read_json, write_json
from pipeline.runs.folder import RunFolder
from pipeline.serve import backends
from pipeline.serve.start import Endpoint
from pipeline.verify.distributions import ROWS, Reference
from pipeline.verify.evidence import Evidence, Plan, interrogate, read_evidence, stored
from pipeline.verify.material import Material, read_material
from pipeline.verify.score import spread
from training.certify import probes
from training.certify.offline import described, offline_findings, read_subject

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scope:
    """Which backends are questioned, on how many held-out prompts, at how many positions of each; ``keep`` leaves servers up.

    ``own`` are the user's own checks (YAML files, module:function), ``tasks`` those of lm-evaluation-harness. ``unmerged``: what
    is questioned is the adapter as a server applies it to its base.
    """

    backends: tuple[str, ...]
    prompts: int = ROWS
    positions: int = 2
    keep: bool = True
    own: tuple[str, ...] = ()
    tasks: str = ""
    unmerged: bool = False


@dataclass(frozen=True)
class Asked:
    """What every backend is asked, and what the last verification knows of each."""

    material: Material
    rows: tuple[int, ...]
    reference: Reference
    known: Mapping[str, Evidence]


def quick(names: Sequence[str], *, keep: bool) -> Scope:
    """Beside ``verify``, which asks every prompt already: enough to tell another model apart, in seconds."""
    return Scope(tuple(names), prompts=16, positions=1, keep=keep)


def certify(run: RunFolder, settings: Settings, scope: Scope) -> Certificate:
    """Every link: from the files, with the models in process, and on each backend, which is attached to or started.

    A server that was up stays up (with ``scope.keep``). A backend that cannot be had here is skipped with its reason.
    """
    for spec in scope.own:
        load_own(spec)  # a mistake in it shows before any server starts
    for name in scope.backends:
        engines.get(name)
    subject = read_subject(run)
    if scope.unmerged and subject.training.full:
        raise InputError(f"run {run.name} was fine-tuned as a whole: it has no adapter", remedy="leave --unmerged out")
    with lock.held(run, "certify"):
        return _certify(run, subject, settings, scope)


def _certify(run: RunFolder, subject: Subject, settings: Settings, scope: Scope) -> Certificate:
    log.info("certify: files")
    findings, evidence = offline_findings(subject), dict[str, Evidence]()
    models, asked = _models(subject, scope)
    findings += models
    for name in scope.backends:
        if asked is None:
            findings.append(skipped(f"served.{name}", "there is no in-process reference to compare it with"))
        else:
            findings += guarded(f"served.{name}", partial(_backend, name, subject, settings, asked, scope, evidence))
    about = described(subject) | ({"served": "base + adapter, unmerged"} if scope.unmerged else {})
    certificate = make(run, findings, about, offline=False, judged_on={n: e.origin for n, e in evidence.items()})
    save(certificate, run.certificate)
    return certificate


def _models(subject: Subject, scope: Scope) -> tuple[list[Check], Asked | None]:
    """The findings of the models in process, and what the backends are then asked, unless it cannot be had."""
    if subject.base is None:
        return [skipped("merge.logits", subject.missing["base"])], None
    asked: Asked | None = None

    def work() -> list[Check]:
        nonlocal asked
        log.info("certify: the models in process")
        probes.probe(subject.run)
        reference = Reference.from_json(read_json(subject.run.probes))
        chosen = sorted({probe.row for probe in reference.held_out})
        if scope.prompts > ROWS:
            log.warning("certify: %d prompts have a reference in process and are asked, not %d", len(chosen), scope.prompts)
        rows = tuple(chosen[i] for i in spread(len(chosen), scope.prompts))
        asked = Asked(read_material(subject.run), rows, reference, read_evidence(subject.run))
        return in_process(reference)

    # what the machine lacks (memory, a package) breaks no link
    return guarded("merge.logits", work, fatal=(Interrupted, EnvironmentFailure)), asked


def in_process(reference: Reference) -> list[Check]:
    """Base + adapter against the merged sum, and the sum against its float16 cast, as next-token distributions."""
    found = []
    for check_id, key, bound in (("merge.logits", "merge", MERGE), ("merge.cast_logits", "cast", CAST)):
        seen = reference.figures.get(key)
        if seen is None:
            found.append(skipped(check_id, "full fine-tuning has no adapter to add"))
            continue
        ok = seen["kl"] <= bound.kl and seen["top1"] >= bound.top1 and seen["max_difference"] <= bound.gap
        figure = f"KL {seen['kl']:.1e}, largest difference {seen['max_difference']:.1e}, top-1 {seen['top1']:.1%} at {seen['n']} positions"
        stated = f"KL {bound.kl:.0e}, difference {bound.gap:g}, top-1 {bound.top1:.0%}"
        found.append(held(check_id, ok, figure, stated, MEASURED, **seen))
    drift = reference.figures["drift"]
    figure = f"on control prompts outside the data: KL from the base {drift['kl']:.2f} nats, top-1 agreement {drift['top1']:.1%}"
    source = "what this training does to other topics"
    return [*found, Check("tuned.drift", "passed", figure, "stated, not bounded", source, drift)]


def _backend(
    name: str, subject: Subject, settings: Settings, asked: Asked, scope: Scope, evidence: dict[str, Evidence]
) -> list[Check]:
    run, material = subject.run, asked.material
    with _endpoint(name, subject, settings, scope) as started:
        if started.endpoint is None:
            status: Status = "skipped" if started.status == "skipped" else "failed"
            return [Check(f"served.{name}", status, started.reason.partition("; to have it: ")[0])]
        known = None if scope.unmerged else asked.known.get(name)
        plan = Plan(asked.rows, scope.positions, asked.reference, known=known)
        evidence[name] = said = wait_for(interrogate(started.endpoint, run, material, plan, log.info))
        own = _own(started.endpoint, run, scope)
    write_json(run.certificate / f"evidence-{name}.json", stored({name: said})[name])
    before = f", with what verify asked {said.reused}" if said.reused else ""
    log.info("certify: %s answered in %.0f s%s", name, said.seconds, before)
    return [*judge(said, subject, asked.reference, material), *own]


def _endpoint(name: str, subject: Subject, settings: Settings, scope: Scope) -> AbstractContextManager[backends.Started]:
    """The backend to question: with the merged model, or the adapter on its base."""
    if not scope.unmerged:
        return backends.borrowed(subject.run, name, settings, keep=scope.keep)
    assert subject.base is not None  # without one nobody is asked
    return backends.borrowed_adapter(subject.run, name, settings, subject.base)


def _own(endpoint: Endpoint, run: RunFolder, scope: Scope) -> list[Check]:
    """The user's checks and tasks; one that cannot be asked fails by itself and leaves the other evidence standing."""
    asked: list[tuple[str, Callable[[], Check]]] = [(spec, partial(run_own, spec, endpoint, run)) for spec in scope.own]
    asked += [(scope.tasks, partial(run_tasks, endpoint, run, scope.tasks))] if scope.tasks else []
    found = []
    for name, ask in asked:
        try:
            found.append(ask())
        except PipelineError as error:
            found.append(Check(f"own.{endpoint.engine}", "failed", f"{name} could not be asked: {error}"))
    return found
