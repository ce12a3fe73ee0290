"""A trainable model in one of two ways, unsloth or transformers + PEFT, and the loop that trains it: transformers' Trainer."""

import importlib.util
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import EnvironmentFailure, MissingDependency
from pipeline.machine.hardware import Hardware
from pipeline.runs import interrupt, lease
from pipeline.runs import log as runlog
from pipeline.runs.files import read_json
from training.memory import finetune_need
from training.parameters import FinetuneParameters
from training.tuning import checkpoints, fused, packing
from training.tuning.prepare import Example

log = logging.getLogger(__name__)
_EVERY_SECONDS = 10.0
# rows that both kinds of batches are tried on, and how far the losses may be apart, relative, by the weights' type
_TRIED = 3
_CLOSE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 2e-2}
# on a GPU: the share of tokens saved from which on packed rows are faster than unsloth, and how much of the estimated memory is kept free
_MOSTLY, _ROOM = 0.5, 3.0
_UNSLOTH_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def choose(params: FinetuneParameters, folder: Path, rows: Sequence[Example]) -> tuple[str, str]:
    """Pick ``unsloth`` or ``hf`` for this model and these rows, with the reason; raises when unsloth is demanded but cannot be had.

    ``auto`` goes by what ``benchmarks/train.py`` measured: ``hf`` on a CPU, and on a GPU where most tokens are common beginnings.
    """
    model_type = read_json(folder / "config.json").get("model_type")
    if params.trainer == "hf":
        return "hf", "asked for"
    problem = ""
    # unsloth patches the dense Granite layers; mixture-of-experts and mamba layers train through PEFT unchanged
    if model_type != "granite":
        problem = f"unsloth has no patched layers for model_type {model_type!r}"
    elif importlib.util.find_spec("unsloth") is None:
        problem = "unsloth is not installed"
    elif params.trainer == "auto":
        if faster := _faster_packed(params, folder, rows):
            return "hf", faster
        try:
            import_unsloth()
        except Exception as error:  # whatever unsloth's import-time checks raise, the other trainer works
            problem = f"unsloth does not import here ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    if not problem:
        return "unsloth", "installed, and patches this architecture"
    if params.trainer == "unsloth":
        raise MissingDependency(f"trainer unsloth was asked for, but {problem}", remedy="use --trainer auto, or make setup")
    return "hf", problem


def _faster_packed(params: FinetuneParameters, folder: Path, rows: Sequence[Example]) -> str:
    """Why rows packed into one sequence train faster here than unsloth does; empty where they do not."""
    if not _on_gpu():
        return "on a CPU it is the faster one: rows lie in one sequence, without padding"
    saved = 0.0 if params.dropout else packing.saved(rows, params.batch_size, params.seed)
    if params.method == "qlora" or saved < _MOSTLY:
        return ""
    # unsloth computes layers again in the backward pass and needs a fraction of the memory
    need = finetune_need(folder, params, max(len(row.input_ids) for row in rows)).gib
    free = max(gpu.free_gib for gpu in Hardware.detect().gpus)
    return f"{saved:.0%} of the tokens are beginnings that are computed once" if _ROOM * need < free else ""


def import_unsloth() -> Any:
    """Import unsloth without letting it load vLLM's compiled extension.

    unsloth probes ``vllm._C`` at import; in vLLM's CPU build that file is AVX-512 code, which kills the process
    (SIGILL) on a CPU without it. Training does not need vLLM, so it is hidden for the moment of the import.
    """
    kept = sys.modules.get("vllm")
    sys.modules["vllm"] = None  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            # said when a notebook has something of transformers loaded; our models are loaded after the patches either way
            warnings.filterwarnings("ignore", message=r"(?s).*Unsloth should be imported before")
            with runlog.unheard(log):
                import unsloth

            return unsloth
    finally:
        del sys.modules["vllm"]
        if kept is not None:
            sys.modules["vllm"] = kept


def training_dtype() -> Any:
    """bfloat16 where the GPU or CPU computes it natively, float16 on older GPUs, else float32."""
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if Hardware.detect().cpu.fast_bfloat16 else torch.float32


