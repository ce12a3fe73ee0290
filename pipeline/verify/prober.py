"""Questions put to a served model: is it listed, does it answer, stream and stop, how fast, and what was it fed."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from pipeline import engines
from pipeline.engines import Prompt
from pipeline.engines.base import Engine
from pipeline.errors import EngineError, PipelineError
from pipeline.model.toolcalls import MARKS, plain_calls, tool_format
from pipeline.net import chat
from pipeline.net.chat import Reply, Streamed
from pipeline.net.client import Refused, get_async, open_async, open_client, post_async, wait_for
from pipeline.prompts.conversation import Conversation, NotApplicable
from pipeline.prompts.neutralise import control_tokens, neutralise
from pipeline.report.check import Check, skipped
from pipeline.runs.folder import RunFolder
from pipeline.serve.start import Endpoint
from pipeline.verify.material import Yardstick
from pipeline.verify.score import Answer, HeldOut, read_held_out

T = TypeVar("T")
# row numbers named in a figure
_NAMED = 5
# characters of a refusal
_SHOWN = 120


class Prober:
    """Asks one endpoint; a context manager around one HTTP client.

    A row that the engine's chat API cannot take, or whose calls the engine would not find, is asked by its rendered prompt
    (``yardstick`` makes it); ``reasons`` says why, and which rows (by ``id``) were asked so.
    """

    def __init__(self, endpoint: Endpoint, max_tokens: int, yardstick: Yardstick | None = None) -> None:
        self.endpoint = endpoint
        self.max_tokens = max_tokens
        self.yardstick = yardstick
        self.reasons: dict[str, set[int]] = {}
        self._refused: dict[str, str] = {}
        self._who = f"{endpoint.engine}:"
        self._client = open_async(endpoint.url, endpoint.api_key)
        self._plain = open_client(endpoint.url, endpoint.api_key)

    async def __aenter__(self) -> "Prober":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()
        self._plain.close()

    @property
    def engine(self) -> Engine:
        """The endpoint's engine."""
        return engines.get(self.endpoint.engine)

    async def models(self) -> list[str]:
        """Names the server lists at ``/v1/models``."""
        answer = await get_async(self._client, "/v1/models", self._who)
        return [str(entry["id"]) for entry in answer.get("data", [])]

    async def chat(self, row: HeldOut) -> tuple[Answer, int]:
        """Greedy answer to a held-out prompt and the number of tokens it has."""
        if not self.obstacle(row):
            try:
                reply = await chat.chat_async(self._client, self._body(row), self._who)
                return self._answer(reply, told=bool(row.tools))
            except Refused as refused:
                self._note(row, refused)
        self.reasons.setdefault(self.obstacle(row), set()).add(id(row))
        return self._answer(await self._completed(row), told=False)

    async def plain(self, row: HeldOut) -> tuple[Answer, int]:
        """As :meth:`chat`, for a row that a chat is asked with, by a client that names no sampling settings."""
        reply = await chat.chat_async(self._client, chat.plain(self._body(row)), self._who)
        return self._answer(reply, told=bool(row.tools))

    def _note(self, row: HeldOut, refused: Refused) -> None:
        """Remember what a server that is not ours to configure refuses; any other refusal is raised."""
        lacking = [name for name in ("tools", "documents") if getattr(row, name)]
        if self.engine.serves != "url" or not lacking or self.yardstick is None:
            raise refused
        self._refused[lacking[0]] = f"the server refuses {lacking[0]} ({refused.status}: {refused.text[:_SHOWN]!r})"

    def obstacle(self, row: HeldOut) -> str:
        """Why a row is asked by its rendered prompt and not as a chat; empty when a chat does."""
        if self.yardstick is None:
            return ""
        try:
            self.engine.chat_body(conversation(row))
        except NotApplicable as reason:
            return str(reason)
        if refused := next((reason for name, reason in self._refused.items() if getattr(row, name)), ""):
            return refused
        form = tool_format(self.yardstick.template.chosen(row.tools))
        if row.tools and form not in self.engine.call_forms:
            written = f"in the form of this chat template ({MARKS[form]})" if form else "of this chat template"
            return f"{self.engine.title} does not find calls {written}"
        return "a chat answers with calls only of functions that it offers" if row.calls and not row.tools else ""

    async def _completed(self, row: HeldOut) -> Reply:
        assert self.yardstick
        text, ids = self.yardstick.prompt(row)
        prompt = Prompt(text, tuple(ids))
        path, body = self.engine.completion(self.endpoint.model, prompt, self.max_tokens, row.marks)
        return Reply.of_prompt(self.engine.completed(await self.post(path, body)), f"{self._who} {path}")

    def _answer(self, reply: Reply, *, told: bool) -> tuple[Answer, int]:
        """An answer and its length; ``told``: calls are told apart from the text, even when there are none."""
        if reply.tokens is None:
            raise EngineError(f"{self._who} no chat answer with its usage", evidence=reply.text[:1000])
        ended = reply.finish_reason
        if ended == "tool_calls":  # says what the answer is, not how it ended
            ended = "stop" if reply.tokens < self.max_tokens else "length"
        return as_answer(reply, ended, told=told), reply.tokens

    async def stream(self, row: HeldOut) -> Streamed | None:
        """The same as a chat, streamed; None for a row that no chat is asked with. EngineError when the end mark is missing."""
        try:
            return None if self.obstacle(row) else await chat.stream(self._client, self._body(row), self._who)
        except Refused as refused:
            self._note(row, refused)
            return None

    async def prompt(self, conversation: Conversation) -> Prompt:
        """What the engine feeds the model for this conversation."""
        return await asyncio.to_thread(self.engine.prompt, self._plain, self.endpoint.model, conversation)

    def body(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> dict[str, Any]:
        """A greedy chat request."""
        return chat.greedy(self.endpoint.model, messages, max_tokens)

    def _body(self, row: HeldOut) -> dict[str, Any]:
        return self.body((), self.max_tokens) | self.engine.chat_body(conversation(row))

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST JSON and return the JSON answer; EngineError with the server's words."""
        return await post_async(self._client, path, body, self._who)


def conversation(row: HeldOut, name: str = "") -> Conversation:
    """A held-out row as what is asked."""
    return Conversation(name, row.messages, row.tools, row.documents)


def as_answer(reply: Reply | Streamed, ended: str, *, told: bool) -> Answer:
    """A chat's reply as an answer that ended so; ``told``: its calls are told apart from the text, even when there are none."""
    calls = tuple(plain_calls(reply.calls)) if told or reply.calls else None
    return Answer(reply.text, ended, calls, reply.thought)


async def ask_all(
    ask: Callable[[HeldOut], Awaitable[tuple[T, int]]], rows: Sequence[HeldOut], concurrency: int, done: Callable[[], None]
) -> tuple[list[T], float]:
    """Answers in the rows' order, ``concurrency`` at a time, and the tokens per second of the whole load."""
    gate, begun = asyncio.Semaphore(concurrency), time.perf_counter()

    async def one(row: HeldOut) -> tuple[T, int]:
        async with gate:
            answer = await ask(row)
            done()
            return answer

    results = await asyncio.gather(*(one(row) for row in rows))
    tokens = sum(count for _, count in results)
    return [answer for answer, _ in results], tokens / (time.perf_counter() - begun)


async def parity(prober: Prober, rows: Sequence[HeldOut], expected: Sequence[tuple[str, list[int]]]) -> Check:
    """The prompt the engine feeds the model equals the tokenizer's, as token IDs or (where it tells none) as text.

    Rows that the engine's API cannot express are named and left out.
    """
    check_id, kinds, unsaid = f"{prober.endpoint.engine}.prompt_parity", set[str](), dict[str, list[int]]()
    for number, (row, (text, ids)) in enumerate(zip(rows, expected, strict=True), 1):
        try:
            prompt = await prober.prompt(conversation(row, f"row {number}"))
        except NotApplicable as reason:
            unsaid.setdefault(str(reason), []).append(number)
            continue
        except (LookupError, TypeError, ValueError) as error:
            return Check(check_id, "failed", f"its answer about the prompt is not understood: {error!r}")
        except PipelineError as error:
            return Check(check_id, "failed" if prober.engine.tells_prompt else "skipped", str(error))
        fed = prompt.text or "" if prompt.ids is None else list(prompt.ids)
        kinds.add("texts" if isinstance(fed, str) else "token IDs")
        if fed != (text if isinstance(fed, str) else ids):
            return Check(check_id, "failed", f"prompt {number} differs: {difference(fed, text, ids)}")
    left = sum(map(len, unsaid.values()))
    told = [f"not compared: {_rows(numbers)} ({reason})" for reason, numbers in unsaid.items()]
    if rows and left == len(rows):
        return skipped(check_id, "; ".join(told))
    figure = f"{len(rows) - left} prompts, {' and '.join(sorted(kinds)) or 'token IDs'} equal to the tokenizer's"
    return Check(check_id, "passed", "; ".join([figure, *told]))


async def opened(check: Check, prober: Prober, system: str) -> Check:
    """The check of prompts, failed where a chat without a system message is not given the one that the Modelfile holds."""
    if check.status != "passed" or not system or prober.yardstick is None:
        return check
    bare = Conversation("a chat without a system message", ({"role": "user", "content": "hello"},))
    expected = prober.yardstick.template.render(bare.opened(system).messages, add_generation_prompt=True)
    try:
        fed = (await prober.prompt(bare)).text
    except PipelineError as error:
        return replace(check, status="failed", figure=str(error))
    if fed != expected:
        figure = f"a chat without a system message is not given the Modelfile's: {difference(fed or '', expected, [])}"
        return replace(check, status="failed", figure=figure)
    return replace(check, figure=f"{check.figure}; the Modelfile's system message where a chat brings none")


def with_reasons(check: Check, prober: Prober) -> Check:
    """The check of prompts, and why rows were asked by their rendered prompt, each reason once."""
    told = [f"{len(rows)} asked by rendered prompt: {reason}" for reason, rows in prober.reasons.items()]
    return replace(check, figure="; ".join([check.figure, *told]))


def _rows(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_NAMED]))}{more}"


