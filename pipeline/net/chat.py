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
# a run's sampling settings: what its reference answers were made with, every backend is verified with, its Modelfile says, and
# what clients have to send, because engines have defaults of their own (``Engine.defaults``)
SAMPLING: Mapping[str, float] = {"temperature": 0, "top_p": 1}


@dataclass(frozen=True)
class Defaults:
    """What a server samples with where a request to ``/v1`` names no settings, and where that is written; None: not known."""

    source: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None

    def __str__(self) -> str:
        known = (f"{name} {getattr(self, name):g}" for name in SAMPLING if getattr(self, name) is not None)
        return " and ".join(known) or "settings of its own"


@dataclass(frozen=True)
class Reply:
    """One answer to a chat: its text, why it ended, and how many tokens it has (None where the server does not say).

    ``calls`` are the functions of its ``tool_calls``, arguments as JSON text; ``thought`` is what the server told apart as
    reasoning (None: nothing).
    """

    text: str
    finish_reason: str
    tokens: int | None = None
    calls: tuple[_Object, ...] = ()
    thought: str | None = None

    @classmethod
    def of(cls, said: Mapping[str, Any], who: str = "POST") -> "Reply":
        """Read a chat answer; EngineError with the answer when it is none."""
        try:
            choice, usage = said["choices"][0], said.get("usage") or {}
            message, ended = choice["message"], str(choice.get("finish_reason"))
            calls = tuple(dict(call["function"]) for call in message.get("tool_calls") or ())
            # an answer that is only a call may come without content
            text = message.get("content") if calls else message["content"]
            return cls(str(text or ""), ended, usage.get("completion_tokens"), calls, _thought(message))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(f"{who} {PATH}: no chat answer ({error!r})", evidence=str(said)[:1000]) from None

    @classmethod
    def of_prompt(cls, said: Mapping[str, Any], who: str = "POST") -> "Reply":
        """Read the answer to a rendered prompt, in the form of OpenAI's completions; EngineError with the answer when it is none."""
        try:
            choice, usage = said["choices"][0], said.get("usage") or {}
            return cls(str(choice["text"] or ""), str(choice.get("finish_reason")), usage.get("completion_tokens"))
        except (LookupError, TypeError, AttributeError) as error:
            raise EngineError(f"{who}: no answer to a prompt ({error!r})", evidence=str(said)[:1000]) from None


@dataclass(frozen=True)
class Streamed:
    """One streamed answer: text, seconds to the first token, seconds in all, chunks that carried anything; see :class:`Reply`."""

    text: str
    first_token: float
    seconds: float
    chunks: int
    calls: tuple[_Object, ...] = ()
    thought: str | None = None


def greedy(model: str, messages: Sequence[_Object], max_tokens: int) -> dict[str, Any]:
    """The body of a greedy chat request. Only the temperature is said: top_p does nothing beside 0, and some servers refuse both."""
    return {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": SAMPLING["temperature"]}


def plain(body: _Object) -> dict[str, Any]:
    """A chat request as a client sends it that names no sampling settings."""
    return {key: value for key, value in body.items() if key not in SAMPLING}


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
    begun, first, deltas, done = time.perf_counter(), 0.0, list[_Object](), False
    with product_errors(f"{who} {client.base_url.join(PATH)}"):
        async with client.stream("POST", PATH, json={**body, "stream": True}) as answer:
            if answer.is_error:
                await answer.aread()
                json_of(answer, f"{who} streaming")
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    delta = _delta(line.removeprefix("data: "))
                    said = bool(delta.get("content") or delta.get("tool_calls") or _thought(delta))
                    first = first or (time.perf_counter() - begun if said else 0.0)
                    deltas += [delta] if said else []
    if not done:
        raise EngineError(f"{who} the stream broke off without [DONE]")
    seconds = time.perf_counter() - begun
    try:
        text, thought = ("".join(filter(None, map(part, deltas))) for part in (_content, _thought))
        return Streamed(text, first, seconds, len(deltas), _joined(deltas), thought or None)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{who} {PATH}: no streamed chat answer ({error!r})", evidence=str(deltas)[:1000]) from None


def _delta(data: str) -> _Object:
    choices = json.loads(data).get("choices") or [{}]
    delta: _Object = choices[0].get("delta") or {}
    return delta


def _content(message: _Object) -> str:
    return str(message.get("content") or "")


def _thought(message: _Object) -> str | None:
    """What a server told apart as reasoning: llama.cpp and SGLang name it so, vLLM and Ollama otherwise."""
    found = message.get("reasoning_content") or message.get("reasoning")
    return str(found) if found else None


def _joined(deltas: Sequence[_Object]) -> tuple[_Object, ...]:
    """Tool calls out of their pieces: the name comes whole, the arguments piece by piece."""
    made: dict[int, dict[str, str]] = {}
    for piece in (piece for delta in deltas for piece in delta.get("tool_calls") or ()):
        call = made.setdefault(int(piece.get("index") or 0), {"name": "", "arguments": ""})
        function = piece.get("function") or {}
        for key in call:
            call[key] += str(function.get(key) or "")
    return tuple(made[index] for index in sorted(made))
