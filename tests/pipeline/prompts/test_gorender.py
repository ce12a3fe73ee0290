"""Ollama's template semantics as the Go program has them; the expected texts were checked against Ollama's own code."""

from __future__ import annotations

import shutil
import sys
from datetime import datetime

import pytest

from pipeline.errors import MissingDependency, ModelError
from pipeline.prompts.renderers import find_go, render_go

pytestmark = pytest.mark.usefixtures("go")
NOW = datetime(2026, 3, 1)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def one(source, messages, tools=None):
    return render_go(source, [(messages, tools)], NOW)[0]


ROLES = "{{ range .Messages }}[{{ .Role }} {{ .Content }}]{{ end }}"
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "a<b",
        "parameters": {
            "type": "object",
            "additionalProperties": False,
            "required": ["z"],
            "properties": {"z": {"type": ["string", "null"]}, "a": {"type": "string", "default": 1, "enum": ["x"]}},
        },
    },
}


def test_neighbouring_turns_of_one_role_are_merged_but_tool_results_are_not():
    messages = [turn("user", "a"), turn("user", "b"), turn("tool", "c"), turn("tool", "d")]
    assert one(ROLES, messages) == "[user a\n\nb][tool c][tool d]"


def test_system_holds_every_system_text():
    messages = [turn("system", "a"), turn("user", "b"), turn("system", "c")]
    assert one("{{ .System }}|" + ROLES, messages) == "a\n\nc|[system a][user b][system c]"


def test_tools_print_in_ollamas_order_with_gos_escapes():
    expected = (
        '[{"type":"function","function":{"name":"f","description":"a\\u003cb","parameters":{"type":"object","required":["z"],'
        '"properties":{"a":{"type":"string","enum":["x"]},"z":{"type":["string","null"]}}}}}]'
    )
    assert one("{{ range .Messages }}{{ end }}{{ .Tools }}", [turn("user", "")], [TOOL]) == expected
    assert one("{{ range .Messages }}{{ end }}{{ json .Tools }}", [turn("user", "")], [TOOL]) == expected


def test_arguments_are_sorted_and_numbers_are_floats():
    call = {"function": {"name": "f", "arguments": {"b": 1.0, "a": 1e21, "c": {"e": None, "d": [True]}}}}
    source = "{{ range .Messages }}{{ range .ToolCalls }}{{ .Function.Arguments }}{{ end }}{{ end }}"
    assert one(source, [turn("assistant", "", tool_calls=[call])]) == '{"a":1e+21,"b":1,"c":{"d":[true],"e":null}}'


@pytest.mark.parametrize(
    ("schema", "expected"),
    [({"type": "integer"}, "number"), ({"type": ["string", "null"]}, "string | null"), ({}, "any"), ({"type": "array"}, "any[]"),
     ({"anyOf": [{"type": "boolean"}, {"type": "object"}]}, "boolean | Record<string, any>")],
)  # fmt: skip
def test_functions(schema, expected):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"p": schema}}}}
    source = "{{ range .Messages }}{{ end }}{{ range .Tools }}{{ range .Function.Parameters.Properties }}{{ toTypeScriptType . }}{{ end }}{{ end }}"
    assert one(source, [turn("user", "")], [tool]) == expected


def test_dates():
    assert (
        one("{{ range .Messages }}{{ end }}{{ currentDate }} {{ yesterdayDate }}", [turn("user", "")]) == "2026-03-01 2026-02-28"
    )


EXCHANGES = [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("user", "c")]


@pytest.mark.parametrize(
    ("source", "messages", "expected"),
    [
        ("{{ .System }}<{{ .Prompt }}>{{ .Response }};", EXCHANGES, "s<a>b;<c>"),
        ("{{ .Prompt }}", EXCHANGES, "abc"),
        ("{{ if .Prompt }}<{{ .Prompt }}>{{ end }}{{ .Response }};", EXCHANGES[:3], "<a>b"),
        ("{{ if .Prompt }}{{ .Prompt }}{{ .Response }}{{ end }}.", [turn("user", "a")], "a"),
    ],
)
def test_templates_of_the_older_style(source, messages, expected):
    assert one(source, messages) == expected


def test_one_conversation_does_not_change_the_next():
    chats = [([turn("user", "a")], None), (EXCHANGES, None)]
    assert render_go("{{ .Prompt }}:{{ .Response }};", chats, NOW) == ["a:", "a:b;c:"]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ if }}", "missing value"),
        ("{{ nope }}", 'function "nope" not defined'),
        ("{{ range .Messages }}{{ .Nope }}{{ end }}", "Nope"),
    ],
)
def test_broken_templates_are_refused_with_gos_words(source, why):
    with pytest.raises(ModelError) as caught:
        one(source, [turn("user", "")])
    assert why in caught.value.evidence


def test_without_go_nothing_is_guessed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert find_go() is None
    with pytest.raises(MissingDependency, match="no Go toolchain"):
        one("{{ .Prompt }}", [turn("user", "")])


def test_go_beside_the_interpreter_comes_first(monkeypatch, tmp_path):
    (tmp_path / "go").write_text("")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert find_go() == tmp_path / "go"
    (tmp_path / "go").unlink()
    assert find_go() == (shutil.which("go") and find_go())
