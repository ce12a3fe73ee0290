"""Certify a run: gather its base, data and evidence, judge every link, write certificate and report."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from pipeline import backends, engines, lock, serving
from pipeline.certify import adapter, custody, gguf_file, merged, signing, stopping, tuned
from pipeline.certify.bounds import CAST, MEASURED, MERGE, Bound
from pipeline.certify.certificate import Certificate, make, save
from pipeline.certify.distributions import ROWS, Reference
from pipeline.certify.evidence import Plan, collect
from pipeline.certify.finding import Finding, Status, guarded, held, skipped
from pipeline.certify.harness import run_tasks
from pipeline.certify.own import load as load_own
from pipeline.certify.own import run_own
from pipeline.certify.served import judge
from pipeline.certify.subject import Data, Subject, hashes, training_inputs
from pipeline.config import Settings
from pipeline.errors import DataError, EnvironmentFailure, Interrupted, PipelineError
from pipeline.files import read_json, write_json
from pipeline.manifest import Manifest
from pipeline.material import Material, read_material
from pipeline.runs import RunFolder
from pipeline.score import read_held_out, read_reference
from pipeline.serving import Endpoint, Options
from pipeline.tensors import TensorFolder
from pipeline.waiting import wait_for
from training import probes
from training.base import resolve
from training.data import load, overlap
from training.finetune import read_split
from training.parameters import FinetuneParameters

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scope:
    """Which backends are questioned, on how many held-out prompts, at how many positions of each; ``keep`` leaves servers up.

    ``own`` are the user's own checks (YAML files, module:function), ``tasks`` those of lm-evaluation-harness.
    """

    backends: tuple[str, ...]
    prompts: int = ROWS
    positions: int = 2
    keep: bool = True
    own: tuple[str, ...] = ()
    tasks: str = ""


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
    with lock.held(run, "certify"):
        return _certify(run, subject, settings, scope)


def _certify(run: RunFolder, subject: Subject, settings: Settings, scope: Scope) -> Certificate:
    log.info("certify: files")
    findings = offline_findings(subject)
    asked: list[tuple[Reference, Material, Plan]] = []
    findings += _models(subject, scope, asked)
    for name in scope.backends:
        if asked:
            findings += guarded(f"served.{name}", partial(_backend, name, subject, settings, asked[0], scope))
        else:
            findings.append(skipped(f"served.{name}", "there is no in-process reference to compare it with"))
    certificate = make(run, findings, described(subject), offline=False)
    save(certificate, run.certificate)
    return certificate


def _models(subject: Subject, scope: Scope, asked: list[tuple[Reference, Material, Plan]]) -> list[Finding]:
    """The findings of the models in process; what the backends are then asked is put into ``asked``, unless it cannot be had."""
    if subject.base is None:
        return [skipped("merge.logits", subject.missing["base"])]

    def work() -> list[Finding]:
        log.info("certify: the models in process")
        probes.probe(subject.run)
        reference, material = Reference.from_json(read_json(subject.run.probes)), read_material(subject.run)
        chosen = sorted({probe.row for probe in reference.held_out})
        if scope.prompts > ROWS:
            log.warning("certify: %d prompts have a reference in process and are asked, not %d", len(chosen), scope.prompts)
        plan = Plan(tuple(chosen[i] for i in probes.spread(len(chosen), scope.prompts)), scope.positions)
        asked.append((reference, material, plan))
        return in_process(reference)

    # what the machine lacks (memory, a package) breaks no link
    return guarded("merge.logits", work, fatal=(Interrupted, EnvironmentFailure))


def in_process(reference: Reference) -> list[Finding]:
    """Base + adapter against the merged sum, and the sum against its float16 cast, as next-token distributions."""
    found = []
    for check_id, key, bound in (("merge.logits", "merge", MERGE), ("merge.cast_logits", "cast", CAST)):
        seen = reference.figures.get(key)
        if seen is None:
            found.append(skipped(check_id, "full fine-tuning has no adapter to add"))
            continue
        ok = seen["kl"] <= bound.kl and seen["top1"] >= bound.top1 and seen["max_difference"] <= bound.gap
        figure = f"KL {seen['kl']:.1e}, largest difference {seen['max_difference']:.1e}, top-1 {seen['top1']:.1%} at {seen['n']} positions"
        found.append(held(check_id, ok, figure, _stated(bound), MEASURED, **seen))
    drift = reference.figures["drift"]
    figure = f"on control prompts outside the data: KL from the base {drift['kl']:.2f} nats, top-1 agreement {drift['top1']:.1%}"
    return [
        *found,
        Finding("tuned.drift", "passed", figure, "stated, not bounded", "what this training does to other topics", drift),
    ]


def _stated(bound: Bound) -> str:
    return f"KL {bound.kl:.0e}, difference {bound.gap:g}, top-1 {bound.top1:.0%}"


def _backend(
    name: str, subject: Subject, settings: Settings, asked: tuple[Reference, Material, Plan], scope: Scope
) -> list[Finding]:
    run, (reference, material, plan) = subject.run, asked
    attached = backends.find(run, name, settings) is not None
    started = backends.start(run, name, settings, Options(purpose="verify", owner=os.getpid()))
    if started.endpoint is None:
        status: Status = "skipped" if started.status == "skipped" else "failed"
        return [Finding(f"served.{name}", status, started.reason.partition("; to have it: ")[0])]
    try:
        log.info("certify: %s, %d prompts", name, len(plan.rows))
        evidence = wait_for(collect(started.endpoint, run, material, reference, plan))
        own = _own(started.endpoint, run, scope)
    finally:
        if not (scope.keep and attached):
            serving.stop(run.path, name)
    write_json(run.certificate / f"evidence-{name}.json", asdict(evidence))
    log.info("certify: %s answered in %.0f s", name, evidence.seconds)
    return [*judge(evidence, subject, reference, material.base, material.tuned), *own]


def _own(endpoint: Endpoint, run: RunFolder, scope: Scope) -> list[Finding]:
    """The user's checks and tasks; one that cannot be asked fails by itself and leaves the other evidence standing."""
    asked: list[tuple[str, Callable[[], Finding]]] = [(spec, partial(run_own, spec, endpoint, run)) for spec in scope.own]
    asked += [(scope.tasks, partial(run_tasks, endpoint, run, scope.tasks))] if scope.tasks else []
    found = []
    for name, ask in asked:
        try:
            found.append(ask())
        except PipelineError as error:
            found.append(Finding(f"own.{endpoint.engine}", "failed", f"{name} could not be asked: {error}"))
    return found


