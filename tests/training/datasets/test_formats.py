import json

import pytest

from training.datasets.formats import convert
from training.datasets.keys import RowError, detect
from training.datasets.turns import Reading

PLAIN = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "lookup", "arguments": '{"ip": "10.0.0.1"}'}}


def _messages(*turns):
    return convert("messages", {"messages": list(turns)}).messages


def _pairs(messages):
    return [(m["role"], m["content"]) for m in messages]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("messages",), "messages"),
        (("messages", "prompt", "completion"), "messages"),
        (("id", "conversations"), "conversations"),
        (("prompt", "completion"), "prompt/completion"),
        (("instruction", "output"), "alpaca"),
        (("instruction", "input", "output", "text"), "alpaca"),
        (("prompt",), None),
        (("text",), "text"),
        (("question", "answer"), "question/answer"),
        (("instruction", "context", "response"), "dolly"),
        (("id", "query", "answers", "tools"), "xlam"),
        (("prompt", "chosen", "rejected"), None),
        ((), None),
    ],
)
def test_format_is_told_by_the_required_columns(columns, expected):
    assert detect(dict.fromkeys(columns)) == expected


def test_openai_messages_pass_through():
    turns = [{"role": "system", "content": "s"}, USER, ANSWER]
    assert _messages(*turns) == tuple(turns)


def test_sharegpt_names_are_mapped():
    row = {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert _pairs(convert("conversations", row).messages) == [("system", "s"), ("user", "q"), ("assistant", "a")]


def test_sharegpt_with_role_and_content_and_a_system_column():
    made = convert("conversations", {"system": "s", "conversations": [USER, ANSWER]})
    assert _pairs(made.messages) == [("system", "s"), ("user", "q"), ("assistant", "a")]


def test_two_system_messages_are_refused_unless_they_are_the_same():
    turns = [{"from": "system", "value": "turn"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    with pytest.raises(RowError, match="'system' that differs from its first turn"):
        convert("conversations", {"system": "column", "conversations": turns})
    for row, reading in (({"system": "turn"}, Reading()), ({"system": "column"}, Reading(ignore=frozenset({"system"})))):
        made = convert("conversations", {"conversations": turns, **row}, reading)
        assert _pairs(made.messages) == [("system", "turn"), ("user", "q"), ("assistant", "a")]


def test_prompt_completion_strings_are_kept_to_the_letter():
    made = convert("prompt/completion", {"prompt": "q \n", "completion": " a"})
    assert _pairs(made.messages) == [("user", "q \n"), ("assistant", " a")]


def test_prompt_completion_lists():
    made = convert("prompt/completion", {"prompt": [USER], "completion": [ANSWER]})
    assert made.messages == (USER, ANSWER)


def test_prompt_completion_with_system_column():
    made = convert("prompt/completion", {"prompt": "q", "completion": "a", "system": "s"})
    assert _pairs(made.messages) == [("system", "s"), ("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None}, {"system": "  "}])
def test_alpaca_without_input(empty):
    made = convert("alpaca", {"instruction": "do", "output": "done", **empty})
    assert _pairs(made.messages) == [("user", "do"), ("assistant", "done")]


def test_alpaca_with_input_and_system():
    made = convert("alpaca", {"instruction": "do", "input": "this", "output": "done", "system": "s"})
    assert _pairs(made.messages) == [("system", "s"), ("user", "do\n\nthis"), ("assistant", "done")]


def test_text_parts_are_joined_by_newlines():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert _messages({"role": "user", "content": parts}, ANSWER)[0] == {"role": "user", "content": "one\ntwo"}


def test_tool_calls_come_out_with_parsed_arguments():
    tool = {"role": "tool", "content": "clean", "tool_call_id": "c1"}
    made = _messages(USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, tool, ANSWER)
    call = {"id": "c1", "type": "function", "function": {"name": "lookup", "arguments": {"ip": "10.0.0.1"}}}
    assert made == (USER, {"role": "assistant", "content": "", "tool_calls": [call]}, tool, ANSWER)


def test_a_flat_tool_call_takes_openai_shape():
    made = _messages(USER, {"role": "assistant", "tool_calls": [{"name": "now", "arguments": {}}]})
    assert made[1]["tool_calls"] == [{"type": "function", "function": {"name": "now", "arguments": {}}}]


def test_columns_holding_json_text_are_parsed():
    row = {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]', "tools": '[{"name": "f"}]'}
    made = convert("messages", row)
    assert (made.messages, made.tools) == (
        (USER, ANSWER),
        ({"type": "function", "function": {"name": "f", "description": "", "parameters": {}}},),
    )


@pytest.mark.parametrize("nothing", [None, "", "[]", []])
def test_no_tools(nothing):
    assert convert("messages", {"messages": [USER, ANSWER], "tools": nothing}).tools is None


def test_each_key_has_a_fate():
    row = {"id": 1, "messages": [USER, ANSWER | {"weight": 1}], "note": "x", "empty": None, "copy": " a ", "score": float("nan")}
    made = convert("messages", row, Reading(ignore=frozenset({"note"})))
    assert made.keys == {"id": "harmless", "messages": "used", "messages[].weight": "used", "note": "ignored", "copy": "harmless"}
    assert made.messages == (USER, ANSWER)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"notes": "x"}, "has 'notes', not used, which may matter: --ignore notes leaves it out"),
        ({"chosen": "x", "rejected": "a"}, "has 'chosen' and 'rejected', as sets of preferences have"),
        ({"label": True}, "keep the rows whose label is true, then --ignore label"),
        ({"label": "good"}, "has 'label', as sets of preferences have"),
        (
            {"messages": [USER, ANSWER | {"mood": "x"}]},
            "turn 2 has 'mood', which is not used and may matter; --ignore mood leaves",
        ),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "turn 2 has weight 0.5; a turn is learned from (1) or not (0)"),
        ({"messages": [USER | {"weight": 1}, ANSWER]}, "turn 1 has weight 1, but its role is user"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "has weight 0 on every assistant turn"),
        ({"messages": [USER | {"thinking": "hm"}, ANSWER]}, "turn 1 has thinking, but its role is user"),
        ({"messages": [USER, ANSWER | {"thinking": "a", "reasoning_content": "b"}]}, "turn 2 has two different thoughts"),
        (
            {"messages": [USER, ANSWER | {"tool_calls": [CALL], "function_call": CALL["function"]}]},
            "tool_calls and function_call",
        ),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, "output": 1}]}]}, "the call of lookup has 'output'"),
        ({"tools": [{"name": "f"}], "functions": [{"name": "g"}]}, "has 'tools' and 'functions'"),
        ({"documents": [{"title": "t"}]}, "'documents' has one without a text (keys: title)"),
        ({"documents": [5]}, "'documents' must hold texts or objects, one is int"),
        ({"documents": [{"text": "x", "score": float("nan")}]}, "holds NaN or an infinite number"),
    ],
)
def test_a_key_that_may_matter_is_never_dropped(row, reason):
    with pytest.raises(RowError) as caught:
        convert("messages", {"messages": [USER, ANSWER], **row})
    assert reason in str(caught.value)


