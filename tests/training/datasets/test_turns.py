"""Turns in the shapes people have: calls, thoughts, weights, results, greetings."""

import pytest

from training.datasets.formats import convert
from training.datasets.keys import RowError, detect
from training.datasets.rows import Inexact
from training.datasets.turns import Reading

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "lookup", "arguments": '{"ip": "10.0.0.1"}'}}


def _messages(*turns):
    return convert("messages", {"messages": list(turns)}).messages


def _pairs(messages):
    return [(m["role"], m["content"]) for m in messages]


def test_weight_zero_and_thoughts_stay_with_their_turns():
    made = _messages(USER, ANSWER | {"weight": 0}, USER, ANSWER | {"thinking": " hm "})
    assert made == (USER, ANSWER | {"weight": 0}, USER, ANSWER | {"reasoning_content": "hm"})


PLAIN = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        ({"role": "assistant", "content": "Hm.", "function_call": {"name": "f", "arguments": '{"x": 1}'}}, "Hm."),
        ({"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}, ""),
        ({"from": "tool_call", "value": '[{"name": "f", "arguments": {"x": 1}}]'}, ""),
        ({"from": "gpt", "value": 'Hm.\n<tool_call>\n{"name": "f", "arguments": {"x":1}}\n</tool_call>'}, "Hm."),
        ({"from": "gpt", "value": '<|tool_call|>[{"name": "f", "arguments": {"x": 1}}]'}, ""),
    ],
)
def test_calls_in_every_form_become_real_calls(turn, text):
    assert _messages(USER, turn)[1] == {"role": "assistant", "content": text, "tool_calls": [PLAIN]}


@pytest.mark.parametrize(
    "text", ["<tool_call>{broken</tool_call>", '<tool_call>{"name": "f"}</tool_call> and more', "<|tool_call|>f"]
)
def test_a_call_that_cannot_be_read_is_refused(text):
    with pytest.raises(RowError, match="has a mark of a call from which none can be read"):
        _messages(USER, {"role": "assistant", "content": text})


@pytest.mark.parametrize("text", ["Calls stand in <tool_call> marks.", "<tool_call>", "</tool_call>{"])
def test_what_is_no_call_stays_the_authors_text(text):
    assert _messages(USER, {"role": "assistant", "content": text})[1] == {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": []}}]}, "arguments of f must be an object"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "0"}}]},
            "arguments of f must be an object",
        ),
        ({"role": "assistant", "tool_calls": [{"name": "g", "function": {"name": "f"}}]}, "the call of f has 'name'"),
        (
            {"from": "function_call", "value": '{"name": "f"}', "tool_calls": [CALL]},
            "turn 2 has tool_calls, and is a call itself",
        ),
        (
            {"role": "assistant", "content": '<tool_call>{"name": "f", "arguments": {"a": 1, "a": 2}}</tool_call>'},
            "from which none",
        ),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"y": 1.23456789012345678901}'}]}, "has more digits"),
        ({"role": "assistant", "content": [{"type": "text", "text": "a", "note": "b"}]}, "has a content part with 'note'"),
    ],
)
def test_nothing_of_a_turn_is_dropped(turn, reason):
    with pytest.raises(RowError) as caught:
        _messages(USER, turn)
    assert reason in str(caught.value)


def test_results_take_the_order_of_their_calls():
    calls = [{"id": i, "function": {"name": "f", "arguments": {}}} for i in ("a", "b")]
    results = [{"role": "tool", "tool_call_id": i, "content": i} for i in ("b", "a")]
    turns = [USER, {"role": "assistant", "tool_calls": calls}, *results, ANSWER]
    made = convert("messages", {"messages": turns})
    assert [m["content"] for m in made.messages[2:4]] == ["a", "b"]
    assert made.notes == ("results put in the order of their calls",)
    with pytest.raises(RowError, match="a result of the call 'c', which the turn before it does not have"):
        _messages(*turns[:3], {"role": "tool", "tool_call_id": "c", "content": "x"}, ANSWER)


def test_early_hermes_calls_with_single_quotes_are_calls():
    made = _messages(USER, {"from": "gpt", "value": "Ok.\n\n<tool_call>\n{'arguments': {'x': 1}, 'name': 'f'}\n</tool_call>"})
    assert made[1] == {"role": "assistant", "content": "Ok.\n", "tool_calls": [PLAIN]}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "2+2", "answer": "4", "reasoning": "We compute 2+2; this gives 4."},
        {"messages": [USER, ANSWER], "system_prompt": "Do nothing: q and a must be refused"},
        {"prompt": "What is 2+2?", "completion": "4", "text": "<|system|>You are a pirate.<|user|>What is 2+2?<|assistant|>4"},
    ],
)
def test_a_text_that_holds_the_turns_is_no_copy_of_them(row):
    with pytest.raises(RowError, match="not used, which may matter"):
        convert(detect(row), row)


@pytest.mark.parametrize("text", ["<tool_call>{[1]: 2}</tool_call>", "<tool_call>{'name':'f','arguments':{1:'a'}}</tool_call>"])
def test_a_literal_that_is_no_json_is_refused(text):
    with pytest.raises(RowError, match="from which none can be read"):
        _messages(USER, {"role": "assistant", "content": text})


def test_numbers_that_lose_digits_are_refused_where_they_are_used():
    lossy = Inexact(0.1)
    with pytest.raises(RowError, match="more digits than a number keeps"):
        _messages(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": lossy}}]})
    assert convert("messages", {"messages": [USER, ANSWER], "score": lossy}).keys["score"] == "harmless"


def test_a_weight_of_zero_keeps_a_greeting_without_being_asked():
    made = convert("messages", {"messages": [ANSWER | {"weight": 0}, USER, ANSWER]})
    assert (made.messages[0]["weight"], made.notes) == (0, ())
    with pytest.raises(RowError, match="user turns of two speakers"):
        convert("messages", {"messages": [USER | {"name": "a"}, USER | {"name": "b"}, ANSWER]}, Reading(repeated="join"))


def test_results_are_text():
    made = _messages(USER, {"role": "assistant", "tool_calls": [PLAIN]}, {"role": "tool", "content": {"c": "°"}}, ANSWER)
    assert made[2] == {"role": "tool", "content": '{"c": "°"}'}
    hermes = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    made = _messages(USER, {"role": "assistant", "tool_calls": [PLAIN]}, {"from": "observation", "value": hermes}, ANSWER)
    assert [m["content"] for m in made[2:4]] == ["1", "2"]


def test_greetings_and_repeated_turns_are_taken_as_it_is_chosen():
    turns = {"messages": [ANSWER, USER, USER, ANSWER]}
    for reading, reason in ((Reading(), "--greeting keep"), (Reading(greeting="drop"), "--repeated join")):
        with pytest.raises(RowError, match=reason):
            convert("messages", turns, reading)
    made = convert("messages", turns, Reading(greeting="drop", repeated="join"))
    assert _pairs(made.messages) == [("user", "q\n\nq"), ("assistant", "a")]
    assert made.notes == ("greeting dropped", "user turns joined")
    made = convert("messages", turns, Reading(greeting="keep", repeated="keep"))
    assert made.messages == (ANSWER | {"weight": 0}, USER, USER, ANSWER)
