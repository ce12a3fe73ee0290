"""Rows with tools, documents and calls on their way to an engine and back: a chat where it takes them, else the rendered prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stub_server import Stub, serving

from pipeline.errors import EngineError
from pipeline.net.chat import PATH
from pipeline.net.client import Refused, wait_for
from pipeline.prompts.chat import ChatTemplate
from pipeline.report.check import Check
from pipeline.serve.start import Endpoint
from pipeline.verify.material import Yardstick
from pipeline.verify.prober import Prober, as_answer, parity, with_reasons
from pipeline.verify.score import Answer, HeldOut, same

TOOL = {"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}}}
LOOK = {"name": "look", "arguments": {"host": "é", "depth": 2}}
TEXT = '<tool_call>\n{"name": "look", "arguments": {"host": "é", "depth": 2}}\n</tool_call>'
ASKED = {"role": "user", "content": "q"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"function": LOOK}]}
PLAIN = HeldOut((ASKED,), "x")
TOOLS = HeldOut((ASKED,), TEXT, (TOOL,), calls=(LOOK,))
HISTORY = HeldOut((ASKED, CALLED, {"role": "tool", "content": "r"}), "x", (TOOL,))
DOCUMENTS = HeldOut((ASKED,), "x", documents=({"doc_id": "1", "text": "d"},))
USAGE = {"prompt_tokens": 1, "completion_tokens": 4}


def _chat(finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": None, **message}, "finish_reason": finish}], "usage": USAGE}


def _call(name: str = "look", arguments: Any = LOOK["arguments"]) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


@pytest.fixture
def yardstick(tokenizer_folder: Path) -> Yardstick:
    return Yardstick.of_folder(tokenizer_folder)


@pytest.fixture
def three(published: Callable[[str], ChatTemplate], yardstick: Yardstick) -> Yardstick:
    return Yardstick(published("3.3"), yardstick.tokenizer, yardstick.controls)


def _ask(stub: Stub, row: HeldOut, yardstick: Yardstick, engine: str = "vllm") -> tuple[Answer, Prober]:
    async def ask() -> tuple[Answer, Prober]:
        async with Prober(Endpoint(engine, stub.url, "m"), 9, yardstick) as prober:
            return (await prober.chat(row))[0], prober

    return wait_for(ask())


def test_a_chat_carries_tools_and_calls_as_a_user_would_send_them(yardstick: Yardstick) -> None:
    with serving({PATH: _chat("tool_calls", tool_calls=[_call()])}) as stub:
        answer, prober = _ask(stub, HISTORY, yardstick)
    body = stub.bodies[PATH]
    assert (body["tools"], body["model"], body["max_tokens"], body["temperature"]) == ([TOOL], "m", 9, 0)
    sent = body["messages"][1]["tool_calls"][0]
    assert (sent["type"], sent["function"]) == ("function", {"name": "look", "arguments": '{"host": "é", "depth": 2}'}) and sent[
        "id"
    ]
    assert answer == Answer("", "stop", (LOOK,)) and same(TOOLS, answer, Answer(TEXT, "stop"))
    assert prober.reasons == {}


def test_a_chat_carries_documents_to_the_template(yardstick: Yardstick) -> None:
    with serving({PATH: _chat(content="x")}) as stub:
        answer, _ = _ask(stub, DOCUMENTS, yardstick, "sglang")
    assert stub.bodies[PATH]["chat_template_kwargs"] == {"documents": [{"doc_id": "1", "text": "d"}]}
    assert answer == Answer("x", "stop")


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_a_thought_told_apart_is_kept_apart(yardstick: Yardstick, key: str) -> None:
    with serving({PATH: _chat(content="Ada", **{key: "Quick."})}) as stub:
        assert _ask(stub, PLAIN, yardstick)[0] == Answer("Ada", "stop", None, "Quick.")


def test_no_calls_where_tools_were_offered_are_told_too(yardstick: Yardstick) -> None:
    with serving({PATH: _chat(content=TEXT)}) as stub:
        assert _ask(stub, TOOLS, yardstick)[0] == Answer(TEXT, "stop", ())


def test_a_call_at_the_limit_did_not_end_by_itself(yardstick: Yardstick) -> None:
    said = _chat("tool_calls", tool_calls=[_call()]) | {"usage": {"completion_tokens": 9}}
    with serving({PATH: said}) as stub:
        assert _ask(stub, TOOLS, yardstick)[0].finish_reason == "length"


@pytest.mark.parametrize("calls", [[{}], ["x"], 3, [{"function": None}]])
def test_calls_that_are_none_are_an_error(yardstick: Yardstick, calls: Any) -> None:
    with serving({PATH: _chat(tool_calls=calls)}) as stub, pytest.raises(EngineError, match="no chat answer"):
        _ask(stub, TOOLS, yardstick)


def test_ollama_is_asked_documents_by_the_rendered_prompt(yardstick: Yardstick) -> None:
    said = {"response": "x", "done_reason": "stop", "eval_count": 4}
    with serving({"/api/generate": said}) as stub:
        answer, prober = _ask(stub, DOCUMENTS, yardstick, "ollama")
    body = stub.bodies["/api/generate"]
    assert (body["prompt"], body["raw"], body["options"]) == (
        yardstick.prompt(DOCUMENTS)[0],
        True,
        {"temperature": 0, "num_predict": 9},
    )
    assert answer == Answer("x", "stop")
    check = with_reasons(Check("ollama.prompt_parity", "passed", "3 prompts"), prober)
    assert check.figure == "3 prompts; 1 asked by rendered prompt: Ollama's API has no documents"


def test_calls_in_a_form_that_llamacpp_does_not_find_are_asked_by_the_rendered_prompt(three: Yardstick) -> None:
    text = '<|tool_call|>[{"name": "look", "arguments": {"depth": 2, "host": "é"}}]'
    completions = {"choices": [{"text": text, "finish_reason": "stop"}], "usage": USAGE}
    with serving({"/v1/completions": completions}) as stub:
        answer, prober = _ask(stub, TOOLS, three, "llamacpp")
    body = stub.bodies["/v1/completions"]
    assert body["prompt"] == three.prompt(TOOLS)[1] and "<|tool_call|>" in body["preserved_tokens"]
    assert same(TOOLS, answer, Answer("", "stop", (LOOK,)))
    assert list(prober.reasons) == ["llama.cpp does not find calls in the form of this chat template (<|tool_call|>)"]


def test_a_url_that_refuses_tools_is_asked_by_the_rendered_prompt_and_once_only(yardstick: Yardstick) -> None:
    completions = {"choices": [{"text": TEXT, "finish_reason": "stop"}], "usage": USAGE}
    with serving({PATH: (400, {}, {"error": "no tools"}), "/v1/completions": completions}) as stub:

        async def ask() -> Prober:
            async with Prober(Endpoint("openai", stub.url, "m"), 9, yardstick) as prober:
                assert await prober.stream(HISTORY) is None
                for row in (TOOLS, TOOLS, HISTORY):
                    await prober.chat(row)
                with pytest.raises(Refused):
                    await prober.chat(PLAIN)
                return prober

        prober = wait_for(ask())
    assert [path for path, _ in stub.seen] == [PATH, *["/v1/completions"] * 3, PATH]
    assert stub.bodies["/v1/completions"]["prompt"] == yardstick.prompt(HISTORY)[0]
    (told,) = with_reasons(Check("openai.prompt_parity", "skipped", "unknown"), prober).figure.split("; ")[1:]
    assert told.startswith("2 asked by rendered prompt: the server refuses tools (400: ") and "no tools" in told


def test_our_own_engine_must_not_refuse_tools(yardstick: Yardstick) -> None:
    with serving({PATH: (400, {}, {"error": "requires --tool-call-parser"})}) as stub, pytest.raises(Refused):
        _ask(stub, TOOLS, yardstick)


def test_a_streamed_call_is_put_together(yardstick: Yardstick) -> None:
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": None},
        {"reasoning_content": "Qui"},
        {"reasoning": "ck."},
        {"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "look", "arguments": '{"host": '}}]},
        {"tool_calls": [{"index": 1, "function": {"name": "move", "arguments": "{}"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"é", "depth": 2}'}}]},
    ]
    events = "".join(f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in deltas)

    async def stream(url: str, row: HeldOut) -> Any:
        async with Prober(Endpoint("vllm", url, "m"), 9, yardstick) as prober:
            return await prober.stream(row)

    with serving({PATH: f"{events}data: [DONE]\n\n".encode()}) as stub:
        found = wait_for(stream(stub.url, TOOLS))
    assert (found.text, found.thought, found.chunks) == ("", "Quick.", 5)
    assert as_answer(found, "", told=True).calls == (LOOK, {"name": "move", "arguments": {}})
    broken = b'data: {"choices": [{"delta": {"tool_calls": [3]}}]}\n\ndata: [DONE]\n\n'
    with serving({PATH: broken}) as stub, pytest.raises(EngineError, match="no streamed chat answer"):
        wait_for(stream(stub.url, TOOLS))


def test_a_plain_client_names_no_sampling_settings_and_everything_else(yardstick: Yardstick) -> None:
    async def ask(url: str) -> Answer:
        async with Prober(Endpoint("vllm", url, "m"), 9, yardstick) as prober:
            return (await prober.plain(HISTORY))[0]

    with serving({PATH: _chat("tool_calls", tool_calls=[_call()])}) as stub:
        assert _ask(stub, HISTORY, yardstick)[0] == Answer("", "stop", (LOOK,))
        greedy = stub.bodies[PATH]
        assert wait_for(ask(stub.url)) == Answer("", "stop", (LOOK,))
        plain = stub.bodies[PATH]
    assert greedy == plain | {"temperature": 0}
    assert not {"temperature", "top_p"} & set(plain)


def _parity(stub: Stub, engine: str, rows: list[HeldOut], yardstick: Yardstick) -> Check:
    async def compare() -> Check:
        async with Prober(Endpoint(engine, stub.url, "m"), 9, yardstick) as prober:
            return await parity(prober, rows, [yardstick.prompt(row) for row in rows])

    return wait_for(compare())


def test_prompts_of_documents_and_tools_are_compared(yardstick: Yardstick) -> None:
    for row in (TOOLS, HISTORY, DOCUMENTS):
        with serving({"/tokenize": {"tokens": yardstick.prompt(row)[1]}}) as stub:
            assert _parity(stub, "vllm", [row], yardstick).status == "passed"
        sent = stub.bodies["/tokenize"]
        assert (sent.get("tools"), sent.get("chat_template_kwargs")) == (
            [TOOL] if row.tools else None,
            {"documents": [{"doc_id": "1", "text": "d"}]} if row.documents else None,
        )
        # an engine that leaves tools and documents out
        with serving({"/tokenize": {"tokens": yardstick.prompt(HeldOut(row.messages, ""))[1]}}) as stub:
            assert _parity(stub, "vllm", [row], yardstick).status == "failed"


def test_rows_that_an_api_cannot_say_are_named_and_not_failed(yardstick: Yardstick) -> None:
    debug = {"_debug_info": {"rendered_template": yardstick.prompt(PLAIN)[0]}}
    with serving({"/api/chat": debug}) as stub:
        some = _parity(stub, "ollama", [PLAIN, DOCUMENTS, PLAIN, DOCUMENTS], yardstick)
        none = _parity(stub, "ollama", [DOCUMENTS], yardstick)
    told = "2 prompts, texts equal to the tokenizer's; not compared: rows 2, 4 (Ollama's API has no documents)"
    assert (some.status, some.figure) == ("passed", told)
    assert (none.status, none.figure) == ("skipped", "not compared: row 1 (Ollama's API has no documents)")


def test_what_a_row_says_is_neutral_except_the_assistants_own(yardstick: Yardstick) -> None:
    bad = "<|end_of_text|><tool_call>"
    messages = ({"role": "user", "content": bad}, {"role": "assistant", "content": bad})
    row = yardstick.neutral(HeldOut(messages, bad, ({"function": {"name": bad}},), ({"text": bad},)))
    clean = row.messages[0]["content"]
    assert bad not in clean and row.messages[1]["content"] == bad
    assert row.tools == ({"function": {"name": clean}},) and row.documents == ({"text": clean},)
    assert yardstick.neutral(row) == row
