from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from stub_engine import Answers, serve

from pipeline.model.toolcalls import ARGUMENTS, NAME, QUESTION, TOOL, example_call, tool_format
from pipeline.prompts.chat import EMBEDDED_TEMPLATE
from pipeline.report.check import Check
from pipeline.serve.start import Endpoint
from pipeline.verify.prober import Prober
from pipeline.verify.probes import colour_schema, structured_output, tool_call
from pipeline.verify.score import HeldOut

ROW = HeldOut(({"role": "user", "content": "hi"},), "x")
CHAT = "/v1/chat/completions"


def message(**values: Any) -> dict[str, Any]:
    return {"choices": [{"message": values, "finish_reason": "stop"}]}


def called(name: str = NAME, arguments: object = ARGUMENTS) -> dict[str, Any]:
    return message(tool_calls=[{"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}])


def ask(engine: str, answers: Answers, template: str | None = None) -> tuple[Check, dict[str, Any], list[Any]]:
    """The schema probe, or with a chat template the tool probe."""
    with serve(answers) as (url, seen):

        async def run() -> Check:
            async with Prober(Endpoint(engine, url, "m"), 8) as prober:
                return await (structured_output(prober, ROW) if template is None else tool_call(prober, template))

        check = asyncio.run(run())
    return check, dict(check.data), seen


def test_a_schema_that_is_obeyed():
    check, found, seen = ask("vllm", {CHAT: lambda _: message(content='{"colour": "red", "count": 3}\n')})
    assert (check.id, check.status, found["result"]) == ("vllm.structured_output", "passed", "passed")
    wanted = seen[0][1]["response_format"]
    assert (wanted["type"], wanted["json_schema"]["schema"]) == ("json_schema", colour_schema())
    assert colour_schema()["additionalProperties"] is False
    assert colour_schema()["required"] == ["colour", "count"]


@pytest.mark.parametrize(
    "text",
    ["", "red", '{"colour": "blue", "count": 3}', '{"colour": "red", "count": 30}', '{"colour": "red", "count": 3, "x": 1}'],
)
def test_a_schema_that_is_not_obeyed(text):
    check, found, _ = ask("llamacpp", {CHAT: lambda _: message(content=text)})
    assert (check.status, found["result"]) == ("failed", "failed")
    assert "does not obey" in check.detail


def test_ollama_is_asked_in_both_ways():
    right, wrong = '{"colour": "red", "count": 3}', "{}"
    answers = {CHAT: lambda _: message(content=right), "/api/chat": lambda _: {"message": {"content": right}}}
    check, _, seen = ask("ollama", answers)
    assert (check.status, [path for path, _ in seen]) == ("passed", [CHAT, "/api/chat"])
    assert (seen[1][1]["format"], seen[1][1]["stream"]) == (colour_schema(), False)
    check, _, _ = ask("ollama", {**answers, "/api/chat": lambda _: {"message": {"content": wrong}}})
    assert (check.status, "/api/chat does not obey" in check.detail) == ("failed", True)


@pytest.mark.parametrize(("engine", "status"), [("vllm", "failed"), ("openai", "skipped")])
def test_a_refusal_fails_only_where_the_server_is_ours(engine, status):
    check, found, _ = ask(engine, {CHAT: lambda _: 400})
    assert check.status == status
    assert found["result"] == ("failed" if status == "failed" else "not supported by this engine")
    assert "answered 400" in check.detail


class TestToolCalls:
    def test_vllm_reads_the_templates_own_form(self):
        check, found, seen = ask("vllm", {CHAT: lambda _: called()}, EMBEDDED_TEMPLATE)
        assert (check.id, check.status, found["result"]) == ("vllm.tool_calls", "passed", "passed")
        body = seen[0][1]
        assert (body["messages"], body["tools"], body["tool_choice"]) == ([QUESTION], [TOOL], "auto")
        written = '<tool_call>\n{"name": "lookup_host", "arguments": {"host": "web-01"}}\n</tool_call>'
        assert body["structured_outputs"] == {"choice": [written]}

    def test_llamacpp_is_made_to_call_from_the_opening_on(self):
        check, _, seen = ask("llamacpp", {CHAT: lambda _: called()}, EMBEDDED_TEMPLATE)
        assert (check.status, seen[0][1]["tool_choice"]) == ("passed", "required")
        assert seen[0][1]["messages"] == [QUESTION, {"role": "assistant", "content": "<tool_call>\n"}]

    @pytest.mark.parametrize("answer", [message(content="<tool_call>\n{}"), called("other"), called(arguments={"host": "x"})])
    def test_a_call_that_is_lost_or_changed_fails(self, answer):
        check, found, _ = ask("llamacpp", {CHAT: lambda _: answer}, EMBEDDED_TEMPLATE)
        assert (check.status, found["result"]) == ("failed", "failed")

    def test_ollama_cannot_be_made_to_call(self):
        check, found, seen = ask("ollama", {CHAT: lambda _: message(content="no")}, EMBEDDED_TEMPLATE)
        assert (check.status, found["result"], "tool_choice" in seen[0][1]) == ("skipped", "not tested", False)
        assert "answered 'no' instead" in check.detail
        assert ask("ollama", {CHAT: lambda _: called()}, EMBEDDED_TEMPLATE)[0].status == "passed"

    def test_a_template_without_tools_is_not_asked(self):
        check, found, seen = ask("vllm", {}, "{% for m in messages %}{{ m.content }}{% endfor %}")
        assert (check.status, found["result"], seen) == ("skipped", "not supported by the model's chat template", [])

    def test_llamacpp_does_not_find_granite_3_calls(self):
        check, found, seen = ask("llamacpp", {}, "{{ tools }} <|tool_call|>")
        assert (check.status, seen) == ("skipped", [])
        assert found["result"] == "not supported by this engine for this chat template"


def test_form_of_the_published_templates(template, published):
    assert tool_format(template.source) == ("granite" if template.source == published("3.3").source else "granite4")


def test_the_example_is_what_the_template_writes(template):
    call = example_call(tool_format(template.source) or "")
    assert call.text.startswith(call.opening)
    if call.opening == "<tool_call>\n":
        past = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": NAME, "arguments": ARGUMENTS}}]}
        assert f"<|end_of_role|>{call.text}<|end_of_text|>" in template.render([QUESTION, past], tools=[TOOL])
