"""Link 7: dataset -> base -> adapter -> merged -> GGUF -> Modelfile -> launch, each joint held by a SHA-256 taken again now."""

from collections.abc import Callable
from itertools import pairwise

from pipeline import engines
from pipeline.certify.certificate import Subject
from pipeline.report.check import Check, Status, guarded, held, skipped
from pipeline.runs.hashes import sha256_json
from pipeline.runs.manifest import ServedRecord
from pipeline.runs.stages import LOOKING
from pipeline.verify.score import read_held_out, read_reference, rows_asked, score, whole

_SHA = "SHA-256, taken again now"
# (stage whose input it is, input, artefact that it must be)
_JOINTS = (
    ("merge", "adapter", "finetune", "adapter"),
    ("gguf", "merged", "merge", "merged_fp16"),
    ("modelfile", "gguf", "gguf", "unsloth.Q8_0.gguf"),
    ("evaluate_tuned", "model", "merge", "merged_fp16"),
    ("evaluate_tuned", "heldout", "finetune", "heldout.jsonl"),
    ("evaluate_base", "heldout", "finetune", "heldout.jsonl"),
)
_NEEDED = ("finetune", "merge", "gguf", "evaluate_base", "evaluate_tuned")
_MODEL_FLAGS = ("--model", "--model-path")


def check_custody(subject: Subject) -> list[Check]:
    """Artefacts, joints, base, dataset, the manifest's own records, recorded scores and launches."""
    lacking = [name for name in _NEEDED if name not in subject.manifest.stages]
    if lacking:
        figure = f"the manifest has no record of {', '.join(lacking)}"
        return [Check("custody.chain", "failed", figure, "every stage recorded")]

    def made(check: Callable[[Subject], Check]) -> list[Check]:
        return guarded(f"custody.{check.__name__.lstrip('_')}", lambda: [check(subject)])

    every = (_artefacts, _chain, _base, _dataset, _records, _scores, _launch)
    return [found for check in every for found in made(check)]


def _artefacts(subject: Subject) -> Check:
    problems, count = [], 0
    stages = {name: stage for name, stage in subject.manifest.stages.items() if name not in LOOKING}
    for name, stage in stages.items():
        for path, seal in stage.artefacts.items():
            if path not in subject.sha256 and not (subject.run.path / path).exists():
                problems.append(f"{path} is gone")
            elif path in subject.sha256:
                count += 1
                if subject.sha256[path] != seal.sha256:
                    problems.append(f"{path} is not what {name} made ({subject.sha256[path][:12]}, recorded {seal.sha256[:12]})")
    recorded = {path for stage in stages.values() for path in stage.artefacts}
    problems += [f"{path} is no stage's artefact" for path in subject.sha256 if path not in recorded]
    figure = "; ".join(problems) or f"{count} artefacts unchanged"
    return held("custody.artefacts", not problems, figure, "equal hashes", _SHA, sha256=dict(subject.sha256))


def _chain(subject: Subject) -> Check:
    problems, count, stages = [], 0, subject.manifest.stages
    for stage, key, maker, path in _JOINTS:
        if stage not in stages:  # a Modelfile that could not be derived; the file itself is then no stage's artefact
            continue
        count += 1
        made = stages[maker].artefacts.get(path)
        have, want = stages[stage].inputs.get(key), made and made.sha256
        if have is None or have != want:
            problems.append(f"{stage} was made from another {path} ({str(have)[:12]}) than {maker} left ({str(want)[:12]})")
    base = subject.training.base.sha256
    for stage, key in (("merge", "base"), ("evaluate_base", "model")):
        count += 1
        if stages[stage].inputs.get(key) != base:
            problems.append(f"{stage} used another base than the training did")
    figure = "; ".join(problems) or f"{count} joints hold"
    return held("custody.chain", not problems, figure, "each input is the stage before's output", _SHA)


def _base(subject: Subject) -> Check:
    recorded = subject.training.base
    if subject.base_sha256 is None:
        return skipped("custody.base", subject.missing.get("base", "the base model is not here"))
    same = subject.base_sha256 == recorded.sha256
    figure = f"{recorded.id} {subject.base_sha256[:12]}" + ("" if same else f", trained on {recorded.sha256[:12]}")
    return held("custody.base", same, figure, "equal hashes", _SHA)


