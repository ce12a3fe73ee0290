"""Fine-tune: data and base in, ``adapter/`` out, with the loss history and proof that something was learnt."""

import contextlib
import logging
import math
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, EnvironmentFailure, InputError, PipelineError
from pipeline.runs import interrupt, lease, lock
from pipeline.runs.files import read_json, require_free_space, staged, write_atomic, write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.stages import Force, StageResult, run_stage
from training import preflight
from training.base import BaseModel, resolve
from training.datasets.dataset import SOC_EVAL, SOC_TRAIN, Dataset, Row, load, overlap, split
from training.memory import finetune_need, require_memory
from training.parameters import FinetuneParameters, content
from training.tuning import checkpoints, distributed, trainers
from training.tuning.distributed import Plan
from training.tuning.prepare import Prepared, Preparer, held_out_line
from training.tuning.view import account, told

log = logging.getLogger(__name__)
STAGE = "finetune"
_RECIPE = 1
_ROWS = 1  # how rows are prepared that are more than plain text
_MARK = re.compile(r"<[^<>\s]+>")
_EVAL_ROWS = 32


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows held out, with the files they came from (``train``, and ``eval`` where it is one of its own)."""

    train: list[Row]
    held_out: list[Row]
    files: dict[str, Dataset]

    @property
    def sha256(self) -> dict[str, str]:
        """Hashes of the files."""
        return {part: dataset.sha256 for part, dataset in self.files.items()}


@dataclass(frozen=True)
class Job:
    """One fine-tune, ready to begin: what is trained and scored on, and the dated inputs that its checkpoints belong to."""

    run: RunFolder
    params: FinetuneParameters
    base: BaseModel
    rows: Prepared
    held_out: Prepared
    noted: dict[str, Any]
    trainer: tuple[str, str]  # which, and why
    plan: Plan

    def counts(self) -> dict[str, Any]:
        """Rows and tokens, as the manifest keeps them."""
        used = {"train": len(self.rows.examples), "held_out": len(self.held_out.examples)}
        rows = {**used, "too_long": list(self.rows.too_long), "neutralised": self.rows.neutralised}
        return {"rows": rows, "tokens": {"all": self.rows.tokens, "trained": self.rows.trained_tokens}}


def read_files(params: FinetuneParameters) -> dict[str, Dataset]:
    """The datasets that parameters name: ``train``, and ``eval`` where the held-out rows have a file of their own."""
    built_in = params.data == "soc"
    sources = {"train": SOC_TRAIN if built_in else params.data, "eval": params.eval_data or (SOC_EVAL if built_in else None)}
    reading, skip_bad = params.reading(), params.skip_bad
    return {part: load(source, reading, skip_bad=skip_bad) for part, source in sources.items() if source is not None}


def read_split(params: FinetuneParameters) -> Split:
    """Load the training rows and the held-out rows; a held-out prompt that is also in training is refused.

    Without ``eval_data`` a share of the user's rows is held out; ``soc`` is the built-in set with its own held-out file.
    """
    files = read_files(params)
    if "eval" in files:
        rows, held_out = list(files["train"].rows), list(files["eval"].rows)
    else:
        rows, held_out = split(files["train"].rows, params.eval_share, params.seed)
    if leaked := overlap(rows, held_out):
        evidence = ", ".join(row.where for row in leaked[:5])
        remedy = "remove them from one of the two files: a score on seen prompts proves nothing"
        raise DataError(f"{len(leaked)} held-out prompts are also in the training rows", evidence=evidence, remedy=remedy)
    return Split(rows[: params.max_rows], held_out, files)


def finetune(run: RunFolder, params: FinetuneParameters, *, force: Force = False, exports: bool = True) -> StageResult:
    """Train as ``params`` say and leave ``adapter/`` and ``heldout.jsonl`` in the run folder; skip when already done.

    ``exports``: the stages after it will run on this machine too, and have to fit it.
    """
    data = read_split(params)
    base = resolve(params.base, run.base_cache, params.revision)
    if base.lies_in(run):
        remedy = "train under another --name: the base is then kept"
        raise InputError(f"base {base.id} lies in run {run.name} itself, whose export would replace it", remedy=remedy)
    inputs = {"recipe": _RECIPE, "parameters": params.to_json(), "data": data.sha256, "base": base.to_json()}
    inputs["beside"] = params.beside(run.path)
    if any(map(_more_than_text, (*data.train, *data.held_out))):
        inputs["preparation"] = _ROWS

    def work() -> dict[str, Any]:
        # dated templates: one date a run, also when it is resumed; not among the inputs, for tomorrow it is the same training
        noted = checkpoints.dated(run.checkpoints, inputs)
        preflight.ask(run, base, params, exports=exports)
        preparer = Preparer(base.folder, datetime.fromisoformat(noted["date"]))
        skip = params.skip_bad
        rows, held_out = (preparer.prepare(part, params.max_length, skip_bad=skip) for part in (data.train, data.held_out))
        keys = account(list(data.files.values()), (rows, held_out))
        for line in told(keys):
            log.info("data: %s", line)
        said = (len(rows.examples), rows.tokens, rows.trained_tokens, len(rows.too_long))
        log.info("finetune: %d rows, %d tokens (%d trained), %d rows too long and left out", *said)
        longest = max(len(e.input_ids) for e in rows.examples)
        plan = distributed.planned(params, base.folder, longest)
        trainer = trainers.choose(params, base.folder, rows.examples, plan.processes)
        lower = "lower --batch-size (and raise --gradient-accumulation) or --max-length"
        # what is only needed here does not travel
        job = Job(run, params, base, replace(rows, pairs=()), replace(held_out, pairs=()), noted, trainer, plan)
        if plan.processes == 1:
            if plan.reason:
                log.info("finetune: one process: %s", plan.reason)
            require_memory(
                "fine-tuning", finetune_need(base.folder, params, longest, pieces=trainers.in_pieces(trainer[0])), lower
            )
            result = _train(job)
        else:
            log.info("finetune: %s; %s", plan.told(params), plan.reason or "each keeps all weights")
            require_memory(f"fine-tuning, in each of {plan.processes} processes,", plan.need, lower, plan.free, plan.where)
            result = distributed.run(_part, job, plan.processes, run.path)
        write_atomic(run.heldout, "".join(held_out_line(row, example, preparer) for row, example in held_out.pairs))
        # what a hub gave is found again without asking it
        kept = {"base_folder": str(base.folder.resolve())} if base.revision else {}
        return {**result, **kept, "account": keys, "date": noted["date"], "system": _shared_system(data.train)}

    with lock.held(run, "train"):
        done = run_stage(run, STAGE, inputs, [run.adapter, run.heldout], work, force=force, counts=content)
        lease.require_held(run.checkpoints)
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    return done


def _more_than_text(row: Row) -> bool:
    """Whether a row has what releases without receipts dropped or changed: tools, documents, weights, thoughts, an answer's marks."""
    if row.tools or row.documents or row.text is not None:
        return True
    return any(set(m) - {"role", "content"} or (m["role"] == "assistant" and _MARK.search(m["content"])) for m in row.messages)