def certify_offline(run: RunFolder, public_key: Path | None = None) -> Certificate:
    """Every link that files alone can prove, without a server and without loading a model.

    With a ``public_key`` the signed certificate is checked too, and left in its place.
    """
    subject = read_subject(run)
    signed = [signing.check_signed(run, public_key)] if public_key else []
    # a check of a signed certificate changes nothing
    with contextlib.nullcontext() if signed else lock.held(run, "certify"):
        certificate = make(run, [*offline_findings(subject), *signed], described(subject), offline=True)
        if not signed:
            save(certificate, run.certificate)
    return certificate


def read_subject(run: RunFolder) -> Subject:
    """The run with hashes taken now, its base and its dataset; InputError when nothing was exported."""
    manifest = Manifest(run.manifest)
    missing: dict[str, str] = {}
    inputs = training_inputs(manifest)
    base = sha256 = data = None
    try:
        found = resolve(inputs["parameters"]["base"], run.output / ".base", inputs["base"]["revision"])
        base, sha256 = found.folder, found.sha256
    except (PipelineError, OSError, LookupError, TypeError, ValueError) as error:
        missing["base"] = f"the base model cannot be had here: {str(error).splitlines()[0]}"
    try:
        data = _data(run, FinetuneParameters(**inputs["parameters"]))
    except (PipelineError, OSError, LookupError, TypeError, ValueError) as error:
        missing["data"] = f"the dataset cannot be read here: {str(error).splitlines()[0]}"
    return Subject(run, manifest, base, sha256, data, missing, hashes(run))


