import pytest

from training.datasets.formats import RowError, convert, detect

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
        (("text",), None),
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


def test_a_system_turn_wins_over_the_system_column():
    turns = [{"from": "system", "value": "turn"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    made = convert("conversations", {"system": "column", "conversations": turns})
    assert _pairs(made.messages)[0] == ("system", "turn")


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
    assert (made.messages, made.tools) == ((USER, ANSWER), ({"name": "f"},))


@pytest.mark.parametrize("nothing", [None, "", "[]", []])
def test_no_tools(nothing):
    assert convert("messages", {"messages": [USER, ANSWER], "tools": nothing}).tools is None


def test_what_is_not_used_is_named():
    made = convert("messages", {"id": 1, "messages": [USER, ANSWER | {"weight": 0}]})
    assert made.ignored == {"id", "messages[].weight"}
    assert made.messages == (USER, ANSWER)


def test_control_tokens_in_text_are_taken():
    assert _messages({"role": "user", "content": "<|end_of_text|>"}, ANSWER)[0]["content"] == "<|end_of_text|>"


KNOWN = "known: human, gpt, developer, observation, system, user, assistant, tool"

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
    "two users": ([USER, USER, ANSWER], "turn 2 is user after a user turn; expected assistant"),
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


@pytest.mark.parametrize("tools", [["f"], [{"function": {}}], [{"type": "function"}]])
def test_tools_need_a_name(tools):
    with pytest.raises(RowError) as caught:
        convert("messages", {"messages": [USER, ANSWER], "tools": tools})
    assert str(caught.value) == "'tools' has an entry without a function name"