def _shared_system(rows: Sequence[Row]) -> str | None:
    """The system message, when all rows begin with the same one."""
    first = {row.messages[0]["content"] if row.messages[0]["role"] == "system" else None for row in rows}
    return first.pop() if len(first) == 1 else None


def _part(job: Job) -> dict[str, Any]:
    """What each of several processes does; the first one, which writes, joins its parent's lock."""
    with lock.held(job.run, "train") if distributed.rank() == 0 else contextlib.nullcontext():
        return _train(job)


def _train(job: Job) -> dict[str, Any]:
    """Train, or go on from a checkpoint; leaves the adapter and returns what came of it."""
    run, params, plan = job.run, job.params, job.plan
    backend, reason = job.trainer
    dtype = trainers.training_dtype()
    log.info("trainer: %s (%s), dtype %s", backend, reason, dtype)
    model = trainers.trainable(job.base.folder, params, backend, dtype, sharded=plan.sharded)
    require_free_space(run.path, _disk_need(model), "fine-tuning (adapter and checkpoints)")
    batches = trainers.batching(model, backend, params, job.rows.examples)
    said = batches.reason or f"{batches.saved:.0%} of the tokens are beginnings that are computed once"
    log.info("finetune: batches are %s: %s", batches.kind, said)
    sets = (job.rows.examples, job.held_out.examples[:_EVAL_ROWS])
    trainer = trainers.make_trainer(model, run.checkpoints, params, dtype, *sets, batches, sharded=plan.sharded)
    log.info("finetune: model loaded; the held-out rows are scored before the first step")
    before = trainer.evaluate()["eval_loss"]
    started = time.monotonic()
    way = (backend, batches.kind, *(["fsdp"] if plan.sharded else []))
    checkpoint = distributed.once(lambda: checkpoints.latest(run.checkpoints, job.noted, way))
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds, state = time.monotonic() - started, trainer.state
    if state.global_step < state.max_steps:
        interrupt.leave_if_asked(f"the checkpoint of step {state.global_step} of {state.max_steps} is kept")
    after = trainer.evaluate()["eval_loss"]
    history = _history(state.log_history, before)
    _check_learning(history, model, params)
    _save(model, run.adapter, params, plan.sharded)
    distributed.agreed(False)  # none ends before it is there
    # a resumed training is timed from where it went on
    done = state.global_step - checkpoints.step(checkpoint)
    seen = done * params.batch_size * params.gradient_accumulation * job.rows.tokens / len(job.rows.examples)
    return {
        "trainer": backend,
        "trainer_reason": reason,
        "batches": batches.kind,
        "batches_reason": batches.reason,
        "processes": plan.processes,
        "parallel": plan.kind,
        "parallel_reason": plan.reason,
        "tokens_saved": round(batches.saved, 3),
        "method": params.method,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(model.device),
        "packages": _versions(),
        **job.counts(),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": state.global_step,
        "train_seconds": round(seconds, 1),
        "tokens_per_second": round(seen / seconds, 1),
        "eval_loss": {"before": before, "after": after},
        "history": history,
    }


