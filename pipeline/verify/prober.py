"""Questions put to a served model: is it listed, does it answer, stream and stop, how fast, and what was it fed."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from pipeline import engines
from pipeline.engines import Prompt
from pipeline.errors import EngineError, PipelineError
from pipeline.net.client import wait_for
from pipeline.prompts.conversation import Conversation
from pipeline.prompts.neutralise import control_tokens, neutralise
from pipeline.runs.folder import RunFolder
from pipeline.serve.start import Endpoint
from pipeline.verify.score import Answer, HeldOut, read_held_out

_TIMEOUT = httpx.Timeout(300, connect=10)


@dataclass(frozen=True)
class Streamed:
    """One streamed answer: text, seconds to the first token, seconds in all, chunks that carried text."""

    text: str
    first_token: float
    seconds: float
    chunks: int


class Prober:
    """Asks one endpoint; a context manager around one HTTP client."""

    def __init__(self, endpoint: Endpoint, max_tokens: int) -> None:
        self.endpoint = endpoint
        self.max_tokens = max_tokens
        # a connection kept open may be closed by the server in the moment it is used again, which looks like a failure
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.AsyncClient(base_url=endpoint.url, headers=endpoint.headers, timeout=_TIMEOUT, limits=limits)
        self._plain = httpx.Client(base_url=endpoint.url, headers=endpoint.headers, timeout=_TIMEOUT, limits=limits)

    async def __aenter__(self) -> "Prober":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()
        self._plain.close()

    async def models(self) -> list[str]:
        """Names the server lists at ``/v1/models``."""
        answer = await self._get("/v1/models")
        return [str(entry["id"]) for entry in answer.get("data", [])]

    async def chat(self, row: HeldOut) -> tuple[Answer, int]:
        """Greedy answer to a held-out prompt and the number of tokens it has."""
        body = await self.post("/v1/chat/completions", self._body(row))
        try:
            choice, tokens = body["choices"][0], int(body["usage"]["completion_tokens"])
            return Answer(choice["message"]["content"] or "", str(choice["finish_reason"])), tokens
        except (LookupError, TypeError, ValueError) as error:
            raise EngineError(f"{self.endpoint.engine}: no chat answer with its usage ({error!r})", evidence=str(body)[:1000]) from None  # fmt: skip

    async def stream(self, row: HeldOut) -> Streamed:
        """The same, streamed; EngineError when the stream ends without its end mark."""
        begun, first, pieces, done = time.perf_counter(), 0.0, [], False
        async with self._client.stream("POST", "/v1/chat/completions", json={**self._body(row), "stream": True}) as answer:
            if answer.is_error:
                raise EngineError(
                    f"{self.endpoint.engine}: streaming answered {answer.status_code}",
                    evidence=(await answer.aread()).decode(errors="replace")[:1000],
                )
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    text = _delta(line.removeprefix("data: "))
                    first = first or (time.perf_counter() - begun if text else 0.0)
                    pieces += [text] if text else []
        if not done:
            raise EngineError(f"{self.endpoint.engine}: the stream broke off without [DONE]")
        return Streamed("".join(pieces), first, time.perf_counter() - begun, len(pieces))

    async def prompt(self, conversation: Conversation) -> Prompt:
        """What the engine feeds the model for this conversation."""
        engine = engines.get(self.endpoint.engine)
        return await asyncio.to_thread(engine.prompt, self._plain, self.endpoint.model, conversation)

    def body(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> dict[str, Any]:
        """A greedy chat request."""
        return {"model": self.endpoint.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0}

    def _body(self, row: HeldOut) -> dict[str, Any]:
        body = self.body(row.messages, self.max_tokens)
        return {**body, "tools": list(row.tools)} if row.tools else body

    async def _get(self, path: str) -> dict[str, Any]:
        return await self._json("GET", path, None)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST JSON and return the JSON answer; EngineError with the server's words."""
        return await self._json("POST", path, body)

    async def _json(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        try:
            answer = await self._client.request(method, path, json=body)
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
        except httpx.HTTPStatusError as error:
            raise EngineError(
                f"{self.endpoint.engine}: {path} answered {error.response.status_code}", evidence=error.response.text[:1000]
            ) from None
        except (httpx.HTTPError, ValueError) as error:
            raise EngineError(f"{self.endpoint.engine}: {path} failed: {error!r}") from None
        return found


async def ask_all(
    prober: Prober, rows: Sequence[HeldOut], concurrency: int, done: Callable[[], None]
) -> tuple[list[Answer], float]:
    """Answers in the rows' order, ``concurrency`` at a time, and the tokens per second of the whole load."""
    gate, begun = asyncio.Semaphore(concurrency), time.perf_counter()

    async def one(row: HeldOut) -> tuple[Answer, int]:
        async with gate:
            answer = await prober.chat(row)
            done()
            return answer

    results = await asyncio.gather(*(one(row) for row in rows))
    tokens = sum(count for _, count in results)
    return [answer for answer, _ in results], tokens / (time.perf_counter() - begun)


def _delta(data: str) -> str:
    choices = json.loads(data).get("choices") or [{}]
    return str(choices[0].get("delta", {}).get("content") or "")


def ask_once(run: RunFolder, endpoint: Endpoint, prompt: str | None) -> dict[str, Any]:
    """One prompt (default: the first held-out one), with the held-out rows' system message, and its answer or its error."""
    row = read_held_out(run.heldout)[0]
    if prompt is not None:
        system = [m for m in row.messages if m["role"] == "system"]
        content = neutralise(prompt, control_tokens(run.merged))
        row = HeldOut((*system, {"role": "user", "content": content}), "")

    async def ask() -> dict[str, Any]:
        async with Prober(endpoint, max_tokens=128) as prober:
            answer, tokens = await prober.chat(row)
        return {"prompt": row.prompt, "answer": answer.text, "finish reason": answer.finish_reason, "tokens": tokens}

    try:
        return wait_for(ask())
    except PipelineError as error:  # the other backends are still to be asked; verify judges
        return {"prompt": row.prompt, "error": str(error)}
