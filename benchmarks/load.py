"""A load of streamed chats against one endpoint: time to the first token, tokens per second; no retries, no warm-up hidden."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True)
class Load:
    """What one level of concurrency gave; times in seconds, ``tokens_per_second`` of all requests together."""

    concurrency: int
    requests: int
    tokens: int
    ttft_p50: float
    ttft_p95: float
    tokens_per_second: float


@dataclass(frozen=True)
class _Answer:
    first: float
    tokens: int


def put_load(url: str, model: str, prompts: Sequence[list[dict[str, Any]]], concurrency: int, max_tokens: int) -> Load:
    """Every prompt once, ``concurrency`` at a time; answers have exactly ``max_tokens`` tokens, so that loads are comparable."""
    return asyncio.run(_all(url, model, prompts, concurrency, max_tokens))


async def _all(url: str, model: str, prompts: Sequence[list[dict[str, Any]]], concurrency: int, max_tokens: int) -> Load:
    gate = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one(messages: list[dict[str, Any]]) -> _Answer:
            async with gate:
                return await _chat(client, model, messages, max_tokens)

        begun = time.perf_counter()
        answers = await asyncio.gather(*(one(messages) for messages in prompts))
        seconds = time.perf_counter() - begun
    firsts = sorted(answer.first for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    p95 = firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))]
    return Load(concurrency, len(answers), tokens, statistics.median(firsts), p95, tokens / seconds)


async def _chat(client: httpx.AsyncClient, model: str, messages: list[dict[str, Any]], max_tokens: int) -> _Answer:
    body = {
        "model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    begun, first, tokens = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            # llama.cpp's first event only names the role; a first token has text
            if not first and any(choice.get("delta", {}).get("content") for choice in event.get("choices", [])):
                first = time.perf_counter() - begun
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return _Answer(first or time.perf_counter() - begun, tokens)