def test_tools_take_the_one_shape_that_engines_leave_alone():
    function = {"parameters": {"type": "object"}, "name": "f", "strict": True}
    wanted = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
    for tools in ([function], [{"type": "function", "function": function}], [json.dumps(function)], json.dumps([function])):
        made = convert("messages", {"messages": [USER, ANSWER], "tools": tools})
        assert json.dumps(made.tools) == json.dumps([wanted])
        assert made.keys["tools[].strict"] == "harmless"
    assert convert("messages", {"messages": [USER, ANSWER], "functions": [function]}).tools == (wanted,)
    returning = {"messages": [USER, ANSWER], "tools": [{**function, "returns": {"type": "string"}}]}
    with pytest.raises(RowError, match="the tool f has 'returns', which engines leave out"):
        convert("messages", returning)
    made = convert("messages", returning, Reading(ignore=frozenset({"returns"})))
    assert (made.tools, made.keys["tools[].returns"]) == ((wanted,), "ignored")


def test_xlam_dolly_history_and_rendered_text():
    made = convert("xlam", {"query": "q", "answers": '[{"name": "f", "arguments": {"x": 1}}]', "tools": '[{"name": "f"}]'})
    assert made.messages == (USER, {"role": "assistant", "content": "", "tool_calls": [PLAIN]})
    made = convert("dolly", {"instruction": "q", "context": "c", "response": "a", "category": "x"})
    assert _pairs(made.messages) == [("user", "q\n\nc"), ("assistant", "a")]
    made = convert("alpaca", {"instruction": "q", "output": "a", "history": [["h1", "h2"]], "system": "s"})
    assert _pairs(made.messages) == [("system", "s"), ("user", "h1"), ("assistant", "h2"), ("user", "q"), ("assistant", "a")]
    text = "<|start_of_role|>user<|end_of_role|>q<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>a<|end_of_text|>\n"
    made = convert("text", {"text": text})
    assert (made.messages, made.text) == ((USER, ANSWER), text)
    with pytest.raises(RowError, match="not a conversation in Granite's format"):
        convert("text", {"text": "<|im_start|>user"})