def _data(run: RunFolder, params: FinetuneParameters) -> Data:
    try:
        split = read_split(params)
    except DataError as error:
        if "held-out prompts are also in the training rows" not in error.message:
            raise
        train = load(params.data)
        hashes_now = {"train": train.sha256} | ({"eval": load(params.eval_data).sha256} if params.eval_data else {})
        return Data(hashes_now, tuple(error.evidence.split(", ")), len(train.rows))
    held_out = load(str(run.heldout)).rows
    return Data(split.sha256, tuple(row.where for row in overlap(split.train, held_out)), len(split.train))


def described(subject: Subject) -> dict[str, object]:
    """What the certificate says it is about."""
    inputs = subject.stage("finetune")["inputs"]
    return {"base": inputs["base"], "data": inputs["data"], "artefacts": dict(subject.sha256), "parameters": inputs["parameters"]}


def offline_findings(subject: Subject) -> list[Finding]:
    """Links 1, 2, 3, 5, 6 and 7 as far as files can tell."""
    run = subject.run
    found = [*_adapter(subject), *_merge(subject)]
    pre = subject.stage("gguf").get("result", {}).get("pre")  # a manifest of an older version has none
    found += guarded("gguf.tensors", lambda: gguf_file.check_gguf(run.merged, run.gguf, pre))
    found += [*stopping.check_files(subject), *guarded("tuned.scores", lambda: _answers(subject))]
    return [*found, *guarded("custody.chain", lambda: custody.check_custody(subject))]


def _adapter(subject: Subject) -> list[Finding]:
    base = subject.base
    found = guarded("adapter.gradients", lambda: adapter.learnt(subject.stage("finetune")["result"]))
    if subject.data is not None:
        leaked = subject.data.leaked
        figure = f"{len(leaked)} held-out prompts are training rows too ({', '.join(leaked[:3])})" if leaked else ""
        figure = figure or f"no held-out prompt among {subject.data.train_rows} training rows"
        found.append(held("adapter.held_out_unseen", not leaked, figure, "none", "a score on seen prompts proves nothing"))
    else:
        found.append(skipped("adapter.held_out_unseen", subject.missing["data"]))
    if base is None:
        return [skipped("adapter.moved", subject.missing["base"]), *found]
    return [*guarded("adapter.moved", lambda: [_moved(subject.run.adapter, base, full=subject.full)]), *found]


def _moved(folder: Path, base: Path, *, full: bool) -> Finding:
    if full:
        return adapter.moved_full(TensorFolder(folder), TensorFolder(base))
    return adapter.moved(folder, TensorFolder(base))


def _merge(subject: Subject) -> list[Finding]:
    run, base = subject.run, subject.base
    if base is None:
        return [skipped("merge.tensors", subject.missing["base"])]

    def work() -> list[Finding]:
        lora = None if subject.full else adapter.read_lora(run.adapter)
        return merged.compare_weights(TensorFolder(base), lora, TensorFolder(run.adapter), TensorFolder(run.merged))

    return [*guarded("merge.tensors", work), *merged.compare_files(base, run.merged)]


def _answers(subject: Subject) -> list[Finding]:
    """What the recorded in-process answers prove: the scores, the canaries and the stops."""
    run = subject.run
    rows = read_held_out(run.heldout)
    base, after = (read_reference(run.reference(which)) for which in ("base", "tuned"))
    if not len(rows) == len(base) == len(after):
        return [Finding("tuned.scores", "failed", f"{len(base)} and {len(after)} reference answers to {len(rows)} held-out rows")]
    return [
        tuned.check_canaries(base, after),
        *tuned.check_scores(rows, base, after),
        *guarded("stops.turns", lambda: [stopping.check_turns(run, rows)]),
        stopping.check_answers("in_process", stopping.share_stopped(after), len(after), cut_short=subject.cut_short),
    ]
