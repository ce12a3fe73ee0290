"""Link 2: the merged float16 weights are base + adapter, weight by weight, and the tokenizer and config are the base's.

The sum is done here again with numpy, so a merge that ignored, doubled or misplaced the adapter is seen without a forward pass.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.certify.links.adapter import Lora
from pipeline.model.safetensors import TensorFolder
from pipeline.prompts.chat import ChatTemplate
from pipeline.report.check import Check, guarded, held
from pipeline.runs.files import read_json
from pipeline.runs.hashes import sha256_file

HALF_ULP = 2.0**-11  # float16: largest rounding error relative to the value
SUBNORMAL = 2.0**-25  # and, below 2**-14, absolute
_SINGLE = 2.0**-24
_SOURCE = "IEEE 754: half a unit in the last place of float16, plus the float32 sum's own rounding"
_CAST_SOURCE = "IEEE 754: rounding to float16 cannot lose more, relative to the weights' own size"
# what the export sets on purpose; end and pad tokens have their own check in link 6
_OWN_IDS = {"transformers_version", "eos_token_id", "pad_token_id"}
_OWN = {
    "config.json": _OWN_IDS | {"dtype", "torch_dtype", "quantization_config", "use_cache"},
    "generation_config.json": _OWN_IDS,
    "tokenizer_config.json": {"eos_token", "pad_token"},
}


@dataclass(frozen=True)
class Comparison:
    """One tensor: its largest error as a share of what is allowed there, and what explains a larger one."""

    name: str
    ratio: float
    is_base: bool
    squared_error: float
    squared_size: float
    vanished: int


def compare_weights(base: TensorFolder, lora: Lora | None, tuned: TensorFolder, merged: TensorFolder) -> list[Check]:
    """Every merged tensor against base + scale * B @ A (or, with no ``lora``, against the fully tuned weights)."""
    source = base if lora else tuned
    missing = sorted(set(source.names) ^ set(merged.names))
    seen = [_compare(name, source, lora, merged) for name in source.names if name in merged]
    bad = [one for one in seen if not one.ratio <= 1]
    worst = max(seen, key=lambda one: one.ratio if one.ratio == one.ratio else float("inf"), default=None)
    figure = f"{len(seen) - len(bad)} of {len(source.names)} tensors equal within rounding"
    figure += f"; largest error {worst.ratio:.3g} of the bound ({worst.name})" if worst else ""
    problems = [f"{len(missing)} tensors are in one folder only ({missing[0]})"] if missing else []
    problems += [_diagnosis(bad, lora)] if bad else []
    errors, figure = [[one.name, one.ratio] for one in seen], "; ".join([figure, *problems])
    return [held("merge.tensors", not bad and not missing, figure, "1 (every weight)", _SOURCE, errors=errors), _cast(seen)]


def _cast(seen: list[Comparison]) -> Check:
    error, size = sum(one.squared_error for one in seen), sum(one.squared_size for one in seen)
    share = (error / size) ** 0.5 if size else 0.0
    vanished = sum(one.vanished for one in seen)
    figure = f"relative error of all weights {share:.2e}; {vanished} small ones became 0"
    return held("merge.cast", share <= HALF_ULP, figure, f"{HALF_ULP:.2e}", _CAST_SOURCE, relative=share)


def _compare(name: str, source: TensorFolder, lora: Lora | None, merged: TensorFolder) -> Comparison:
    import numpy as np

    before, got = source.read(name), merged.read(name)
    if before.shape != got.shape:
        return Comparison(name, float("inf"), False, 0.0, 0.0, 0)
    want, noise = before.astype(np.float32, copy=False), 0.0
    if lora and name in lora.halves:
        a, b = lora.read(name)
        want = want + np.float32(lora.scale) * (b @ a)
        # Cauchy-Schwarz: no element of |B| @ |A| exceeds the product of the longest row and column
        reach = float(np.linalg.norm(b, axis=1).max() * np.linalg.norm(a, axis=0).max()) * abs(lora.scale)
        noise = (a.shape[0] + 2) * _SINGLE * (float(np.abs(before).max()) + reach)
    error = np.abs(got - want)
    ratio = float((error / (HALF_ULP * np.abs(want) + SUBNORMAL + noise)).max(initial=0.0))
    ratio = ratio if np.isfinite(ratio) else float("inf")
    is_base = ratio > 1 and bool((np.abs(got - before) <= HALF_ULP * np.abs(before) + SUBNORMAL).all())
    vanished = int(((got == 0) & (want != 0)).sum())
    squares = float(np.square(error, dtype=np.float64).sum()), float(np.square(want, dtype=np.float64).sum())
    return Comparison(name, ratio, is_base, *squares, vanished)


def _diagnosis(bad: list[Comparison], lora: Lora | None) -> str:
    """What the pattern of wrong tensors says."""
    adapted = set(lora.halves) if lora else set()
    if adapted and all(one.is_base for one in bad) and len(bad) == len(adapted):
        return "every adapted weight is the base's: the adapter was not merged"
    if adapted and {one.name for one in bad} == adapted:
        return "every adapted weight is off: another run's adapter, or another scale"
    layers = sorted({int(found[1]) for one in bad if (found := re.search(r"layers\.(\d+)\.", one.name))})
    where = f"layers {', '.join(map(str, layers[:6]))}" if layers else bad[0].name
    return f"{len(bad)} tensors differ, first {bad[0].name}; in {where}"


def compare_files(base: Path, merged: Path) -> list[Check]:
    """Tokenizer, chat template and configuration beside the merged weights are those of the base."""
    return [
        *guarded("merge.tokenizer", lambda: [_equal("merge.tokenizer", _tokenizer(base, merged))]),
        *guarded("merge.config", lambda: [_equal("merge.config", _config(base, merged))]),
    ]


def _equal(check_id: str, problems: list[str]) -> Check:
    figure, source = "; ".join(problems) or "equal", "definition: LoRA changes weights only"
    return held(check_id, not problems, figure, "equal to the base's", source)


def _tokenizer(base: Path, merged: Path) -> list[str]:
    problems = []
    if sha256_file(base / "tokenizer.json") != sha256_file(merged / "tokenizer.json"):
        problems.append(f"tokenizer.json differs{_first_difference(base, merged)}")
    if ChatTemplate.from_folder(base).source != ChatTemplate.from_folder(merged).source:
        problems.append("the chat template differs")
    return problems


def _first_difference(base: Path, merged: Path) -> str:
    before, after = (read_json(folder / "tokenizer.json").get("model", {}) for folder in (base, merged))
    for part in ("merges", "vocab"):
        if before.get(part) != after.get(part):
            if part == "merges":
                at = [i for i, (a, b) in enumerate(zip(before[part], after[part], strict=False)) if a != b]
                return f" in its merges ({len(at)} of {len(before[part])})"
            return f" in its {part}"
    return " outside vocabulary and merges"


def _config(base: Path, merged: Path) -> list[str]:
    """How model, generation and tokenizer settings differ; engines read all three (temperature, penalties, an added bos)."""
    problems = []
    for name, own in _OWN.items():
        before, after = (read_json(folder / name) if (folder / name).is_file() else None for folder in (base, merged))
        if name == "generation_config.json" and before is None:  # the export then names the tokens of config.json
            before = {key: value for key, value in read_json(base / "config.json").items() if key == "bos_token_id"}
        before, after = before or {}, after or {}
        # code that a base points to is never copied
        keys = sorted((set(before) | set(after)) - own - ({"auto_map"} if "auto_map" not in after else set()))
        changed = [key for key in keys if before.get(key) != after.get(key)]
        problems += [f"{name}: {key} is {before.get(key)!r} in the base, {after.get(key)!r} merged" for key in changed]
    return problems