def trainable(folder: Path, params: FinetuneParameters, backend: str, dtype: Any) -> Any:
    """Load the base and make it trainable: LoRA on every linear layer but the router and head, or all weights; seeded."""
    from transformers import set_seed

    set_seed(params.seed)
    if params.method == "qlora" and not _on_gpu():
        raise EnvironmentFailure("qlora needs a CUDA GPU: its 4-bit kernels do not run on a CPU", remedy="use --method lora")
    return _unsloth(folder, params, dtype) if backend == "unsloth" else _hf(folder, params, dtype)


def _unsloth(folder: Path, params: FinetuneParameters, dtype: Any) -> Any:
    loader = import_unsloth().FastLanguageModel
    loading = {"load_in_4bit": params.method == "qlora", "full_finetuning": params.method == "full", "trust_remote_code": False}
    with runlog.unheard(log):
        model, _ = loader.from_pretrained(str(folder), max_seq_length=params.max_length, dtype=dtype, **loading)
    if params.method == "full":
        return model
    sparing = "unsloth" if in_pieces("unsloth") else False
    options = {**_lora(params), "target_modules": list(_UNSLOTH_TARGETS), "use_gradient_checkpointing": sparing}
    with runlog.unheard(log):
        return loader.get_peft_model(model, **options, random_state=params.seed)


def in_pieces(backend: str) -> bool:
    """Whether layers are computed again in the backward pass and the loss in pieces: unsloth's way on a GPU."""
    return backend == "unsloth" and _on_gpu()


def _hf(folder: Path, params: FinetuneParameters, dtype: Any) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    quantization = BitsAndBytesConfig(load_in_4bit=True, **nf4) if params.method == "qlora" else None
    # float16 weights with a gradient scaler need a float32 master copy; full fine-tuning wants one in any case
    weights = torch.float32 if params.method == "full" or dtype == torch.float16 else dtype
    loading = {"quantization_config": quantization, "device_map": {"": 0} if _on_gpu() else None, "use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=weights, trust_remote_code=False, **loading)
    if params.method == "full":
        return model
    if params.method == "qlora":
        model = prepare_model_for_kbit_training(model)
    # full names; expert tensors are not linear layers and stay as they are
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name in linear if "router" not in name and not name.endswith("lm_head")]
    model = get_peft_model(model, LoraConfig(**_lora(params), target_modules=targets, task_type="CAUSAL_LM"))
    fused.fuse(model)
    return model


def _lora(params: FinetuneParameters) -> dict[str, Any]:
    return {"r": params.rank, "lora_alpha": params.alpha, "lora_dropout": params.dropout}


def _on_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


@dataclass(frozen=True)
class Batching:
    """How rows become batches: ``packed`` (see :mod:`training.tuning.packing`) or ``padded``, why, what makes a batch of rows, and
    the share of tokens that are not computed because rows have them in common.
    """

    kind: str
    reason: str
    collate: Callable[[Sequence[Example]], dict[str, Any]]
    saved: float = 0.0


def batching(model: Any, backend: str, params: FinetuneParameters, rows: Sequence[Example]) -> Batching:
    """Packed where the model computes the same loss so, which is tried on a few rows; else padded, with the reason."""
    inner, pad_id = model.get_base_model() if hasattr(model, "peft_config") else model, model.config.pad_token_id or 0
    if backend == "unsloth":
        return Batching(
            "padded", "unsloth's attention has no place for rows that share a beginning", partial(packing.pad, pad_id)
        )
    padded = partial(packing.pad, pad_id, keep=True)
    if why := packing.obstacle(inner.config):
        return Batching("padded", why, padded)
    # a mask drawn once for what rows share would not be the one that each would have had
    share = not params.dropout and not getattr(inner.config, "attention_dropout", 0.0)
    packed = partial(packing.pack, share=share)
    packing.register()
    before = inner.config._attn_implementation
    inner.set_attn_implementation(packing.ATTENTION)
    if why := _differs(model, padded, packed, sorted(rows, key=lambda row: len(row.input_ids))[:_TRIED]):
        inner.set_attn_implementation(before)
        return Batching("padded", why, padded)
    saved = packing.saved(rows, params.batch_size, params.seed) if share else 0.0
    return Batching("packed", "" if share else "nothing is shared, because there is dropout", packed, saved)


