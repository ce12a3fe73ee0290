"""``python -m training.export.gguf_probe FILE``: load a GGUF, generate greedily, print one JSON line; its own process because a bad file can crash llama.cpp."""

from __future__ import annotations

import json
import sys
from typing import Any

_PROMPT = "<|start_of_role|>user<|end_of_role|>Say hello.<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
_TOKENS = 8


def probe(path: str) -> dict[str, Any]:
    """Generate a few tokens; raises RuntimeError when the model does not load or yields no token or a NaN."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 256
    params.n_parallel = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    answer = server.handle_completions(
        {"prompt": _PROMPT, "max_tokens": _TOKENS, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    )
    answer = json.loads(answer) if isinstance(answer, str) else answer
    if "choices" not in answer:
        raise RuntimeError(f"no completion: {answer}")
    choice = answer["choices"][0]
    tokens = answer["usage"]["completion_tokens"]
    chances = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    if tokens < _TOKENS or any(chance != chance for chance in chances):
        raise RuntimeError(f"generated {tokens} tokens of {_TOKENS}, log-probabilities {chances}")
    return {"probe_tokens": tokens, "probe_text": choice["text"]}


if __name__ == "__main__":
    json.dump(probe(sys.argv[1]), sys.stdout)
    sys.stdout.write("\n")
