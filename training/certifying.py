"""Certify a run: gather its base, data and evidence, judge every link, write certificate and report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.certify import adapter, custody, gguf_file, merged, stopping, tuned
from pipeline.certify.cache import Cache
from pipeline.certify.certificate import Certificate, make, save
from pipeline.certify.finding import Finding, held, skipped
from pipeline.certify.subject import Data, Subject, hashes
from pipeline.errors import DataError, InputError, PipelineError
from pipeline.manifest import Manifest
from pipeline.runs import RunFolder
from pipeline.score import read_held_out, read_reference
from pipeline.tensors import TensorFolder
from training.base import resolve
from training.data import load, overlap
from training.finetune import read_split
from training.parameters import FinetuneParameters

log = logging.getLogger(__name__)


def certify_offline(run: RunFolder) -> Certificate:
    """Every link that files alone can prove, without a server and without loading a model."""
    subject = read_subject(run)
    certificate = make(run, offline_findings(subject), described(subject), offline=True)
    save(certificate, run.certificate)
    return certificate


def read_subject(run: RunFolder) -> Subject:
    """The run with hashes taken now, its base and its dataset; InputError when nothing was exported."""
    manifest = Manifest(run.manifest)
    if not manifest.stage("finetune"):
        raise InputError(f"run {run.name} has no manifest of a training", remedy=f"granite-pipeline run --name {run.name}")
    missing: dict[str, str] = {}
    inputs = manifest.stage("finetune")["inputs"]
    base = sha256 = data = None
    try:
        found = resolve(inputs["parameters"]["base"], run.output / ".base", inputs["base"]["revision"])
        base, sha256 = found.folder, found.sha256
    except (PipelineError, KeyError) as error:
        missing["base"] = f"the base model cannot be had here: {str(error).splitlines()[0]}"
    try:
        data = _data(run, FinetuneParameters(**inputs["parameters"]))
    except (InputError, OSError, TypeError) as error:
        missing["data"] = f"the dataset cannot be read here: {str(error).splitlines()[0]}"
    return Subject(run, manifest, base, sha256, data, missing, hashes(run))


def _data(run: RunFolder, params: FinetuneParameters) -> Data:
    try:
        split = read_split(params)
    except DataError as error:
        if "held-out prompts are also in the training rows" not in error.message:
            raise
        return Data({}, tuple(error.evidence.split(", ")))
    held_out = load(str(run.heldout)).rows
    return Data(split.sha256, tuple(row.where for row in overlap(split.train, held_out)), len(split.train))


def described(subject: Subject) -> dict[str, object]:
    """What the certificate says it is about."""
    inputs = subject.stage("finetune")["inputs"]
    return {"base": inputs["base"], "data": inputs["data"], "artefacts": dict(subject.sha256), "parameters": inputs["parameters"]}


def offline_findings(subject: Subject) -> list[Finding]:
    """Links 1, 2, 3, 5, 6 and 7 as far as files can tell."""
    run = subject.run
    cache = Cache(run.certificate / "cache.json")
    found = [*_adapter(subject, cache), *_merge(subject, cache)]
    if run.gguf.is_file() and run.merged.is_dir():
        keys = {name: subject.sha256[name] for name in (run.merged.name, run.gguf.name)}
        found += cache.get("gguf", keys, lambda: gguf_file.check_gguf(run.merged, run.gguf))
    else:
        found.append(Finding("gguf.tensors", "failed", f"run {run.name} has no {run.gguf.name} or no {run.merged.name}"))
    return [*found, *_answers(subject), *custody.check_custody(subject)]


def _adapter(subject: Subject, cache: Cache) -> list[Finding]:
    run, base = subject.run, subject.base
    found = adapter.learnt(subject.stage("finetune")["result"])
    if subject.data is not None:
        leaked = subject.data.leaked
        figure = f"{len(leaked)} held-out prompts are training rows too ({', '.join(leaked[:3])})" if leaked else ""
        figure = figure or f"no held-out prompt among {subject.data.train_rows} training rows"
        found.append(held("adapter.held_out_unseen", not leaked, figure, "none", "a score on seen prompts proves nothing"))
    else:
        found.append(skipped("adapter.held_out_unseen", subject.missing["data"]))
    if base is None:
        return [skipped("adapter.moved", subject.missing["base"]), *found]
    keys = {"adapter": subject.sha256.get("adapter"), "base": subject.base_sha256}
    moved = cache.get("adapter", keys, lambda: [_moved(run.adapter, base, full=subject.full)])
    return [*moved, *found]


def _moved(folder: Path, base: Path, *, full: bool) -> Finding:
    if full:
        return adapter.moved_full(TensorFolder(folder), TensorFolder(base))
    return adapter.moved(folder, TensorFolder(base))


def _merge(subject: Subject, cache: Cache) -> list[Finding]:
    run, base = subject.run, subject.base
    if base is None:
        return [skipped("merge.tensors", subject.missing["base"])]
    keys = {name: subject.sha256.get(name) for name in ("adapter", run.merged.name)} | {"base": subject.base_sha256}

    def work() -> Sequence[Finding]:
        try:
            lora = None if subject.full else adapter.read_lora(run.adapter)
            tuned_weights = TensorFolder(run.adapter)
            weights = merged.compare_weights(TensorFolder(base), lora, tuned_weights, TensorFolder(run.merged))
        except (PipelineError, OSError, KeyError) as error:
            weights = [Finding("merge.tensors", "failed", str(error).splitlines()[0])]
        return [*weights, *merged.compare_files(base, run.merged)]

    return cache.get("merge", keys, work)


def _answers(subject: Subject) -> list[Finding]:
    """What the recorded in-process answers prove: the scores, the canaries and the stops."""
    run = subject.run
    try:
        rows = read_held_out(run.heldout)
        base, after = (read_reference(run.reference(which)) for which in ("base", "tuned"))
    except InputError as error:
        return [skipped("tuned.scores", error.message), *stopping.check_files(subject)]
    if not len(rows) == len(base) == len(after):
        wrong = Finding("tuned.scores", "failed", f"{len(base)} and {len(after)} reference answers to {len(rows)} held-out rows")
        return [wrong, *stopping.check_files(subject)]
    return [
        tuned.check_canaries(base, after),
        *tuned.check_scores(rows, base, after),
        *stopping.check_files(subject),
        stopping.check_turns(run, rows),
        stopping.check_answers("in_process", stopping.share_stopped(after), len(after), cut_short=subject.cut_short),
    ]
