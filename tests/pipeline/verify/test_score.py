from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.verify.score import (
    CUT,
    Answer,
    HeldOut,
    answer_budget,
    fields_of,
    is_exact,
    may_parse,
    read_held_out,
    read_reference,
    rows_asked,
    said,
    same,
    score,
    whole,
    wilson,
)

WANT = '{"severity":"high","technique":"T1486","verdict":"malicious","action":"isolate_host"}'


def _row(expected: str = WANT) -> HeldOut:
    return HeldOut(({"role": "user", "content": "alert"},), expected)


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        (WANT, True),
        (json.dumps(json.loads(WANT), indent=1), True),
        (WANT.replace("isolate_host", "monitor"), True),
        (WANT.replace("T1486", "T1490"), False),
        (WANT.replace('"verdict":"malicious",', ""), False),
        (WANT + " sure", False),
        ("[]", False),
        ("", False),
    ],
)
def test_exact_needs_json_with_the_three_key_fields(text: str, exact: bool) -> None:
    assert is_exact(_row(), Answer(text, "stop"), fields_of([_row()])) is exact


def test_score_counts_each_field() -> None:
    answers = [Answer(WANT, "stop"), Answer(WANT.replace("high", "low"), "stop"), Answer("no", "length"), Answer(WANT, "stop")]
    assert score([_row()] * 4, answers) == {
        "n": 4, "json_valid": 0.75, "severity": 0.5, "technique": 0.75, "verdict": 0.75, "action": 0.75, "calls": None, "exact": 0.5, "finish_stop": 0.75,
    }  # fmt: skip


def test_answers_that_are_not_json_are_compared_as_text() -> None:
    rows = [_row("Paris"), _row("Rome")]
    found = score(rows, [Answer(" Paris\n", "stop"), Answer("rome", "stop")])
    assert found["exact"] == 0.5
    assert found["severity"] is None
    assert found["technique"] is None


def test_held_out_rows_are_read_with_their_answer_apart(tmp_path: Path) -> None:
    path = tmp_path / "heldout.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n")
    assert read_held_out(path) == [HeldOut(({"role": "user", "content": "a"},), "b")]


def test_a_broken_held_out_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "heldout.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"messages": []}\n')
    with pytest.raises(InputError, match=rf"{path}:2: not a held-out row"):
        read_held_out(path)


def test_free_text_may_be_longer_than_its_author_was_and_json_not() -> None:
    assert answer_budget([_row('{"a":1}'), _row('{"a":2}')], [20, 30]) == 42
    assert [answer_budget([_row("Yes, it is.")], [longest]) for longest in (4, 90, 400)] == [72, 244, 412]


ASKED = ({"role": "user", "content": "Who owns web-01?"},)
TOOLS = ({"type": "function", "function": {"name": "look", "description": "", "parameters": {}}},)
LOOK = {"name": "look", "arguments": {"host": "web-01", "depth": 2}}
MOVE = {"name": "move", "arguments": {}}
GRANITE4 = '<tool_call>\n{"name": "look", "arguments": {"host": "web-01", "depth": 2}}\n</tool_call>'
GRANITE3 = '<|tool_call|>[{"name": "look", "arguments": {"host": "web-01", "depth": 2}}]'


def _calls(*calls: dict, text: str = GRANITE4) -> HeldOut:
    return HeldOut(ASKED, text, TOOLS, calls=calls or (LOOK,))


def _told(*calls: dict, text: str = "") -> Answer:
    return Answer(text, "stop", calls)


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        (GRANITE4, True),
        (GRANITE3, True),
        ('<tool_call>{"arguments":{"depth":2,"host":"web-01"},"name":"look"}</tool_call>', True),
        (f"Let me look.\n{GRANITE4}", True),
        (GRANITE4.replace("2", "2.0"), True),
        (GRANITE4.replace("2", "3"), False),
        (GRANITE4.replace("2", "true"), False),
        (GRANITE4.replace("2", '"2"'), False),
        (GRANITE4.replace(', "depth": 2', ""), False),
        (GRANITE4.replace("look", "move"), False),
        (f"{GRANITE4}\n{GRANITE4}", False),
        (GRANITE4 + " done", False),
        (GRANITE4.removesuffix("}\n</tool_call>"), False),
        ('{"name": "look", "arguments": {"host": "web-01", "depth": 2}}', False),
        ("", False),
    ],
)
def test_a_call_is_right_by_name_and_arguments_however_it_is_written(text: str, exact: bool) -> None:
    assert is_exact(_calls(), Answer(text, "stop"), ()) is exact