def _dataset(subject: Subject) -> Check:
    recorded = subject.training.data
    if subject.data is None:
        return skipped("custody.dataset", subject.missing.get("data", "the dataset is not here"))
    changed = [name for name, sha256 in recorded.items() if subject.data.sha256.get(name) != sha256]
    figure = ", ".join(f"{name} {sha256[:12]}" for name, sha256 in subject.data.sha256.items())
    problem = f"; changed since the training: {', '.join(changed)}" if changed else ""
    return held("custody.dataset", not changed, figure + problem, "equal hashes", _SHA)


def _records(subject: Subject) -> Check:
    """The manifest says of itself that nobody edited it: every stage's key and seal."""
    stages = subject.manifest.stages
    wrong = [n for n, stage in stages.items() if stage.intact is False or stage.key != sha256_json(stage.inputs)]
    unsealed = [name for name, stage in stages.items() if stage.intact is None]
    status: Status = "failed" if wrong else "warning" if unsealed else "passed"
    figure = f"no seal on {', '.join(unsealed)}: written by an older version" if unsealed else f"{len(stages)} records as written"
    figure = f"edited after they were written: {', '.join(wrong)}" if wrong else figure
    return Check("custody.records", status, figure, "every record as written", "SHA-256 of each stage's record, stored with it")


def _scores(subject: Subject) -> Check:
    """The recorded held-out scores are those of the recorded answers."""
    problems, compared = [], 0
    for which in ("base", "tuned"):
        stage = subject.manifest.stage(f"evaluate_{which}")
        if stage and stage.result and subject.run.reference(which).is_file():
            compared += 1
            rows, answers = read_held_out(subject.run.heldout), read_reference(subject.run.reference(which))
            if not whole(rows, answers):
                problems.append(f"{which}: {len(answers)} answers to {len(rows)} held-out rows")
                continue
            again = {name: (stage.result.get(name), value) for name, value in score(*rows_asked(rows, answers), rows).items()}
            problems += [f"{which}: {name} {was} recorded, {now} now" for name, (was, now) in again.items() if was != now]
    if not compared:
        return skipped("custody.scores", "no recorded scores with their answers to compare")
    figure = "; ".join(problems) or "recorded scores follow from the answers"
    return held("custody.scores", not problems, figure, "equal", "scored again now")


def _launch(subject: Subject) -> Check:
    """The last launches served this run's artefacts, with flags and version recorded, and these records are as written."""
    records = subject.manifest.served
    served = {name: record for name, record in records.items() if record.argv}
    edited = [name for name, record in records.items() if not record.intact]
    if not served and not edited:
        return skipped("custody.launch", "no launch of this run is recorded yet")
    # a server in which the model is made is started without one
    told = [name for name in served if name not in engines.NAMES or not engines.get(name).creates_model]
    foreign = [name for name in told if not _of_run(served[name], subject)]
    nameless = [name for name, record in served.items() if not record.engine_version]
    problems = [f"the record of {name} is not as verify wrote it (granite-pipeline verify writes it anew)" for name in edited]
    problems += [f"{name} was started with a model that is not this run's" for name in foreign]
    problems += [f"{name}: no engine version" for name in nameless]
    figure = ", ".join(f"{name} {one.engine_version} (flags {sha256_json(one.argv)[:12]})" for name, one in served.items())
    return held("custody.launch", not problems, "; ".join([figure, *problems]), "this run's files", "argv recorded at the start")


def _of_run(record: ServedRecord, subject: Subject) -> bool:
    """Whether what an engine loaded is this run's file: by the hash taken then, wherever the file or this copy of it lies now."""
    told = [value for flag, value in pairwise(record.argv or ()) if flag in _MODEL_FLAGS]
    ours = (subject.run.merged, subject.run.gguf)
    if told and record.sha256:
        return record.sha256 in {subject.sha256.get(path.name) for path in ours}
    # one whose hash nobody took is known by its place alone; the last flag counts
    return bool(told) and (subject.run.path / told[-1]).resolve() in {path.resolve() for path in ours}
