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


def test_what_an_engine_puts_before_a_conversation_is_part_of_the_expectation(embedded, now):
    """Most conversations of the suite bring no system message, and a run's Modelfile has one."""
    own = "Triage. Answer in JSON."
    bare, given = chat(USER), chat({"role": "system", "content": "Mine."}, USER)
    opened = render_chat(embedded, bare.opened(own), now)
    assert opened != render_chat(embedded, bare, now)
    adds = Said(Prompt(opened), system=own)
    assert compare(Reference(embedded, now), [adds], [bare]).cells[0].status == "equal"
    lost = compare(Reference(embedded, now), [Said(Prompt(render_chat(embedded, bare, now)), system=own)], [bare]).cells[0]
    assert (lost.status, lost.detail.startswith("the system message is")) == ("different", True)
    assert given.opened(own) == given
    without = [case for case in load_suite() if case.opened(own) != case]
    assert len(without) > 100


def test_a_modelfile_s_own_system_message_is_in_its_prompts(template, go, now):
    own = 'a """ b " c\u200b'
    kept = GoRenderer(derive(template, own).text, now, system=own, keeps=True)
    beside = GoRenderer(derive(template).text, now, system=own)
    lost = GoRenderer(derive(template).text, now, system=own, keeps=True)
    matrix = compare(Reference(template, now), [kept, beside], load_suite())
    assert matrix.differences == []
    assert compare(Reference(template, now), [lost], [chat(USER)]).cells[0].status == "different"


def test_text_parts_on_v1_are_listed(embedded, go, now):
    """Ollama's /v1 makes a message of each, which its TEMPLATE then joins with an empty line."""
    from pipeline.prompts.ollama_view import split_parts

    parts = chat({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})
    template = derive(embedded).text
    fed = GoRenderer(template, now).render(split_parts(parts))
    assert fed.text != GoRenderer(template, now).render(parts).text
    cell = compare(Reference(embedded, now), [Said(fed, paths=("v1:template",))], [parts]).cells[0]
    assert (cell.status, cell.detail) == ("listed", "split-parts, merged-turns")
    assert compare(Reference(embedded, now), [Said(fed, paths=("template",))], [parts]).cells[0].status == "different"
    one = chat({"role": "user", "content": [{"type": "text", "text": "a"}]})
    assert (
        compare(Reference(embedded, now), [Said(GoRenderer(template, now).render(one), paths=("v1:template",))], [one])
        .cells[0]
        .status
        == "equal"
    )


def test_sorted_maps_inside_call_arguments_are_listed(embedded, now):
    call = lambda inside: {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": inside}}]}  # noqa: E731
    said, fed = call({"z": {"b": 1, "a": 2}, "c": 3}), call({"z": {"a": 2, "b": 1}, "c": 3})
    prompt = Prompt(render_chat(embedded, chat(USER, fed), now))
    cell = compare(Reference(embedded, now), [Said(prompt, paths=("ollama-jinja",))], [chat(USER, said)]).cells[0]
    assert (cell.status, cell.detail) == ("listed", "sorted-arguments")
