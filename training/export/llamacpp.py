"""llama.cpp in a process of its own: ``convert`` runs its converter with a faster Q8_0, ``probe`` loads a GGUF and generates.

    python -m training.export.llamacpp convert CORES CONVERTER ARGUMENT...
    python -m training.export.llamacpp probe FILE

Imports nothing of this product: each process would pay for it. The file that ``convert`` writes is the converter's own, byte for
byte: names, order, metadata and layouts are its work. Only the arithmetic of Q8_0 is replaced, by one that every tensor's first
rows prove, and what the converter imports and does not need for Granite is left out.
"""

import json
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_BLOCK, _BLOCK_BYTES = 32, 34
# blocks at a time: 2 MB of float32 stay in a core's cache
_PIECE = 1 << 14
_PROVED_ROWS = 16
# the float32 below a half: added before a cut, it rounds halves away from zero and nothing else wrongly
_BELOW_HALF = 0.49999997
_PROBE = "<|start_of_role|>user<|end_of_role|>Say hello.<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
_PROBE_TOKENS = 8


def convert(cores: int, script: str, arguments: list[str]) -> None:
    """Run llama.cpp's converter as ``python SCRIPT ARGUMENT...`` would; raises when its Q8_0 is not the one known here."""
    # for Mistral's own format only, and as slow to import as torch
    sys.modules["mistral_common"] = None  # type: ignore[assignment]
    # a tokenizer and a config need no torch; with it, transformers imports what its models need
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from transformers import is_torch_available

        is_torch_available()  # remembers what it found
    finally:
        del sys.modules["torch"]
    folder = Path(script).parent
    sys.path[:1] = [str(folder), str(folder / "gguf-py")]
    sys.argv = [script, *arguments]
    with ThreadPoolExecutor(cores) as pool:
        replace_q8_0(pool)
        runpy.run_path(script, run_name="__main__")


def replace_q8_0(pool: ThreadPoolExecutor) -> None:
    """Let gguf-py quantise to Q8_0 on every thread of the pool; what it quantises to other types stays its own work."""
    import torch
    from gguf import quants

    torch.set_num_threads(1)
    theirs, q8_0 = quants._apply_over_grouped_rows, quants.Q8_0

    def grouped(func: Any, arr: Any, otype: Any, oshape: tuple[int, ...]) -> Any:
        if func != q8_0.quantize_rows:
            return theirs(func, arr, otype, oshape)
        ours = quantize(arr, pool).reshape(oshape)
        first = arr.reshape(-1, arr.shape[-1])[:_PROVED_ROWS]
        proof = theirs(func, first, otype, (len(first), oshape[-1]))
        if proof.tobytes() != ours.reshape(-1, oshape[-1])[:_PROVED_ROWS].tobytes():
            raise RuntimeError("this version of gguf-py has another Q8_0")
        return ours

    quants._apply_over_grouped_rows = grouped


def quantize(values: Any, pool: ThreadPoolExecutor) -> Any:
    """Blocks of Q8_0, uint8 [blocks, 34], of a float16 or float32 array whose rows are multiples of 32 long."""
    import numpy as np
    import torch

    source: Any = torch.from_numpy(np.ascontiguousarray(values)).reshape(-1, _BLOCK)
    blocks = np.empty((len(source), _BLOCK_BYTES), dtype=np.uint8)
    target: Any = torch.from_numpy(blocks)
    for _ in pool.map(_quantize_piece, source.split(_PIECE), target.split(_PIECE)):
        pass
    return blocks


def _quantize_piece(source: Any, blocks: Any) -> None:
    """As ``quantize_row_q8_0_ref`` in ggml-quants.c: a float16 scale, then 32 values rounded half away from zero."""
    import torch

    # the converter works in it, and its tensors are written to in no other mode
    with torch.inference_mode():
        values = source.to(torch.float32)
        scale = values.abs().amax(1, keepdim=True).div_(127)
        values = values * torch.where(scale == 0, scale, 1 / scale)
        values += torch.copysign(torch.tensor(_BELOW_HALF), values)
        blocks[:, :2] = scale.to(torch.float16).view(torch.uint8)
        blocks[:, 2:] = values.to(torch.int8).view(torch.uint8)


def probe(path: str) -> dict[str, Any]:
    """Generate a few tokens; raises RuntimeError when the model does not load or yields no token or a NaN."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 256
    params.n_parallel = 1
    params.warmup = False
    request = {"prompt": _PROBE, "max_tokens": _PROBE_TOKENS, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    answer = xllamacpp.Server(params).handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    if "choices" not in answer:
        raise RuntimeError(f"no completion: {answer}")
    choice = answer["choices"][0]
    tokens = answer["usage"]["completion_tokens"]
    chances = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    if tokens < _PROBE_TOKENS or any(chance != chance for chance in chances):
        raise RuntimeError(f"generated {tokens} tokens of {_PROBE_TOKENS}, log-probabilities {chances}")
    return {"probe_tokens": tokens, "probe_text": choice["text"]}


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        json.dump(probe(sys.argv[2]), sys.stdout)
        sys.stdout.write("\n")
