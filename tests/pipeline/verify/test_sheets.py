"""Examples of the report: calls and thoughts can be read, what says the same looks the same, and nothing of it is markup."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.report.answers import THOUGHT, compare
from pipeline.report.page import render
from pipeline.report.schema import Example, parse
from pipeline.verify.material import Material
from pipeline.verify.score import Answer, HeldOut
from pipeline.verify.sheets import asked, examples, told

ASKED = ({"role": "user", "content": "Who owns <b>web-01</b>?"},)
TOOL = {"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}
LOOK = {"name": "look", "arguments": {"host": "<script>", "depth": 2}}
TEXT = '<tool_call>\n{"name": "look", "arguments": {"host": "<script>", "depth": 2}}\n</tool_call>'
CALLS = HeldOut(ASKED, TEXT, (TOOL,), calls=(LOOK,))
THINKS = HeldOut(ASKED, "<think>\nIn the list.\n</think>\n\nAda")


def test_plain_answers_are_shown_as_they_are() -> None:
    row = HeldOut(ASKED, ' {"a": 1}\n')
    assert told(row, Answer(row.expected, "stop")) == row.expected
    assert asked(row) == "Who owns <b>web-01</b>?"
    assert told(HeldOut(ASKED, "x", (TOOL,)), Answer("no call", "stop")) == "no call"


def test_calls_that_are_the_same_look_the_same() -> None:
    seen = {
        told(CALLS, answer)
        for answer in (
            Answer(TEXT, "stop"),
            Answer("", "stop", (LOOK,)),
            Answer("", "stop", ({"name": "look", "arguments": {"depth": 2.0, "host": "<script>"}},)),
        )
    }
    assert seen == {json.dumps({"call 1": 'look {"depth": 2, "host": "<script>"}'})}
    other = told(CALLS, Answer("Wait.", "stop", (LOOK, {"name": "move", "arguments": {}})))
    assert compare(seen.pop(), other).note == "differs in answer, call 2"
    assert (
        compare(told(CALLS, Answer(TEXT, "stop")), told(CALLS, Answer("I do not know", "stop"))).note
        == "differs in call 1, answer"
    )
    assert told(CALLS, Answer("", "stop", ())) == ""


def test_a_thought_is_shown_and_not_compared() -> None:
    expected, got = told(THINKS, Answer(THINKS.expected, "stop")), told(THINKS, Answer("Ada", "stop", thought="Quick."))
    assert json.loads(expected) == {THOUGHT: "In the list.", "answer": "Ada"}
    found = compare(expected, got)
    assert (found.matches, found.lines[0].spans[0].text) == (True, "Quick.")
    assert compare(expected, told(THINKS, Answer("<think>x</think>Bob", "stop"))).note == "differs in answer"
    assert compare(expected, told(THINKS, Answer("Ada", "stop"))).matches
    fields = HeldOut(ASKED, '<think>a</think>{"verdict": "bad"}')
    assert json.loads(told(fields, Answer(fields.expected, "stop"))) == {THOUGHT: "a", "verdict": "bad"}


def test_documents_and_tools_are_shown_in_short() -> None:
    row = HeldOut(ASKED, "x", (TOOL,), ({"doc_id": "7", "text": "d" * 300}, {"title": "T", "text": "e"}, {"x": 1}))
    shown = asked(row).split("\n\n")
    assert shown[1:] == ["Tools: look", f"Document 7: {'d' * 200}…", "Document T: e", 'Document 3: {"x": 1}']


def test_the_page_escapes_them_and_shows_the_wrong_ones_first() -> None:
    rows, right, wrong = [THINKS] * 20 + [CALLS], Answer("Ada", "stop"), Answer("", "stop", ())
    material = Material(rows, [], [right] * 21, [*[right] * 20, Answer(TEXT, "stop")], {}, 8, None)  # type: ignore[arg-type]
    found = examples(material, {"vllm": [*[right] * 20, wrong]})
    assert len(found) == 9 and found[-1].answers == {"vllm": ""}
    sample = json.loads((Path(__file__).parents[1] / "sample_report.json").read_text())
    page = render(parse(sample | {"examples": [Example(**example.model_dump()).model_dump() for example in found]}))
    assert found[-1].expected == told(CALLS, Answer(TEXT, "stop"))
    assert "call 1" in page and "look {&#34;depth&#34;: 2, &#34;host&#34;: &#34;&lt;script&gt;&#34;}" in page
    assert "<script" not in page and "<b>web-01" not in page
    assert THOUGHT in page
