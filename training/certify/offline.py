"""The links of the certificate that need no server: adapter, merge and answers, recomputed from the files."""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.certify import hub
from pipeline.certify.certificate import Certificate, Data, Subject, hashes, make, save
from pipeline.certify.links import adapter, custody, gguf, merged, stops, tuned
from pipeline.errors import DataError, PipelineError
from pipeline.model.safetensors import TensorFolder
from pipeline.report.check import Check, guarded, held, skipped
from pipeline.runs import lock
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.verify.score import read_held_out, read_reference, rows_asked, whole
from training.base import BaseModel
from training.datasets.dataset import Row, overlap
from training.parameters import FinetuneParameters
from training.tuning.finetune import read_files, read_split
from training.tuning.prepare import Preparer


def certify_offline(run: RunFolder, public_key: Path | None = None) -> Certificate:
    """Every link that files alone can prove, without a server and without loading a model.

    With a ``public_key`` the signed certificate is checked too, and left in its place.
    """
    subject = read_subject(run)
    signed = [hub.check_signed(run, public_key)] if public_key else []
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
    training = manifest.require_training()
    base = sha256 = data = None
    try:
        found = BaseModel.of_run(run)
        base, sha256 = found.folder, found.sha256
    except (PipelineError, OSError, LookupError, TypeError, ValueError) as error:
        missing["base"] = f"the base model cannot be had here: {str(error).splitlines()[0]}"
    try:
        places = training.places(run.path)
        same = (parameters for parameters in places if places[1:] and _sha256(parameters) == training.data)
        data = _data(run, FinetuneParameters(**next(same, training.parameters)))
    except (PipelineError, OSError, LookupError, TypeError, ValueError) as error:
        missing["data"] = f"the dataset cannot be read here: {str(error).splitlines()[0]}"
    return Subject(run, manifest, base, sha256, data, missing, hashes(run))


def _sha256(parameters: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the data files as they lie there now; none when they cannot be read."""
    with contextlib.suppress(PipelineError, OSError):
        return {part: dataset.sha256 for part, dataset in read_files(FinetuneParameters(**parameters)).items()}
    return {}


def _data(run: RunFolder, params: FinetuneParameters) -> Data:
    try:
        split = read_split(params)
    except DataError as error:
        if "held-out prompts are also in the training rows" not in error.message:
            raise
        files = read_files(params)
        hashes_now = {part: dataset.sha256 for part, dataset in files.items()}
        return Data(hashes_now, tuple(error.evidence.split(", ")), len(files["train"].rows))
    # as they are in heldout.jsonl: with thoughts and calls as the base writes them, and control tokens broken up
    preparer = Preparer(run.merged)
    train = [row for row, _ in preparer.attempt(split.train).pairs]
    held_out = [
        Row((*row.messages, {"role": "assistant", "content": row.expected}), f"{run.heldout}:{number}", None, row.documents)
        for number, row in enumerate(read_held_out(run.heldout), 1)
    ]
    return Data(split.sha256, tuple(row.where for row in overlap(train, held_out)), len(split.train))


def described(subject: Subject) -> dict[str, object]:
    """What the certificate says it is about."""
    training = subject.training
    made = {"artefacts": dict(subject.sha256), "parameters": training.parameters}
    stages = {which: subject.manifest.stage(f"evaluate_{which}") for which in ("base", "tuned")}
    # what answered in process, and in which dtype; a manifest of an older version says neither
    made["reference"] = {
        which: stage.result["reference"] for which, stage in stages.items() if stage and "reference" in stage.result
    }
    return {"base": asdict(training.base), "data": training.data, **made}


def offline_findings(subject: Subject) -> list[Check]:
    """Links 1, 2, 3, 5, 6 and 7 as far as files can tell."""
    run = subject.run
    found = [*_adapter(subject), *_merge(subject)]
    stage = subject.manifest.stage("gguf")
    pre = stage.result.get("pre") if stage else None  # a manifest of an older version has none
    found += guarded("gguf.tensors", lambda: gguf.check_gguf(run.merged, run.gguf, pre))
    found += [*stops.check_files(subject), *guarded("tuned.scores", lambda: _answers(subject))]
    return [*found, *guarded("custody.chain", lambda: custody.check_custody(subject))]


def _adapter(subject: Subject) -> list[Check]:
    base = subject.base
    found = guarded("adapter.gradients", lambda: adapter.learnt(subject.training))
    if subject.data is not None:
        leaked = subject.data.leaked
        figure = f"{len(leaked)} held-out prompts are training rows too ({', '.join(leaked[:3])})" if leaked else ""
        figure = figure or f"no held-out prompt among {subject.data.train_rows} training rows"
        found.append(held("adapter.held_out_unseen", not leaked, figure, "none", "a score on seen prompts proves nothing"))
    else:
        found.append(skipped("adapter.held_out_unseen", subject.missing["data"]))
    if base is None:
        return [skipped("adapter.moved", subject.missing["base"]), *found]

    def moved() -> list[Check]:
        if subject.training.full:
            return [adapter.moved_full(TensorFolder(subject.run.adapter), TensorFolder(base))]
        return [adapter.moved(subject.run.adapter, TensorFolder(base))]

    return [*guarded("adapter.moved", moved), *found]


def _merge(subject: Subject) -> list[Check]:
    run, base = subject.run, subject.base
    if base is None:
        return [skipped("merge.tensors", subject.missing["base"])]

    def work() -> list[Check]:
        lora, before = None if subject.training.full else adapter.read_lora(run.adapter), TensorFolder(base)
        tuned = TensorFolder(run.adapter) if subject.training.full else before  # an adapter folder alone holds no whole model
        return merged.compare_weights(before, lora, tuned, TensorFolder(run.merged))

    return [*guarded("merge.tensors", work), *merged.compare_files(base, run.merged)]


def _answers(subject: Subject) -> list[Check]:
    """What the recorded in-process answers prove: the scores, the canaries and the stops."""
    run = subject.run
    rows = read_held_out(run.heldout)
    base, after = (read_reference(run.reference(which)) for which in ("base", "tuned"))
    if not (whole(rows, base) and whole(rows, after)):
        return [Check("tuned.scores", "failed", f"{len(base)} and {len(after)} reference answers to {len(rows)} held-out rows")]
    asked, answers = rows_asked(rows, after)
    before = [base.get(i) for i in sorted(after)]
    return [
        tuned.check_canaries(asked, before, answers),
        *tuned.check_scores(asked, before, answers),
        *guarded("stops.turns", lambda: [stops.check_turns(run, rows)]),
        stops.check_answers("in_process", stops.share_stopped(answers), len(answers), cut_short=subject.training.cut_short),
    ]
