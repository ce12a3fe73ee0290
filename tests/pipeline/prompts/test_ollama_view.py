from __future__ import annotations

import pytest

from pipeline.prompts.conversation import Conversation
from pipeline.prompts.ollama_view import as_api, go_json, merged, reordered_tools, restored


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        ({"a": [1, 2.5, 2.0, None, True]}, '{"a":[1,2.5,2,null,true]}'),
        ("<é> & \u2028", '"\\u003cé\\u003e \\u0026 \\u2028"'),
        ('quote " slash \\ tab \t', '"quote \\" slash \\\\ tab \\t"'),
        ([], "[]"),
    ],
)
def test_go_json(value, printed):
    assert go_json(value) == printed


def test_as_api_keeps_only_what_the_api_carries():
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    seen = as_api(
        Conversation("c", ({"role": "User", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [call]}))
    )
    assert seen.messages[0] == {"role": "user", "content": "a\nb"}
    assert seen.messages[1]["content"] == ""
    assert seen.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}


def test_merged_leaves_the_given_messages_alone():
    messages = tuple({"role": role, "content": role[0]} for role in ("user", "user", "tool", "tool", "assistant"))
    assert [m["content"] for m in merged(Conversation("c", messages)).messages] == ["u\n\nu", "t", "t", "a"]
    assert messages[0]["content"] == "u"


def test_reordered_tools():
    parameters = {
        "type": "object",
        "properties": {"b": {"default": 1, "type": "string"}, "a": {}},
        "required": ["b"],
        "strict": True,
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    made = reordered_tools(Conversation("c", (), (tool,))).tools[0]
    assert list(made["function"]["parameters"].items()) == [
        ("type", "object"), ("required", ["b"]), ("properties", {"b": {"type": "string"}, "a": {}}),
    ]  # fmt: skip
    assert "description" not in made["function"]


def test_restored_touches_nothing_else():
    assert restored('"plain" {}') == '"plain" {}'
