"""Questions put to a served model: is it listed, does it answer, stream and stop, how fast, and what was it fed."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline import engines
from pipeline.engines import Prompt
from pipeline.errors import EngineError, PipelineError
from pipeline.net import chat
from pipeline.net.chat import Streamed
from pipeline.net.client import get_async, open_async, open_client, post_async, wait_for
from pipeline.prompts.conversation import Conversation
from pipeline.prompts.neutralise import control_tokens, neutralise
from pipeline.report.check import Check
from pipeline.runs.folder import RunFolder
from pipeline.serve.start import Endpoint
from pipeline.verify.score import Answer, HeldOut, read_held_out


class Prober:
    """Asks one endpoint; a context manager around one HTTP client."""

    def __init__(self, endpoint: Endpoint, max_tokens: int) -> None:
        self.endpoint = endpoint
        self.max_tokens = max_tokens
        self._who = f"{endpoint.engine}:"
        self._client = open_async(endpoint.url, endpoint.api_key)
        self._plain = open_client(endpoint.url, endpoint.api_key)

    async def __aenter__(self) -> "Prober":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()
        self._plain.close()

    async def models(self) -> list[str]:
        """Names the server lists at ``/v1/models``."""
        answer = await get_async(self._client, "/v1/models", self._who)
        return [str(entry["id"]) for entry in answer.get("data", [])]

    async def chat(self, row: HeldOut) -> tuple[Answer, int]:
        """Greedy answer to a held-out prompt and the number of tokens it has."""
        reply = await chat.chat_async(self._client, self._body(row), self._who)
        if reply.tokens is None:
            raise EngineError(f"{self._who} no chat answer with its usage", evidence=reply.text[:1000])
        return Answer(reply.text, reply.finish_reason), reply.tokens

    async def stream(self, row: HeldOut) -> Streamed:
        """The same, streamed; EngineError when the stream ends without its end mark."""
        return await chat.stream(self._client, self._body(row), self._who)

    async def prompt(self, conversation: Conversation) -> Prompt:
        """What the engine feeds the model for this conversation."""
        engine = engines.get(self.endpoint.engine)
        return await asyncio.to_thread(engine.prompt, self._plain, self.endpoint.model, conversation)

    def body(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> dict[str, Any]:
        """A greedy chat request."""
        return chat.greedy(self.endpoint.model, messages, max_tokens)

    def _body(self, row: HeldOut) -> dict[str, Any]:
        return chat.greedy(self.endpoint.model, row.messages, self.max_tokens, row.tools or ())

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST JSON and return the JSON answer; EngineError with the server's words."""
        return await post_async(self._client, path, body, self._who)


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


async def parity(prober: Prober, rows: Sequence[HeldOut], expected: Sequence[tuple[str, list[int]]]) -> Check:
    """The prompt the engine feeds the model equals the tokenizer's, as token IDs or (where it tells none) as text."""
    check_id = f"{prober.endpoint.engine}.prompt_parity"
    for number, (row, (text, ids)) in enumerate(zip(rows, expected, strict=True), 1):
        try:
            prompt = await prober.prompt(Conversation(f"row {number}", row.messages, row.tools))
        except (LookupError, TypeError, ValueError) as error:
            return Check(check_id, "failed", f"its answer about the prompt is not understood: {error!r}")
        except PipelineError as error:
            return Check(check_id, "failed" if engines.get(prober.endpoint.engine).tells_prompt else "skipped", str(error))
        fed = prompt.text or "" if prompt.ids is None else list(prompt.ids)
        if fed != (text if isinstance(fed, str) else ids):
            return Check(check_id, "failed", f"prompt {number} differs: {difference(fed, text, ids)}")
    kind = "texts" if rows and isinstance(fed, str) else "token IDs"
    return Check(check_id, "passed", f"{len(rows)} prompts, {kind} equal to the tokenizer's")


def difference(fed: list[int] | str, text: str, ids: list[int]) -> str:
    """Where two prompts part, in words."""
    want: Sequence[Any] = text if isinstance(fed, str) else ids
    at = next((i for i, (a, b) in enumerate(zip(fed, want, strict=False)) if a != b), min(len(fed), len(want)))
    near = slice(max(0, at - 20), at + 20) if isinstance(fed, str) else slice(max(0, at - 3), at + 5)
    return f"at position {at} of {len(want)}: engine {fed[near]!r}, tokenizer {want[near]!r}"


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
