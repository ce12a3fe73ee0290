from __future__ import annotations

import pytest

from pipeline.errors import InputError
from pipeline.prompts.conversation import load_file, read_messages, read_tools
from pipeline.runs.files import write_json

USER = {"role": "user", "content": "Hi"}


def test_users_own_files(tmp_path):
    for value in ([USER], {"messages": [USER], "other": 1}):
        write_json(tmp_path / "m.json", value)
        assert read_messages(tmp_path / "m.json") == (USER,)
    write_json(tmp_path / "t.json", {"tools": [{"type": "function"}]})
    assert read_tools(tmp_path / "t.json") == ({"type": "function"},)


@pytest.mark.parametrize(
    ("value", "why"),
    [([], "JSON list of messages"), ({}, "JSON list of messages"), ([USER, "x"], "message 2"), ([{"content": "x"}], "message 1")],
)
def test_wrong_messages_are_refused(tmp_path, value, why):
    write_json(tmp_path / "m.json", value)
    with pytest.raises(InputError, match=why):
        read_messages(tmp_path / "m.json")


def test_wrong_tools_are_refused(tmp_path):
    write_json(tmp_path / "t.json", {"tools": "all"})
    with pytest.raises(InputError, match="list of tools"):
        read_tools(tmp_path / "t.json")


def test_suite_entries(tmp_path):
    entry = {"id": "a", "messages": [{"role": "user", "content": {"repeat": "ab", "times": 3}}], "continue": True}
    write_json(tmp_path / "s.json", [entry])
    (case,) = load_file(tmp_path / "s.json")
    assert (case.messages[0]["content"], case.continued, case.tools) == ("ababab", True, None)
    write_json(tmp_path / "s.json", [{**entry, "tool": []}])
    with pytest.raises(InputError, match="entry 1: unknown key tool"):
        load_file(tmp_path / "s.json")
