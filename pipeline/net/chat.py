"""The one caller of ``/v1/chat/completions``: a greedy chat and what came back, whole or as a stream."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from pipeline.errors import EngineError
from pipeline.net.client import json_of, post, post_async, product_errors

PATH = "/v1/chat/completions"
_Object = Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """One answer to a chat: its text, why it ended, and how many tokens it has (None where the server does not say)."""

    text: str
    finish_reason: str
    tokens: int | None = None

    @classmethod
    def of(cls, said: Mapping[str, Any], who: str = "POST") -> "Reply":
        """Read a chat answer; EngineError with the answer when it is none."""
        try:
            choice, usage = said["choices"][0], said.get("usage") or {}
            text, ended = str(choice["message"]["content"] or ""), str(choice.get("finish_reason"))
            return cls(text, ended, usage.get("completion_tokens"))
        except (LookupError, TypeError, AttributeError) as error:
            raise EngineError(f"{who} {PATH}: no chat answer ({error!r})", evidence=str(said)[:1000]) from None


@dataclass(frozen=True)
class Streamed:
    """One streamed answer: text, seconds to the first token, seconds in all, chunks that carried text."""

    text: str
    first_token: float
    seconds: float
    chunks: int


def greedy(model: str, messages: Sequence[_Object], max_tokens: int, tools: Sequence[_Object] = ()) -> dict[str, Any]:
    """The body of a greedy chat request."""
    body: dict[str, Any] = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0}
    return {**body, "tools": list(tools)} if tools else body


def hello(model: str) -> dict[str, Any]:
    """The shortest chat there is: one token, which shows that the model behind a healthy server answers."""
    return greedy(model, [{"role": "user", "content": "Hello"}], 1)


def chat(client: httpx.Client, body: Mapping[str, Any], who: str = "POST") -> Reply:
    """Send a chat request; Refused, Unanswered or EngineError, beginning with ``who``, when no answer to it comes."""
    return Reply.of(post(client, PATH, body, who), who)


async def chat_async(client: httpx.AsyncClient, body: Mapping[str, Any], who: str = "POST") -> Reply:
    """As :func:`chat`, in asynchronous code."""
    return Reply.of(await post_async(client, PATH, body, who), who)


async def stream(client: httpx.AsyncClient, body: Mapping[str, Any], who: str = "POST") -> Streamed:
    """As :func:`chat`, streamed; EngineError when the stream ends without its end mark."""
    begun, first, pieces, done = time.perf_counter(), 0.0, [], False
    with product_errors(f"{who} {client.base_url.join(PATH)}"):
        async with client.stream("POST", PATH, json={**body, "stream": True}) as answer:
            if answer.is_error:
                await answer.aread()
                json_of(answer, f"{who} streaming")
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    text = _delta(line.removeprefix("data: "))
                    first = first or (time.perf_counter() - begun if text else 0.0)
                    pieces += [text] if text else []
    if not done:
        raise EngineError(f"{who} the stream broke off without [DONE]")
    return Streamed("".join(pieces), first, time.perf_counter() - begun, len(pieces))


def _delta(data: str) -> str:
    choices = json.loads(data).get("choices") or [{}]
    return str(choices[0].get("delta", {}).get("content") or "")
