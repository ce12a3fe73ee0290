"""Link 3, from the files: every GGUF tensor against the merged one, metadata against config, vocabulary against tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.certify.finding import Finding, guarded, held
from pipeline.certify.gguf_metadata import metadata, rope_type
from pipeline.certify.gguf_names import DERIVED, gguf_tensors
from pipeline.chat import ChatTemplate
from pipeline.errors import ModelError
from pipeline.files import read_json
from pipeline.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from pipeline.tensors import TensorFolder

_BLOCK = 32
_Q8_SOURCE = "Q8_0's definition: half a step of max|block|/127, plus the float16 rounding of the step"
_CONTROL = 3


def check_gguf(merged: Path, gguf: Path, pre: str | None = None) -> list[Finding]:
    """Tensors, metadata, template and vocabulary of a GGUF against the merged folder it was made from.

    ``pre`` is the name of the text splitting rule that the converter gave at export, None where none was recorded.
    """
    header = read_gguf_header(gguf, whole_arrays=True)
    return [
        *guarded("gguf.tensors", lambda: [_tensors(merged, gguf, header)]),
        *guarded("gguf.metadata", lambda: [metadata(merged, header, pre)]),
        *guarded("gguf.template", lambda: [template(merged, header)]),
        *guarded("gguf.vocabulary", lambda: [_vocabulary(merged, header)]),
    ]


def _tensors(merged: Path, gguf: Path, header: GgufHeader) -> Finding:
    config, folder = read_json(merged / "config.json"), TensorFolder(merged)
    stored = {tensor.name: tensor for tensor in header.tensors}
    unknown: list[str] = []
    seen: list[tuple[str, float]] = []
    for name in folder.names:
        parts = gguf_tensors(name, folder.read(name), config)
        if parts is None:
            unknown.append(name)
            continue
        seen += [(one, error_ratio(gguf, stored[one], want) if one in stored else math.inf) for one, want in parts.items()]
    bad = [name for name, ratio in seen if not ratio <= 1]
    derived = DERIVED if rope_type(config) == "llama3" else frozenset()
    extra = sorted(set(stored) - {name for name, _ in seen} - derived)
    problems = [
        f"{len(names)} {what}, first {names[0]}"
        for what, names in (
            ("tensors differ", bad),
            ("GGUF tensors come from no merged tensor", extra),
            ("merged tensors have no known place in a GGUF", unknown),
        )
        if names
    ]
    worst = max(seen, key=lambda pair: pair[1], default=("none", 0.0))
    figure = f"{len(seen) - len(bad)} of {len(seen)} tensors within the bound; largest error {worst[1]:.3g} of it ({worst[0]})"
    return held(
        "gguf.tensors", not problems, "; ".join([figure, *problems]), "1 (every weight)", _Q8_SOURCE,
        errors=[list(pair) for pair in seen],
    )  # fmt: skip


def error_ratio(gguf: Path, stored: GgufTensor, want: Any) -> float:
    """Largest error of a stored tensor as a share of what its type allows at that place; infinite for another size."""
    import numpy as np

    got = read_gguf_tensor(gguf, stored)
    want = np.ascontiguousarray(want, dtype=np.float32).reshape(-1)
    if got.size != want.size:
        return math.inf
    error, size = np.abs(got - want), np.abs(want)
    if stored.type == "Q8_0":
        error = error.reshape(-1, _BLOCK)
        allowed = size.reshape(-1, _BLOCK).max(axis=1, keepdims=True) * (1 / 254 + 2.0**-11) + 127 * 2.0**-25
    else:
        # the converter takes the exponential of a state-space decay in the merged weights' own float16
        digits = 11 if stored.type == "F16" or stored.name.endswith("ssm_a") else 8 if stored.type == "BF16" else 21
        allowed = size * 2.0**-digits + 2.0**-60
    ratio = float((error / allowed).max(initial=0.0))
    return ratio if math.isfinite(ratio) else math.inf


def read_gguf_tensor(gguf: Path, tensor: GgufTensor) -> Any:
    """A tensor's values as a flat float32 array, dequantised; ModelError for a type that this product does not write."""
    import numpy as np

    raw = np.fromfile(gguf, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
    if tensor.type == "Q8_0":  # per block of 32: a float16 step, then 32 signed bytes
        blocks = raw.reshape(-1, 2 + _BLOCK)
        steps = blocks[:, :2].copy().view("<f2").astype(np.float32)
        return (steps * blocks[:, 2:].view(np.int8)).reshape(-1)
    if tensor.type == "BF16":
        return (raw.view("<u2").astype("<u4") << 16).view("<f4")
    if tensor.type not in ("F32", "F16"):
        raise ModelError(f"{gguf}: {tensor.name} is {tensor.type}; the certificate knows Q8_0, F16, BF16 and F32")
    return raw.view("<f4" if tensor.type == "F32" else "<f2").astype(np.float32)


def template(merged: Path, header: GgufHeader) -> Finding:
    """The chat template inside the GGUF is the merged folder's."""
    ours, theirs = ChatTemplate.from_folder(merged).source, str(header.metadata.get("tokenizer.chat_template") or "")
    # converters may drop line ends at the very end of the file; jinja drops the first of them too
    same = ours.rstrip("\n") == theirs.rstrip("\n")
    figure = "equal" if same else _where(ours, theirs)
    return held("gguf.template", same, figure, "equal to merged_fp16's", "definition")


def _where(ours: str, theirs: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"differs at character {at}: merged {ours[at : at + 30]!r}, GGUF {theirs[at : at + 30]!r}"


def _vocabulary(merged: Path, header: GgufHeader) -> Finding:
    tokens, merges, kinds = (header.metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "merges", "token_type"))
    problems = vocabulary_problems(read_json(merged / "tokenizer.json"), tokens or [], merges, kinds)
    figure = "; ".join(problems) or f"{len(tokens or [])} tokens and {len(merges or [])} merges equal"
    return held("gguf.vocabulary", not problems, figure, "equal to tokenizer.json", "definition")


def vocabulary_problems(
    tokenizer: Mapping[str, Any], tokens: Sequence[str], merges: Sequence[str] | None, kinds: Sequence[int] | None
) -> list[str]:
    """How a GGUF's token list, merges and token kinds differ from a tokenizer.json."""
    model, added = tokenizer["model"], tokenizer.get("added_tokens") or []
    wanted = {int(i): token for token, i in model["vocab"].items()} | {int(t["id"]): t["content"] for t in added}
    wrong = [i for i, token in wanted.items() if i >= len(tokens) or tokens[i] != token]
    problems = [f"{len(wrong)} tokens differ, first id {min(wrong)} ({wanted[min(wrong)]!r})"] if wrong else []
    ours = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    if merges is not None and list(merges) != ours:
        at = [i for i, (a, b) in enumerate(zip(ours, merges, strict=False)) if a != b]
        problems.append(
            f"{len(at)} merges differ, first number {at[0]}" if at else f"{len(merges)} merges instead of {len(ours)}"
        )
    plain = [t["content"] for t in added if t.get("special") and kinds is not None and kinds[int(t["id"])] != _CONTROL]
    return problems + ([f"{plain[0]!r} is no control token in the GGUF"] if plain else [])
