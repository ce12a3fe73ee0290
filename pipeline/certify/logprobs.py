"""Asking an engine for the most likely next tokens after given token IDs - no template, no tokenizer in between."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from pipeline.certify.distributions import ASKED
from pipeline.engines.base import ask
from pipeline.errors import EngineError

_AT_A_TIME = 8
# the engine's tag before a token's ID, where tokens would else be text
_ID_TAG = "token_id:"


def next_tokens(client: httpx.Client, engine: str, model: str, prompts: Sequence[Sequence[int]]) -> list[dict[int, float]]:
    """Log-probabilities of the ASKED most likely next tokens, by token ID, for each prompt.

    ``client`` has the server's base URL (without ``/v1``). Raises EngineError when the engine cannot take or give token IDs.
    """
    if engine == "ollama":
        raise EngineError("ollama takes no token IDs", remedy="its prompts and answers are compared as text")
    asked = _llamacpp if engine == "llamacpp" else _completions
    try:
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            return list(pool.map(lambda ids: asked(client, model, list(ids)), prompts))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{engine} gives no log-probabilities of token IDs ({error!r})") from None


def _completions(client: httpx.Client, model: str, ids: list[int]) -> dict[int, float]:
    """OpenAI's completions as vLLM extends them."""
    body = {
        "model": model,
        "prompt": ids,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": ASKED,
        "return_tokens_as_token_ids": True,
    }
    answer = ask(client, "/v1/completions", body)
    tops: dict[str, float] = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return {int(token.removeprefix(_ID_TAG)): float(value) for token, value in tops.items()}


def _llamacpp(client: httpx.Client, model: str, ids: list[int]) -> dict[int, float]:
    body = {"model": model, "prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": ASKED, "post_sampling_probs": False}
    answer: dict[str, Any] = ask(client, "/completion", body)
    tops = answer["completion_probabilities"][0]["top_logprobs"]
    return {int(entry["id"]): float(entry["logprob"]) for entry in tops}
