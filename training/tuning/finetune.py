"""Fine-tune: data and base in, ``adapter/`` out, with the loss history and proof that something was learnt."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, EnvironmentFailure, InputError, PipelineError
from pipeline.runs import interrupt, lock
from pipeline.runs.files import read_json, require_free_space, staged, write_atomic, write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.stages import Force, StageResult, run_stage
from training.base import BaseModel, resolve
from training.datasets import soc
from training.datasets.dataset import Row, load, overlap, split
from training.memory import finetune_need, longest_row, require_memory
from training.parameters import FinetuneParameters
from training.progress import progress_callback
from training.tuning import checkpoints, trainers
from training.tuning.prepare import IGNORED, Example, Prepared, Preparer

log = logging.getLogger(__name__)
STAGE = "finetune"
BUILT_IN = "soc"
_RECIPE = 1
_EVAL_ROWS = 32


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows held out, with the hashes of the files they came from."""

    train: list[Row]
    held_out: list[Row]
    sha256: dict[str, str]


def read_split(params: FinetuneParameters) -> Split:
    """Load the training rows and the held-out rows; a held-out prompt that is also in training is refused.

    Without ``eval_data`` a share of the user's rows is held out; ``soc`` is the built-in set with its own held-out file.
    """
    built_in = params.data == BUILT_IN
    train = load(soc.TRAIN if built_in else params.data)
    eval_source = params.eval_data or (soc.EVAL if built_in else None)
    if eval_source is None:
        rows, held_out = split(train.rows, params.eval_share, params.seed)
        hashes = {"train": train.sha256}
    else:
        evaluation = load(eval_source)
        rows, held_out = list(train.rows), list(evaluation.rows)
        hashes = {"train": train.sha256, "eval": evaluation.sha256}
    leaked = overlap(rows, held_out)
    if leaked:
        raise DataError(
            f"{len(leaked)} held-out prompts are also in the training rows",
            evidence=", ".join(row.where for row in leaked[:5]),
            remedy="remove them from one of the two files: a score on seen prompts proves nothing",
        )
    return Split(rows[: params.max_rows], held_out, hashes)


def finetune(run: RunFolder, params: FinetuneParameters, *, force: Force = False) -> StageResult:
    """Train as ``params`` say and leave ``adapter/`` and ``heldout.jsonl`` in the run folder; skip when already done."""
    data = read_split(params)
    base = resolve(params.base, run.base_cache, params.revision)
    _require_apart(run, base)
    inputs = {"recipe": _RECIPE, "parameters": params.to_json(), "data": data.sha256, "base": base.to_json()}

    def work() -> dict[str, Any]:
        # dated templates: one date a run, also when it is resumed; not among the inputs, for tomorrow it is the same training
        noted = checkpoints.dated(run.checkpoints, inputs)
        preparer = Preparer(base.folder, datetime.fromisoformat(noted["date"]))
        prepared = preparer.prepare(data.train, params.max_length)
        held_out = preparer.prepare(data.held_out, params.max_length)
        log.info("finetune: %d rows, %d tokens (%d trained), %d rows too long and left out", len(prepared.examples), prepared.tokens, prepared.trained_tokens, len(prepared.too_long))  # fmt: skip
        need = finetune_need(base.folder, params, longest_row(prepared.examples))
        require_memory("fine-tuning", need, "lower --batch-size (and raise --gradient-accumulation) or --max-length")
        result = _train(run, params, base, prepared, held_out, noted)
        result["date"] = noted["date"]
        result["system"] = _shared_system(data.train)
        write_atomic(run.heldout, "".join(_jsonl(preparer.clean(row)) for row in data.held_out))
        return result

    with lock.held(run, "train"):
        done = run_stage(run, STAGE, inputs, [run.adapter, run.heldout], work, force=force)
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    return done


def _require_apart(run: RunFolder, base: BaseModel) -> None:
    if base.folder.resolve().is_relative_to(run.path.resolve()):
        raise InputError(
            f"base {base.id} lies in run {run.name} itself, whose export would replace it",
            remedy="train under another --name: the base is then kept",
        )


def _shared_system(rows: Sequence[Row]) -> str | None:
    """The system message, when all rows begin with the same one."""
    first = {row.messages[0]["content"] if row.messages[0]["role"] == "system" else None for row in rows}
    return first.pop() if len(first) == 1 else None


def _jsonl(row: Row) -> str:
    tools = {"tools": list(row.tools)} if row.tools else {}
    return json.dumps({"messages": list(row.messages), **tools}, ensure_ascii=False) + "\n"