def test_calls_that_an_api_told_apart_count_and_its_text_is_not_read_for_more() -> None:
    assert is_exact(_calls(LOOK, MOVE), _told(MOVE, LOOK), ())
    assert not is_exact(_calls(LOOK, MOVE), _told(LOOK, LOOK), ())
    # the engine did not find the call that is in its text: a user gets none
    assert not is_exact(_calls(), _told(text=GRANITE4), ())
    row = HeldOut(ASKED, "web-01 is mine", TOOLS)
    assert is_exact(row, _told(text="web-01 is mine"), ()) and not is_exact(row, _told(LOOK, text="web-01 is mine"), ())


def test_a_thought_is_left_out_wherever_it_comes_from() -> None:
    row = HeldOut(ASKED, "<think>\nIt is in the list.\n</think>\n\nAda")
    for answer in (
        Answer("<think>Quick.</think> Ada\n", "stop"),
        Answer("<think>Quick.</think><response>Ada</response>", "stop"),
        Answer("Ada", "stop", thought="Quick."),
        Answer("<response>Ada</response>", "stop", thought="Quick."),
        Answer("Ada", "stop"),
    ):
        assert is_exact(row, answer, ()), answer
    for text in ("<think>Ada", "<think>Quick.</think>Bob", "Quick.</think>Bob"):
        assert not is_exact(row, Answer(text, "length"), ())
    assert not HeldOut(ASKED, "Write it, then </think>, then 42").thinks
    opened = HeldOut(ASKED, "It is in the list.\n</think>\n\nAda", opened=True)  # the prompt ends with the opening mark
    assert (opened.thinks, opened.answer) == (True, "Ada") and is_exact(opened, Answer("Quick.</think>Ada", "stop"), ())
    # a row that expects no thought is compared whole, as ever
    assert not is_exact(HeldOut(ASKED, "Ada"), Answer("<think>Quick.</think>Ada", "stop"), ())
    assert not is_exact(HeldOut(ASKED, "Ada"), Answer("Ada", "stop", thought="Quick."), ())


def test_a_thought_before_a_call() -> None:
    row = _calls(text=f"<think>\nLook.\n</think>\n\n{GRANITE4}")
    assert said(row, Answer(row.expected, "stop")) == ("", [LOOK], "Look.")
    assert is_exact(row, Answer("", "stop", (LOOK,), "Hm."), ())
    # of a row whose author did not think, too
    assert same(_calls(), Answer(row.expected, "stop"), Answer("", "stop", (LOOK,), "Hm."))
    assert is_exact(HeldOut(ASKED, "Ada", TOOLS), Answer("<think>Hm.</think>Ada", "stop"), ())


def test_a_set_of_calls_json_answers_and_thoughts() -> None:
    thought = HeldOut(ASKED, f"<think>\nBad.\n</think>\n\n{WANT}")
    rows = [_row(), _calls(), thought, _calls()]
    assert fields_of(rows) == ("severity", "technique", "verdict", "action")
    right = [Answer(WANT, "stop"), Answer(GRANITE4, "stop"), Answer(WANT, "stop", thought="Bad."), _told(LOOK)]
    found = score(rows, right)
    assert {found[key] for key in ("json_valid", "severity", "technique", "verdict", "action", "calls", "exact")} == {1.0}
    wrong = [Answer(GRANITE4, "stop"), Answer(WANT, "stop"), Answer(WANT.replace("high", "low"), "stop"), _told(MOVE)]
    found = score([HeldOut(ASKED, WANT, TOOLS), *rows[1:]], wrong)
    assert found["json_valid"] == 1.0
    assert (found["severity"], found["technique"], found["calls"], found["exact"]) == (0.0, 0.5, 0.0, 0.0)
    text = score([_row("Paris"), _calls(), _row()], [Answer("Paris", "stop"), _told(LOOK), Answer(WANT + " ", "stop")])
    assert (text["severity"], text["calls"], text["exact"]) == (None, 1.0, 1.0)
    alone = score([_calls(), _calls()], [_told(LOOK), Answer("no", "stop")])
    assert (alone["json_valid"], alone["calls"], alone["exact"]) == (0.5, 0.5, 0.5)


