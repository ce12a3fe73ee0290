"""Link 1: every targeted module's delta is non-zero and finite, gradients flowed, and the held-out loss fell.

Read with numpy from the adapter's own file, independently of the merge. Not covered: DoRA and expert (3-D) adapters.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.model.safetensors import TensorFolder
from pipeline.report.check import Check, held, skipped
from pipeline.runs.files import read_json
from pipeline.runs.manifest import TrainingRecord

_PREFIX = "base_model.model."
_DEFINITION = "definition: LoRA's B starts at zero, so an untrained module's delta is exactly 0"


@dataclass(frozen=True)
class Lora:
    """LoRA halves by the weight they change: W becomes W + scale * B @ A."""

    halves: Mapping[str, tuple[str, str]]
    scale: float
    targets: str | tuple[str, ...]
    tensors: TensorFolder

    def read(self, weight: str) -> tuple[Any, Any]:
        """A (rank x in) and B (out x rank) of a weight, float32."""
        a, b = self.halves[weight]
        return self.tensors.read(a), self.tensors.read(b)

    def targeted(self, weight: str) -> bool:
        """Whether the adapter's config says that a base weight is adapted."""
        module = weight.removesuffix(".weight")
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, module) is not None
        return any(module == target or module.endswith(f".{target}") for target in self.targets)


def read_lora(folder: Path) -> Lora:
    """Pair the halves of ``adapter_model.safetensors``; ModelError when a half is missing or of another kind."""
    config = read_json(folder / "adapter_config.json")
    tensors = TensorFolder(folder / "adapter_model.safetensors")
    halves: dict[str, dict[str, str]] = {}
    for name in tensors.names:
        module, _, half = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if half not in ("lora_A", "lora_B"):
            raise ModelError(f"{folder}: {name} is not a LoRA weight")
        halves.setdefault(f"{module}.weight", {})[half] = name
    broken = [weight for weight, pair in halves.items() if len(pair) != 2]
    if broken or not halves:
        raise ModelError(f"{folder}: incomplete LoRA pair for {broken[0] if broken else 'every weight'}")
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    targets = config.get("target_modules") or ()
    pairs = {weight: (pair["lora_A"], pair["lora_B"]) for weight, pair in halves.items()}
    return Lora(pairs, scale, targets if isinstance(targets, str) else tuple(targets), tensors)


def moved(folder: Path, base: TensorFolder) -> Check:
    """Every targeted module of the base has a delta that is finite and not zero."""
    lora = read_lora(folder)
    sizes = {weight: delta_norm(*lora.read(weight)) * abs(lora.scale) for weight in lora.halves}
    missing = [n for n in base.names if len(base.info(n).shape) == 2 and lora.targeted(n) and n not in sizes]
    zero = [weight for weight, size in sizes.items() if size == 0]
    wild = [weight for weight, size in sizes.items() if not math.isfinite(size)]
    finite = [size for size in sizes.values() if math.isfinite(size)]
    problems = _named({"zero": zero, "NaN or infinite": wild, "targeted but missing": missing})
    smallest = f"smallest delta norm {min(finite):.3g}, largest {max(finite):.3g}" if finite else "no finite delta"
    figure = f"{len(sizes) - len(zero) - len(wild)} of {len(sizes) + len(missing)} modules moved; {smallest}"
    return held("adapter.moved", not problems, "; ".join([figure, *problems]), "all, each > 0 and finite", _DEFINITION)


def moved_full(tuned: TensorFolder, base: TensorFolder) -> Check:
    """After full fine-tuning: the weights are finite and not the base's."""
    import numpy as np

    changed, wild = [], []
    for name in (name for name in base.names if name in tuned):
        after = tuned.read(name)
        if not np.isfinite(after).all():
            wild.append(name)
        elif not np.array_equal(after, base.read(name)):
            changed.append(name)
    missing = [name for name in base.names if name not in tuned and name != "lm_head.weight"]
    problems = _named({"NaN or infinite": wild, "missing": missing})
    figure = "; ".join([f"{len(changed)} of {len(base.names)} tensors changed", *problems])
    return held("adapter.moved", bool(changed) and not problems, figure, "some changed, all finite", "definition")


def _named(lists: Mapping[str, list[str]]) -> list[str]:
    return [f"{len(names)} {what} ({names[0]})" for what, names in lists.items() if names]


def delta_norm(a: Any, b: Any) -> float:
    """Frobenius norm of B @ A from two rank x rank products: sqrt(trace((B'B)(AA')))."""
    import numpy as np

    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(a64.sum() + b64.sum())
    return math.sqrt(max(float(np.sum((b64.T @ b64) * (a64 @ a64.T))), 0.0)) if finite else math.nan


def learnt(training: TrainingRecord) -> list[Check]:
    """Gradients and held-out loss, from the manifest's record of the training (see custody for its seal)."""
    norms = [float(entry["grad_norm"]) for entry in training.history if entry.get("grad_norm") is not None]
    loss = training.eval_loss
    found = [skipped("adapter.gradients", "the trainer logged no gradient norms")]
    if norms:
        ok = all(math.isfinite(norm) for norm in norms) and any(norms)
        figure = f"{sum(norm > 0 for norm in norms)} of {len(norms)} logged steps non-zero, median {sorted(norms)[len(norms) // 2]:.3g}"
        found = [held("adapter.gradients", ok, figure, "finite, not all 0", "definition")]
    if {"before", "after"} <= set(loss):
        figure = f"held-out loss {loss['before']:.4f} before, {loss['after']:.4f} after"
        found.append(held("adapter.loss_fell", loss["after"] < loss["before"], figure, "after < before", "definition"))
    return found