def _save(model: Any, adapter: Path, params: FinetuneParameters, sharded: bool = False) -> None:
    parts = {"state_dict": distributed.trained_weights(model)} if sharded else {}
    if distributed.rank() > 0:
        return
    with staged(adapter) as target:
        model.save_pretrained(str(target), **parts)
        path = target / "adapter_config.json"
        if path.is_file():
            # PEFT writes these in the order of a Python set, which differs from process to process
            config = read_json(path).items()
            write_json(path, {k: sorted(v) if isinstance(v, list) and k.endswith("modules") else v for k, v in config})
        write_json(target / "finetune.json", params.to_json())


def _disk_need(model: Any) -> int:
    """Bytes of the adapter and of three checkpoints (two kept, one being written): weights and Adam's two moments each."""
    trained: int = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return 3 * 3 * trained + trained + 2**24


def _versions() -> dict[str, str]:
    """Installed versions of what shapes the result."""
    versions = {}
    for name in ("torch", "transformers", "peft", "unsloth", "accelerate", "tokenizers"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _history(log_history: list[dict[str, Any]], before: float) -> list[dict[str, Any]]:
    """Per-step records with loss, learning rate, gradient norm and held-out loss, in step order."""
    steps: dict[int, dict[str, Any]] = {0: {"step": 0, "eval_loss": before}}
    for entry in log_history:
        kept: dict[str, Any] = {k: entry[k] for k in ("loss", "learning_rate", "grad_norm", "eval_loss") if k in entry}
        if kept and entry["step"] > 0:
            steps.setdefault(entry["step"], {"step": entry["step"]}).update(kept)
    return [steps[step] for step in sorted(steps)]


def _check_learning(history: list[dict[str, Any]], model: Any, params: FinetuneParameters) -> None:
    norms = [float(entry["grad_norm"]) for entry in history if "grad_norm" in entry]
    if norms and not any(norms):
        raise PipelineError("every gradient was zero: nothing was trained", remedy="try --trainer hf; report the model id")
    if any(not math.isfinite(float(e["loss"])) for e in history if "loss" in e):
        raise PipelineError("the loss became infinite or NaN", remedy="lower --learning-rate")
    if params.method == "full":
        return
    if not any(float(distributed.whole(p.detach()).abs().max()) for name, p in model.named_parameters() if "lora_B" in name):
        remedy = "try --trainer hf, a higher --learning-rate, or more steps"
        raise EnvironmentFailure("the adapter is all zeros after training", remedy=remedy)