def test_what_was_said_is_the_same_however_it_was_told() -> None:
    assert same(_calls(), Answer(GRANITE4, "stop"), _told({"name": "look", "arguments": {"depth": 2.0, "host": "web-01"}}))
    assert same(_calls(), Answer(f"Wait.\n{GRANITE4}", "stop"), _told(LOOK, text="Wait.\n"))
    assert not same(_calls(), Answer(GRANITE4, "stop"), _told(LOOK, text="Wait."))
    assert not same(_row(), Answer("a", "stop"), Answer("b", "stop")) and same(
        _row(), Answer("a ", "stop"), Answer("a", "length")
    )


def test_rows_are_read_with_their_tools_documents_calls_and_written_answer(tmp_path: Path) -> None:
    wrapped = {"type": "function", "function": LOOK}
    lines = [
        {
            "messages": [*ASKED, {"role": "assistant", "content": "", "tool_calls": [wrapped]}],
            "tools": TOOLS,
            "expected": GRANITE4,
        },
        {"messages": [*ASKED, {"role": "assistant", "content": GRANITE3}], "tools": TOOLS},
        {"messages": [*ASKED, {"role": "assistant", "content": "x"}], "documents": [{"doc_id": "1", "text": "d"}], "tools": []},
    ]
    path = tmp_path / "heldout.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    four, three, documents = read_held_out(path)
    assert (four.calls, four.expected, four.answer, four.marks[0]) == ((LOOK,), GRANITE4, "", "<|tool_call|>")
    assert (three.calls, three.expected, three.tools) == ((LOOK,), GRANITE3, TOOLS)
    assert (documents.documents, documents.tools, documents.calls, documents.marks) == (
        ({"doc_id": "1", "text": "d"},),
        None,
        None,
        (),
    )
    path.write_text('{"text": "old", "finish_reason": "stop"}\n')
    assert read_reference(path) == {0: Answer("old", "stop")}


def test_calls_have_little_room_and_thoughts_much() -> None:
    assert answer_budget([_calls(), _row()], [40, 30]) == 52
    assert answer_budget([_calls()], [40]) == 52
    assert answer_budget([_calls(), _row("text")], [40, 30]) == 144
    thought = HeldOut(ASKED, f"<think>a</think>{WANT}")
    assert [answer_budget([thought, _row()], [longest, 9]) for longest in (100, 800, 2000)] == [264, 1024, 2012]


def test_a_sample_says_which_rows_were_asked(tmp_path: Path) -> None:
    path, rows = tmp_path / "base.jsonl", [_row() for _ in range(5)]
    path.write_text("".join(f'{{"row": {row}, "text": "{row}", "finish_reason": "cut"}}\n' for row in (1, 3, 5)))
    answers = read_reference(path)
    assert {row: answer.text for row, answer in answers.items()} == {0: "1", 2: "3", 4: "5"}
    assert whole(rows, answers)
    assert not whole(rows, {0: answers[0], 2: answers[2]})  # the last line is gone
    asked, said_by_base = rows_asked(rows, answers)
    assert score(asked, said_by_base, rows)["n"] == 3
    assert score(asked, said_by_base, rows)["finish_stop"] is None


def test_the_interval_of_a_share() -> None:
    assert wilson(0.0, 64) == (0.0, 0.0566)
    assert wilson(0.5, 10) == (0.2366, 0.7634)


@pytest.mark.parametrize("text", ["", " ", "{", '{"a', '{"a":1', '{"a":1}', '{ "a":1}\n', "{}"])
def test_what_may_still_be_json(text: str) -> None:
    assert may_parse(text)


@pytest.mark.parametrize("text", ["The", '"a"', "{a", "[1]", '{"a":1} and', "```json\n{"])
def test_what_is_json_no_more(text: str) -> None:
    assert not may_parse(text)


def test_an_answer_that_was_cut_is_told_from_others_only_by_its_beginning() -> None:
    cut = Answer("The app is", CUT)
    assert same(_row(), cut, Answer("The app is on.", "stop"))
    assert same(_row(), Answer("The app is on.", "stop"), cut)
    assert not same(_row(), cut, Answer(WANT, "stop"))
