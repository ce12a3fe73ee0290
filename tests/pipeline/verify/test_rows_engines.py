"""Rows with tools, documents and calls on real servers: fed the tokenizer's prompts, and their calls found, whole and streamed."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from datetime import datetime
from pathlib import Path

import pytest
from servers import Process, free_port, llama

from pipeline.engines.vllm.engine import Vllm
from pipeline.model.toolcalls import ARGUMENTS, NAME, QUESTION, TOOL, example_call, tool_format, written_calls
from pipeline.net import chat
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.parity import Reference, compare
from pipeline.report.check import Check
from pipeline.serve.start import Endpoint
from pipeline.verify.material import Yardstick
from pipeline.verify.prober import Prober, as_answer, ask_all, conversation, parity, with_reasons
from pipeline.verify.score import Answer, HeldOut, is_exact
from tests.pipeline.prompts.test_parity_engines import RendererWith, VllmWith

pytestmark = pytest.mark.slow
# what every engine passes on unchanged, and what only looks as if it might not be: order of names, "<&>", signs beyond ASCII
OTHER = {
    "name": "search",
    "description": "",
    "parameters": {
        "required": ["query"],
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "é <b> & 'c' \"d\" \\ 漢", "default": "x", "minLength": 1},
            "after": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
        },
        "additionalProperties": False,
    },
}
TOOLS = (dict(TOOL), {"type": "function", "function": OTHER})
MADE = [
    {
        "name": "search",
        "arguments": {"query": 'é <b> & "c"\n', "after": None, "n": 3, "x": 0.5, "deep": {"b": [1, True], "a": {}}},
    }
]
DOCUMENTS = ({"doc_id": "1", "title": "T", "text": 'é <b>\n& "c"'}, {"text": "y", "doc_id": "2"})
CALLS = [{"name": NAME, "arguments": ARGUMENTS}]


def _rows(template: str) -> list[HeldOut]:
    """The four kinds of rows, past calls as this template takes them."""
    form = tool_format(template) or ""
    wrapped = [{"type": "function", "function": call} for call in MADE]
    past = {"content": "", "tool_calls": wrapped} if form == "granite4" else {"content": written_calls(form, MADE)}
    ask, system = dict(QUESTION), {"role": "system", "content": "Be brief."}
    messages = (system, ask, {"role": "assistant", **past}, {"role": "tool", "content": '{"owner": "Ada"}'})
    text, calls = written_calls(form, CALLS), tuple(CALLS)
    return [
        HeldOut((ask,), text, TOOLS, calls=calls),
        HeldOut((system, ask), "Ada.", None, DOCUMENTS),
        HeldOut(messages, "Ada.", TOOLS),
        HeldOut((*messages[1:], {"role": "assistant", "content": "Ada."}, ask), text, TOOLS[:1], DOCUMENTS[1:], calls=calls),
    ]


async def _asked(endpoint: Endpoint, yardstick: Yardstick) -> tuple[Check, list[Answer], list[Answer | None]]:
    """The check of prompts, the answers whole, and streamed."""
    rows = _rows(yardstick.template.source)
    async with Prober(endpoint, 6, yardstick) as prober:
        check = await parity(prober, rows, [yardstick.prompt(row) for row in rows])
        answers, _ = await ask_all(prober.chat, rows, 2, lambda: None)
        streams = [await prober.stream(row) for row in rows]
    streamed = [stream and as_answer(stream, "", told=True) for stream in streams]
    return with_reasons(check, prober), answers, streamed


async def _forced(endpoint: Endpoint, template: str) -> list[Answer]:
    """A call that the model is made to write, whole and streamed."""
    async with Prober(endpoint, 64) as prober:
        body = prober.body([QUESTION], 64) | {"tools": [TOOL]}
        forced = prober.engine.force_call(body, example_call(tool_format(template) or ""))
        assert forced
        whole = await chat.chat_async(prober._client, forced)
        return [as_answer(one, "", told=True) for one in (whole, await chat.stream(prober._client, forced))]


def test_llamacpp(base: Path, gguf: Path, template: ChatTemplate, tmp_path: Path) -> None:
    mine = Yardstick.of_folder(base)
    yardstick, rows = Yardstick(template, mine.tokenizer, mine.controls), _rows(template.source)
    granite4 = tool_format(template.source) == "granite4"
    with llama(gguf, template.source, tmp_path) as server:
        endpoint = Endpoint("llamacpp", server.url(180), "m")
        check, answers, streamed = asyncio.run(_asked(endpoint, yardstick))
        called = asyncio.run(_forced(endpoint, template.source)) if granite4 else []
    assert (check.status, check.figure.partition(";")[0]) == ("passed", "4 prompts, token IDs equal to the tokenizer's")
    assert ("3 asked by rendered prompt: llama.cpp does not find calls" in check.figure) is not granite4
    assert [answer.finish_reason for answer in answers] == ["length"] * 4
    # calls are told apart where a chat offered tools
    told = [() if granite4 and row.tools else None for row in rows]
    assert [answer.calls for answer in answers] == told
    assert [one is None for one in streamed] == [bool(row.tools) and not granite4 for row in rows]
    assert [is_exact(rows[0], answer, ()) for answer in called] == [True] * len(called)


def test_vllm_renders_them_as_the_tokenizer_does(base: Path, template: ChatTemplate, vllm_renderer: str) -> None:
    reference = Reference(template, datetime.now(), Yardstick.of_folder(base).tokenizer)
    asked = [conversation(row, f"row {number}") for number, row in enumerate(_rows(template.source))]
    matrix = compare(reference, [RendererWith("vllm", vllm_renderer, "m", asked=VllmWith(template.source))], asked)
    assert matrix.counts() == {"vllm": {"equal": 4}}, matrix.differences


@pytest.mark.long
@pytest.mark.e2e
def test_vllm(base: Path, template: ChatTemplate, tmp_path: Path) -> None:
    """A real one with weights: a start of half a minute a template."""
    if not Vllm().available().usable:
        pytest.skip("vLLM is not installed")
    folder, port = tmp_path / "model", free_port()
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(template.source, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text())
    # the same weights as heads of 32: vLLM's CPU attention has no kernel for 16
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    form = tool_format(template.source) or ""
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "m"]
    argv += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "4096"]
    argv += ["--enable-auto-tool-choice", "--tool-call-parser", form]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with Process(argv, port, tmp_path / "vllm.log", **settings) as server:
        endpoint = Endpoint("vllm", server.url(300), "m")
        check, answers, streamed = asyncio.run(_asked(endpoint, Yardstick.of_folder(folder)))
        called = asyncio.run(_forced(endpoint, template.source))
    assert (check.status, check.figure) == ("passed", "4 prompts, token IDs equal to the tokenizer's")
    rows = _rows(template.source)
    assert [answer.calls for answer in answers] == [() if row.tools else None for row in rows]
    assert all(streamed)
    assert [is_exact(rows[0], answer, ()) for answer in called] == [True, True]