def difference(fed: list[int] | str, text: str, ids: list[int]) -> str:
    """Where two prompts part, in words."""
    want: Sequence[Any] = text if isinstance(fed, str) else ids
    at = next((i for i, (a, b) in enumerate(zip(fed, want, strict=False)) if a != b), min(len(fed), len(want)))
    near = slice(max(0, at - 20), at + 20) if isinstance(fed, str) else slice(max(0, at - 3), at + 5)
    return f"at position {at} of {len(want)}: engine {fed[near]!r}, tokenizer {want[near]!r}"


def ask_once(run: RunFolder, endpoint: Endpoint, prompt: str | None) -> dict[str, Any]:
    """One prompt (default: the first held-out one), with the held-out rows' system message, and its answer or its error."""
    row, yardstick = read_held_out(run.heldout)[0], None
    if prompt is not None:
        system = [m for m in row.messages if m["role"] == "system"]
        content = neutralise(prompt, control_tokens(run.merged))
        row = HeldOut((*system, {"role": "user", "content": content}), "")
    if row.tools or row.documents or row.calls:
        yardstick = Yardstick.of_folder(run.merged)

    async def ask() -> dict[str, Any]:
        async with Prober(endpoint, 128, yardstick) as prober:
            answer, tokens = await prober.chat(row)
        called = {"calls": list(answer.calls)} if answer.calls else {}
        return {"prompt": row.prompt, "answer": answer.text, **called, "finish reason": answer.finish_reason, "tokens": tokens}

    try:
        return wait_for(ask())
    except PipelineError as error:  # the other backends are still to be asked; verify judges
        return {"prompt": row.prompt, "error": str(error)}