def _train(run: RunFolder, params: FinetuneParameters, base: BaseModel, rows: Prepared, held_out: Prepared, noted: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    from transformers import set_seed

    backend, reason = trainers.choose(params, base.folder)
    dtype = trainers.training_dtype()
    log.info("trainer: %s (%s), dtype %s", backend, reason, dtype)
    set_seed(params.seed)
    model = trainers.trainable(base.folder, params, backend, dtype)
    require_free_space(run.path, _disk_need(model), "fine-tuning (adapter and checkpoints)")
    trainer = _trainer(model, run.checkpoints, params, dtype, rows.examples, held_out.examples[:_EVAL_ROWS])
    before = trainer.evaluate()["eval_loss"]
    started = time.monotonic()
    checkpoint = checkpoints.latest(run.checkpoints, noted)
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - started
    if trainer.state.global_step < trainer.state.max_steps:
        interrupt.leave_if_asked(f"the checkpoint of step {trainer.state.global_step} of {trainer.state.max_steps} is kept")
    after = trainer.evaluate()["eval_loss"]
    history = _history(trainer.state.log_history, before)
    _check_learning(history, model, params)
    with staged(run.adapter) as target:
        model.save_pretrained(str(target))
        _settle_adapter(target)
        write_json(target / "finetune.json", params.to_json())
    steps = trainer.state.global_step
    # a resumed training is timed from where it went on
    seen = (
        (steps - checkpoints.step(checkpoint))
        * params.batch_size
        * params.gradient_accumulation
        * rows.tokens
        / len(rows.examples)
    )
    return {
        "trainer": backend,
        "trainer_reason": reason,
        "method": params.method,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(model.device),
        "packages": _versions(),
        "rows": {"train": len(rows.examples), "held_out": len(held_out.examples), "too_long": list(rows.too_long), "neutralised": rows.neutralised},
        "tokens": {"all": rows.tokens, "trained": rows.trained_tokens},
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": steps,
        "train_seconds": round(seconds, 1),
        "tokens_per_second": round(seen / seconds, 1),
        "eval_loss": {"before": before, "after": after},
        "history": history,
    }  # fmt: skip


def _settle_adapter(folder: Path) -> None:
    """Sort what PEFT writes in the order of a Python set, which differs from process to process."""
    path = folder / "adapter_config.json"
    if path.is_file():
        config = read_json(path)
        write_json(path, {k: sorted(v) if isinstance(v, list) and k.endswith("modules") else v for k, v in config.items()})


def _disk_need(model: Any) -> int:
    """Bytes of the adapter and of three checkpoints (two kept, one being written): weights and Adam's two moments each."""
    trained: int = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return 3 * 3 * trained + trained + 2**24


def _trainer(model: Any, folder: Path, params: FinetuneParameters, dtype: Any, rows: Sequence[Example], held_out: Sequence[Example]) -> Any:  # fmt: skip
    import torch
    from transformers import Trainer, TrainingArguments

    steps_per_epoch = math.ceil(len(rows) / (params.batch_size * params.gradient_accumulation))
    total = params.max_steps or math.ceil(steps_per_epoch * params.epochs)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=total,
        per_device_train_batch_size=params.batch_size,
        per_device_eval_batch_size=params.batch_size,
        gradient_accumulation_steps=params.gradient_accumulation,
        learning_rate=params.peak_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(params.warmup_steps, total),
        weight_decay=params.weight_decay,
        optim="adamw_torch",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=max(1, total // 50),
        eval_strategy="steps",
        eval_steps=max(1, total // 2),
        save_steps=params.save_steps,
        save_total_limit=2,
        prediction_loss_only=True,
        disable_tqdm=not log.isEnabledFor(logging.INFO),
        seed=params.seed,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    pad = model.config.pad_token_id
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        eval_dataset=list(held_out),
        data_collator=_collator(pad if pad is not None else 0),
        callbacks=[progress_callback(log), checkpoints.sealing_callback()],
    )
    return _silent(trainer)


def _silent(trainer: Any) -> Any:
    """The trainer without the callbacks that write to stdout, where --json is; ours log to stderr."""
    from transformers import PrinterCallback, ProgressCallback

    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    return trainer


def _versions() -> dict[str, str]:
    """Installed versions of what shapes the result."""
    found = {}
    for name in ("torch", "transformers", "peft", "unsloth", "accelerate", "tokenizers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _collator(pad_id: int) -> Callable[[Sequence[Example]], dict[str, Any]]:
    """Right-pad a batch; padding carries no loss and no attention, so any id will do."""

    def collate(batch: Sequence[Example]) -> dict[str, Any]:
        import torch

        width = max(len(e.input_ids) for e in batch)
        rows = [(e, width - len(e.input_ids)) for e in batch]
        return {
            "input_ids": torch.tensor([[*e.input_ids, *[pad_id] * gap] for e, gap in rows]),
            "attention_mask": torch.tensor([[1] * len(e.input_ids) + [0] * gap for e, gap in rows]),
            "labels": torch.tensor([[*e.labels, *[IGNORED] * gap] for e, gap in rows]),
        }

    return collate


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
    moved = [float(p.detach().abs().max()) for name, p in model.named_parameters() if "lora_B" in name]
    if not moved or not any(moved):
        raise EnvironmentFailure(
            "the adapter is all zeros after training", remedy="try --trainer hf, a higher --learning-rate, or more steps"
        )
