"""The training loop, which is transformers' Trainer: its arguments, its batches, what it says and what it saves on the way."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.runs import interrupt
from training.parameters import FinetuneParameters
from training.tuning import checkpoints
from training.tuning.prepare import IGNORED, Example

log = logging.getLogger(__name__)
_EVERY_SECONDS = 10.0


def make_trainer(
    model: Any, folder: Path, params: FinetuneParameters, dtype: Any, rows: Sequence[Example], held_out: Sequence[Example]
) -> Any:
    """A Trainer that leaves its checkpoints in ``folder``, sealed, and logs to stderr alone: --json is on stdout."""
    from transformers import PrinterCallback, ProgressCallback, Trainer

    steps_per_epoch = math.ceil(len(rows) / (params.batch_size * params.gradient_accumulation))
    total = params.max_steps or math.ceil(steps_per_epoch * params.epochs)
    pad = model.config.pad_token_id
    trainer = Trainer(
        model=model,
        args=_arguments(folder, params, dtype, total),
        train_dataset=list(rows),
        eval_dataset=list(held_out),
        data_collator=_collator(pad if pad is not None else 0),
        callbacks=[_callback()],
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    return trainer


def _arguments(folder: Path, params: FinetuneParameters, dtype: Any, total: int) -> Any:
    import torch
    from transformers import TrainingArguments

    return TrainingArguments(
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


def _callback() -> Any:
    from transformers import TrainerCallback

    class Along(TrainerCallback):  # type: ignore[misc,unused-ignore]
        """Says how far training is every few seconds, seals each checkpoint, and stops at one when the user has asked."""

        begun, first, said = 0.0, 0, 0.0
        loss: float | None = None  # evaluating before training logs too

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Start the clock, which a resumed training starts in the middle."""
            self.begun, self.first = time.monotonic(), state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            """Remember the newest training loss."""
            self.loss = (logs or {}).get("loss", self.loss)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Log one line, now and then; when the user has asked to stop, save a checkpoint and end."""
            if interrupt.asked() and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True
            now = time.monotonic()
            if now - self.said < _EVERY_SECONDS and state.global_step < state.max_steps:
                return
            self.said = now
            left = (now - self.begun) / (state.global_step - self.first) * (state.max_steps - state.global_step)
            shown = "" if self.loss is None else f", loss {float(self.loss):.3f}"
            log.info("finetune: step %d of %d%s, %.0f s left", state.global_step, state.max_steps, shown, left)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Seal the checkpoint of this step."""
            checkpoints.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return Along()
