"""Two ways to get a trainable model from the same parameters: unsloth, or transformers + PEFT."""

import contextlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import EnvironmentFailure, MissingDependency
from pipeline.runs.files import read_json
from training.parameters import FinetuneParameters

log = logging.getLogger(__name__)

# unsloth patches the dense Granite layers; mixture-of-experts and mamba layers train through PEFT unchanged.
_UNSLOTH_TYPES = frozenset({"granite"})
_UNSLOTH_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def choose(params: FinetuneParameters, folder: Path) -> tuple[str, str]:
    """Pick ``unsloth`` or ``hf`` for this model, with the reason; raises when unsloth is demanded but cannot be had."""
    model_type = read_json(folder / "config.json").get("model_type")
    if params.trainer == "hf":
        return "hf", "asked for"
    problem = ""
    if model_type not in _UNSLOTH_TYPES:
        problem = f"unsloth has no patched layers for model_type {model_type!r}"
    elif importlib.util.find_spec("unsloth") is None:
        problem = "unsloth is not installed"
    elif params.trainer == "auto":
        try:
            import_unsloth()
        except Exception as error:  # whatever unsloth's import-time checks raise, the other trainer works
            problem = f"unsloth does not import here ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    if not problem:
        return "unsloth", "installed, and patches this architecture"
    if params.trainer == "unsloth":
        raise MissingDependency(f"trainer unsloth was asked for, but {problem}", remedy="use --trainer auto, or make setup")
    return "hf", problem


def import_unsloth() -> Any:
    """Import unsloth without letting it load vLLM's compiled extension.

    unsloth probes ``vllm._C`` at import; in vLLM's CPU build that file is AVX-512 code, which kills the process
    (SIGILL) on a CPU without it. Training does not need vLLM, so it is hidden for the moment of the import.
    """
    with _hidden("vllm"), warnings.catch_warnings():
        # said when a notebook has something of transformers loaded; our models are loaded after the patches either way
        warnings.filterwarnings("ignore", message=r"(?s).*Unsloth should be imported before")
        import unsloth

        return unsloth


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    kept = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if kept is not None:
            sys.modules[name] = kept


def training_dtype() -> Any:
    """bfloat16 where the GPU or CPU computes it natively, float16 on older GPUs, else float32."""
    import torch

    from pipeline.machine.hardware import Hardware

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if Hardware.detect().cpu.fast_bfloat16 else torch.float32


def trainable(folder: Path, params: FinetuneParameters, backend: str, dtype: Any) -> Any:
    """Load the base and make it trainable: LoRA on every linear layer but the router and head, or all weights; seeded."""
    from transformers import set_seed

    set_seed(params.seed)
    if params.method == "qlora":
        _require_gpu()
    return _unsloth(folder, params, dtype) if backend == "unsloth" else _hf(folder, params, dtype)


def _unsloth(folder: Path, params: FinetuneParameters, dtype: Any) -> Any:
    loader = import_unsloth().FastLanguageModel
    model, _ = loader.from_pretrained(
        str(folder),
        max_seq_length=params.max_length,
        dtype=dtype,
        load_in_4bit=params.method == "qlora",
        full_finetuning=params.method == "full",
        trust_remote_code=False,
    )
    if params.method == "full":
        return model
    return loader.get_peft_model(
        model,
        r=params.rank,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        target_modules=list(_UNSLOTH_TARGETS),
        use_gradient_checkpointing="unsloth" if _on_gpu() else False,
        random_state=params.seed,
    )


def _hf(folder: Path, params: FinetuneParameters, dtype: Any) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if params.method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    # float16 weights with a gradient scaler need a float32 master copy; full fine-tuning wants one in any case
    weights = torch.float32 if params.method == "full" or dtype == torch.float16 else dtype
    model = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=weights,
        quantization_config=quantization,
        device_map={"": 0} if _on_gpu() else None,
        trust_remote_code=False,
        use_safetensors=True,
    )
    if params.method == "full":
        return model
    if params.method == "qlora":
        model = prepare_model_for_kbit_training(model)
    lora = LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        target_modules=_linear_targets(model),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def _linear_targets(model: Any) -> list[str]:
    """Full names of the linear layers to adapt; expert tensors are not linear layers and stay as they are."""
    import torch

    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "router" not in name and not name.endswith("lm_head")
    ]


def _on_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _require_gpu() -> None:
    if not _on_gpu():
        raise EnvironmentFailure("qlora needs a CUDA GPU: its 4-bit kernels do not run on a CPU", remedy="use --method lora")