def test_control_tokens_in_text_are_taken():
    assert _messages({"role": "user", "content": "<|end_of_text|>"}, ANSWER)[0]["content"] == "<|end_of_text|>"


KNOWN = "known: human, gpt, model, developer, observation, function, tool_response, function_response, function_call, tool_call"
KNOWN += ", system, user, assistant, tool"

REFUSED = {
    "no turns": ([], "'messages' is empty"),
    "not a list": ({"a": 1}, "'messages' must be a list, this is dict"),
    "bad text": ("[1,", "'messages' is not valid JSON (Expecting value, column 4)"),
    "turn not an object": (["hi"], "turn 1 must be an object, this is str"),
    "no role": ([{"content": "x"}], "turn 1 has no 'role' (keys: content)"),
    "no answer": ([USER], "has no assistant turn, so there is nothing to learn from"),
    "ends with user": ([USER, ANSWER, USER], "ends with a user turn; the last turn must be the assistant's"),
    "role is a list": ([{"role": ["user"], "content": "x"}], f"turn 1 has the unknown role ['user']; {KNOWN}"),
    "system later": (
        [USER, {"role": "system", "content": "s"}, ANSWER],
        "turn 2 is system after a user turn; expected assistant",
    ),
    "assistant first": ([ANSWER], "turn 1 is assistant as the first turn; expected system or user"),
    "two users": (
        [USER, USER, ANSWER],
        "turn 2 is user after a user turn: --repeated join puts them together, --repeated keep leaves them as they are",
    ),
    "two answers": ([USER, ANSWER, ANSWER], "turn 3 is assistant after an assistant turn; expected user or tool"),
    "tool then user": (
        [USER, ANSWER, {"role": "tool", "content": "r"}, USER, ANSWER],
        "turn 4 is user after a tool turn; expected tool or assistant",
    ),
    "empty answer": ([USER, {"role": "assistant", "content": " \n"}], "turn 2 (assistant) is empty"),
    "null answer": ([USER, {"role": "assistant", "content": None}], "turn 2 (assistant) is empty"),
    "empty question": ([{"role": "user", "content": ""}, ANSWER], "turn 1 (user) is empty"),
    "number": ([{"role": "user", "content": 5}, ANSWER], "turn 1: content must be text, this is int"),
    "image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER],
        "turn 1 has a content part of type 'image_url'; only text can be trained on",
    ),
    "user calls": ([USER | {"tool_calls": [CALL]}, ANSWER], "turn 1 has tool_calls, but its role is user"),
    "nameless call": (
        [USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}],
        "turn 2 has a tool call without a function name",
    ),
    "broken arguments": (
        [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}],
        "turn 2: the arguments of f are not valid JSON (Expecting property name enclosed in double quotes, column 2)",
    ),
    "arguments not an object": (
        [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}],
        "turn 2: the arguments of f must be an object",
    ),
    "NUL": ([{"role": "user", "content": "a\0b"}, ANSWER], "contains a NUL character"),
    "lone surrogate": ([{"role": "user", "content": "a\ud800"}, ANSWER], "is not valid UTF-8"),
    "NUL in arguments": (
        [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"k": "\0"}}]}],
        "contains a NUL character",
    ),
}


@pytest.mark.parametrize(("turns", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_bad_row_is_refused_with_the_reason(turns, reason):
    with pytest.raises(RowError) as caught:
        convert("messages", {"messages": turns})
    assert str(caught.value) == reason


def test_missing_columns_are_named():
    with pytest.raises(RowError) as caught:
        convert("alpaca", {"instruction": "x", "response": "y"})
    assert str(caught.value) == "has no 'output' (columns: instruction, response)"


def test_a_number_where_text_belongs():
    with pytest.raises(RowError) as caught:
        convert("prompt/completion", {"prompt": "q", "completion": 5})
    assert str(caught.value) == "'completion' must be text, this is int"


def test_deep_nesting_is_refused_without_recursion():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    call = {"name": "f", "arguments": {"k": deep}}
    with pytest.raises(RowError, match="is nested more than 64 levels deep"):
        _messages(USER, {"role": "assistant", "tool_calls": [call]})


@pytest.mark.parametrize("tools", [[{"function": {}}], [{"type": "function"}], [{"name": ""}], ["{}"]])
def test_tools_need_a_name(tools):
    with pytest.raises(RowError) as caught:
        convert("messages", {"messages": [USER, ANSWER], "tools": tools})
    assert str(caught.value) == "'tools' has an entry without a function name"
