from __future__ import annotations

from dataclasses import dataclass, replace
from io import StringIO

import pytest
from rich.console import Console

from pipeline.errors import EngineError, ModelError
from pipeline.model.tokenizer import Tokenizer
from pipeline.modelfile.template import derive, go_differences
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.conversation import Conversation, NotApplicable, Prompt, load_suite
from pipeline.prompts.parity import DEVIATIONS, Reference, compare
from pipeline.prompts.renderers import GoRenderer, JinjaRenderer, render_chat
from pipeline.verify.sources import print_matrix

USER = {"role": "user", "content": "Hi"}
TOOLS = (
    {"type": "function", "function": {"name": "lookup", "description": "d", "parameters": {"type": "object", "properties": {}}}},
)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "lookup", "arguments": {}}}]}
FULL = Conversation(
    "full",
    ({"role": "system", "content": "Answer in JSON."}, USER, {"role": "assistant", "content": "Yes"}, USER, CALL, {"role": "tool", "content": "r"}),
    TOOLS,
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    """An engine that answers as told."""

    prompt: Prompt | Exception
    name: str = "said"
    paths: tuple[str, ...] = ()
    system: str = ""

    def render(self, conversation: Conversation) -> Prompt:
        if isinstance(self.prompt, Exception):
            raise self.prompt
        return self.prompt


def test_go_is_equal_or_listed_in_every_case(template, go, now):
    matrix = compare(Reference(template, now), [GoRenderer(derive(template).text, now)])
    assert matrix.differences == []
    counts = matrix.counts()["go"]
    assert counts["listed"] == 14
    assert counts["equal"] >= 119


MUTATIONS = [
    ("newline after end_of_role", "<|end_of_role|>", "<|end_of_role|>\\n", "a line end stands after <|end_of_role|>"),
    ("no newline after end_of_text", "<|end_of_text|>\\n", "<|end_of_text|>", "the line end after <|end_of_text|> is missing"),
    ("no tools", "{{- if .Tools -}}", "{{- if and .Tools false -}}", "the tools are not listed"),
    ("system message dropped", "{{- $head = .Content -}}", "", "the system message is missing"),
    ("system message cut", "{{- $head = .Content -}}", "{{- $head = slice .Content 0 6 -}}", "the system message is cut"),
    ("calls dropped", "{{- if .ToolCalls -}}\n      {{- with", "{{- if and .ToolCalls false -}}\n      {{- with", "tool calls are left out"),
    ("results as plain turns", '{{- else if eq .Role "tool" -}}', '{{- else if eq .Role "none" -}}', "tool results are not marked"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "cause"), MUTATIONS, ids=[m[0] for m in MUTATIONS])
def test_each_mutation_of_the_template_is_caught_and_named(published, go, now, name, old, new, cause):
    template = published("4.1")
    source = derive(template).text
    assert old in source
    asked = replace(FULL, tools=None) if "system" in name else FULL
    cells = compare(Reference(template, now), [GoRenderer(source.replace(old, new), now)], [asked]).cells
    assert [cell.status for cell in cells] == ["different"]
    assert cells[0].detail.startswith(cause)


def test_mutated_template_fails_the_suite(published, go, now):
    derived = derive(published("4.0"))
    mutated = replace(derived, text=derived.text.replace("<|end_of_role|>", "<|end_of_role|>\\n"))
    assert go_differences(derived, published("4.0"), now) == []
    assert len(go_differences(mutated, published("4.0"), now)) > 100


def test_mutated_jinja_fails_too(embedded, now):
    """What an engine with another chat template would feed."""
    other = ChatTemplate(embedded.source.replace("<|end_of_role|>' + text", "<|end_of_role|>\\n' + text"), embedded.variables)
    cells = compare(Reference(embedded, now), [JinjaRenderer(other, now, "llamacpp")], [FULL]).cells
    assert cells[0].status == "different"
    assert "got '\\nHi" in cells[0].detail


def test_ids_are_compared_where_both_sides_have_them(embedded, now, tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder)
    text = render_chat(embedded, FULL, now)
    right, wrong = tuple(tokenizer.encode(text)), tuple(tokenizer.encode(text)[:-1])
    renderers = [Said(Prompt(None, right), "right"), Said(Prompt(text, wrong), "wrong")]
    cells = compare(Reference(embedded, now, tokenizer), renderers, [FULL]).cells
    assert [cell.status for cell in cells] == ["equal", "different"]


def test_refusals_and_missing_features(embedded, now):
    strict = ChatTemplate("{{ raise_exception('no') }}")
    assert compare(Reference(strict, now), [Said(Prompt("x"))], [FULL]).cells[0].status == "not applicable"
    lacks = compare(Reference(embedded, now), [Said(NotApplicable("no documents"))], [FULL])
    assert (lacks.cells[0].status, lacks.cells[0].detail, lacks.passed) == ("not applicable", "no documents", True)
    refuses = compare(Reference(embedded, now), [Said(ModelError("bad"))], [FULL])
    assert (refuses.passed, refuses.cells[0].detail) == (False, "said refuses: bad")
    with pytest.raises(EngineError):
        compare(Reference(embedded, now), [Said(EngineError("gone"))], [FULL])


def test_matrix_as_json_and_on_the_terminal(embedded, now):
    text = render_chat(embedded, FULL, now)
    llama = Said(Prompt(text.replace('"description": "d"', '"description": "[bold]"')), "llamacpp")
    matrix = compare(Reference(embedded, now), [Said(Prompt(text), "chat"), llama], [FULL])
    assert matrix.to_json()["counts"] == {"chat": {"equal": 1}, "llamacpp": {"different": 1}}
    out = StringIO()
    print_matrix(matrix, {"vllm": "no server"}, (), Console(file=out, width=200))
    shown = out.getvalue()
    assert "skipped vllm: no server" in shown
    assert "expected 'd\"" in shown
    assert "got '[bold]" in shown


class TestSuite:
    def test_covers_what_it_must(self):
        suite = load_suite()
        assert len(suite) >= 80
        assert len({case.id for case in suite}) == len(suite)
        text = " ".join(str(message["content"]) for case in suite for message in case.messages)
        for needle in ("🚨", "{{ .System }}", "{% for", '"""', "\u202e", "<|end_of_text|>", "\u200d", "漢", "\u00a0"):
            assert needle in text
        assert sum(case.continued for case in suite) == 5
        assert sum(case.documents is not None for case in suite) == 5
        assert max(len(str(case.messages)) for case in suite) > 15_000
        assert any(len(message.get("tool_calls") or ()) > 1 for case in suite for message in case.messages)


def exact(deviation_id):
    return next(deviation for deviation in DEVIATIONS if deviation.id == deviation_id)


def chat(*messages, tools=None, continued=False):
    return Conversation("case", tuple(messages), tools, None, continued)


class TestDeviationsStillTrue:
    """Each listed deviation on its smallest conversation; a test that fails says that it may leave the list."""

    def go(self, template, conversation, now):
        return compare(Reference(template, now), [GoRenderer(derive(template).text, now)], [conversation]).cells[0]

    def test_merged_turns(self, embedded, go, now):
        cell = self.go(embedded, chat(USER, USER), now)
        assert (cell.status, cell.detail) == ("listed", "merged-turns")

    @pytest.mark.parametrize(
        "properties",
        [
            {"b": {"type": "string"}, "a": {"type": "string"}},
            {"a": {"type": "string", "default": "x"}},
            {"a": {"type": "string", "description": "<x>"}},
            {"a": {"type": "array", "items": {"type": "string"}}},
        ],
        ids=["order", "unknown key", "escape", "nested"],
    )
    def test_remade_tools(self, embedded, go, now, properties):
        function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": properties}}
        cell = self.go(embedded, chat(USER, tools=({"type": "function", "function": function},)), now)
        assert (cell.status, cell.detail) == ("listed", "remade-tools")

    def test_common_tools_need_no_excuse(self, embedded, go, now):
        """Sorted, described, with an enum and required names: TEMPLATE prints them as the tokenizer does."""
        properties = {"host": {"type": "string", "description": "Host"}, "level": {"type": "string", "enum": ["a", "b"]}}
        function = {
            "name": "f",
            "description": "d",
            "parameters": {"type": "object", "properties": properties, "required": ["host"]},
        }
        cell = self.go(embedded, chat(USER, tools=({"type": "function", "function": function},)), now)
        assert cell.status == "equal"

    def test_template_is_exact_more_often_than_ollamas_other_path(self, template, now):
        """Why the Modelfile makes every Ollama use TEMPLATE: the jinja path reorders every tool that requires something."""
        from pipeline.prompts.ollama_view import as_api, restored

        def exact_on(path):
            count = 0
            for case in load_suite():
                seen = as_api(case)
                for deviation in (known for known in DEVIATIONS if path in known.paths):
                    seen = deviation.change(seen, template.source)
                try:
                    count += restored(render_chat(template, seen, now)) == render_chat(template, case, now)
                except ModelError:
                    continue
            return count

        assert exact_on("template") > exact_on("ollama-jinja")