def _differs(model: Any, padded: Any, packed: Any, rows: Sequence[Example]) -> str:
    """Why a packed batch of these rows is not the padded one to this model; empty when it has the same loss."""
    import torch

    kind = model.device.type
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            ours, theirs = (_loss(model, batch(rows)) for batch in (packed, padded))
    except Exception as error:  # whatever a model raises that takes no such batch, it trains on padded ones
        return f"the model takes no rows in one sequence ({type(error).__name__}: {str(error).splitlines()[0][:100]})"
    finally:
        model.train(training)
    close = _CLOSE[str(next(model.parameters()).dtype).removeprefix("torch.")]
    return (
        ""
        if abs(ours - theirs) <= close * abs(theirs)
        else f"the model's loss is another one there ({ours:.6g}, not {theirs:.6g})"
    )


def _loss(model: Any, batch: dict[str, Any]) -> float:
    def there(value: Any) -> Any:
        return {name: there(one) for name, one in value.items()} if isinstance(value, dict) else value.to(model.device)

    return float(model(**there(batch), use_cache=False).loss)


def make_trainer(
    model: Any,
    folder: Path,
    params: FinetuneParameters,
    dtype: Any,
    rows: Sequence[Example],
    held_out: Sequence[Example],
    batches: Batching,
) -> Any:
    """A Trainer that leaves its checkpoints in ``folder``, sealed, and logs to stderr alone: --json is on stdout."""
    from transformers import PrinterCallback, ProgressCallback, Trainer

    class Ordered(Trainer):  # type: ignore[misc,unused-ignore]
        """Rows come in the order of :class:`training.tuning.packing.Batches`; no checkpoint is written into a run that was lost."""

        def _save_checkpoint(self, *args: Any, **named: Any) -> None:
            lease.require_held(folder)
            super()._save_checkpoint(*args, **named)

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            lengths = None if batches.kind == "packed" else [len(row.input_ids) for row in rows]
            return packing.Batches([row.head for row in rows], params.batch_size, params.seed, lengths)

    steps_per_epoch = math.ceil(len(rows) / (params.batch_size * params.gradient_accumulation))
    total = params.max_steps or math.ceil(steps_per_epoch * params.epochs)
    sets = {"train_dataset": list(rows), "eval_dataset": list(held_out), "data_collator": batches.collate}
    trainer = Ordered(model=model, args=_arguments(folder, params, dtype, total), callbacks=[_callback()], **sets)
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
        # the schedule's first step of a warm-up has learning rate 0: a training of that one step would learn nothing
        warmup_steps=min(params.warmup_steps, total) if total > 1 else 0,
        weight_decay=params.weight_decay,
        optim="adamw_torch_fused",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not _on_gpu(),
        logging_steps=max(1, total // 50),
        eval_strategy="steps",
        eval_steps=total // 2 + 1,  # one more time, in the middle: after the last step they are scored anyway
        save_steps=params.save_steps,
        save_total_limit=2,
        prediction_loss_only=True,
        disable_tqdm=not log.isEnabledFor(logging.INFO),
        seed=params.seed,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=_on_gpu(),
    )


def _callback() -> Any:
    from transformers import TrainerCallback

    class Along(TrainerCallback):  # type: ignore[misc,unused-ignore]
        """Says how far training is every few seconds, seals each checkpoint, and stops at one when the user has asked."""

        begun, first, said = 0.0, 0, 0.0
        loss: float | None = None  # evaluating before training logs too

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begun, self.first = time.monotonic(), state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.loss = (logs or {}).get("loss", self.loss)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Log one line, now and then; when the user has asked to stop, save a checkpoint and end."""
            if interrupt.asked() and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True
            now = time.monotonic()
            if now - self.said < _EVERY_SECONDS and state.global_step < state.max_steps:
                return
            self.said = now
            lease.require_held(Path(args.output_dir))
            left = (now - self.begun) / (state.global_step - self.first) * (state.max_steps - state.global_step)
            shown = "" if self.loss is None else f", loss {float(self.loss):.3f}"
            log.info("finetune: step %d of %d%s, %.0f s left", state.global_step, state.max_steps, shown, left)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            checkpoints.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return Along()
