from __future__ import annotations

import json
from datetime import datetime

import pytest

from pipeline.errors import ModelError
from pipeline.prompts.chat import EMBEDDED_TEMPLATE, ChatTemplate, assistant_spans
from pipeline.prompts.conversation import load_suite

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
EOS = {"eos_token": "<|end_of_text|>"}


def test_embedded_turns_to_the_byte(embedded):
    messages = [{"role": "system", "content": "S"}, USER, ANSWER, {"role": "user", "content": " x\n"}]
    assert embedded.render(messages, add_generation_prompt=True) == (
        "<|start_of_role|>system<|end_of_role|>S<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>Hello<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|> x\n<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>"
    )


def test_embedded_has_no_default_system_message(embedded):
    assert embedded.render([USER]) == "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"


def test_embedded_tools_calls_and_results(embedded):
    tool = {"type": "function", "function": {"name": "now", "parameters": {}}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now", "arguments": {"tz": "UTC"}}}] * 2}
    results = [{"role": "tool", "content": "12:00"}, {"role": "tool", "content": "12:01"}]
    text = embedded.render([USER, call, *results], tools=[tool])
    assert '<tools>\n{"type": "function", "function": {"name": "now", "parameters": {}}}\n</tools>' in text
    block = '<tool_call>\n{"name": "now", "arguments": {"tz": "UTC"}}\n</tool_call>'
    assert f"<|start_of_role|>assistant<|end_of_role|>{block}\n{block}<|end_of_text|>\n" in text
    assert text.endswith(
        "<|start_of_role|>user<|end_of_role|><tool_response>\n12:00\n</tool_response>\n"
        "<tool_response>\n12:01\n</tool_response><|end_of_text|>\n"
    )


def test_granite_3_3_prints_the_date_of_the_clock(published):
    text = published("3.3").render([USER], now=datetime(2024, 2, 5))
    assert "Today's Date: February 05, 2024." in text


def test_strftime_now_follows_the_real_clock_by_default():
    template = ChatTemplate("{{ strftime_now('%Y') }}{{ messages[0].content }}")
    before = datetime.now().year
    assert template.render([USER]) in {f"{before}Hi", f"{datetime.now().year}Hi"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'a': 'é<&'} | tojson }}", '{"a": "é<&"}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=True, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% continue %}{% endif %}{{ m }}{% endfor %}", "13"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{% generation %}{{ eos_token }}{% endgeneration %}", "<|end_of_text|>"),
    ],
)
def test_environment_is_that_of_transformers(source, expected):
    assert ChatTemplate(source, EOS).render([USER]) == expected


def test_template_cannot_reach_python():
    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ModelError, match="refuses these messages"):
        template.render([USER])


def test_template_cannot_change_the_messages():
    messages = [dict(USER)]
    with pytest.raises(ModelError):
        ChatTemplate("{{ messages.append(1) }}").render(messages)
    assert messages == [USER]


def test_refusals_name_the_reason():
    with pytest.raises(ModelError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render([USER])
    with pytest.raises(ModelError, match=r"line 2: .*endfor"):
        ChatTemplate("a\n{% endfor %}").render([USER])
    with pytest.raises(ModelError, match="empty conversation"):
        ChatTemplate("x").render([])


def test_continue_final_message_leaves_the_turn_open(embedded):
    text = embedded.render([USER, {"role": "assistant", "content": '{"severity": "'}], continue_final_message=True)
    assert text.endswith('<|start_of_role|>assistant<|end_of_role|>{"severity": "')
    with pytest.raises(ModelError, match="not both"):
        embedded.render([USER], continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(ModelError, match="no text to continue"):
        embedded.render([USER, {"role": "assistant", "content": None}], continue_final_message=True)


def test_continue_trims_where_the_template_trims():
    template = ChatTemplate("{% for m in messages %}[{{ m.content.strip() }}]{% endfor %}")
    assert template.render([{"role": "assistant", "content": "one "}], continue_final_message=True) == "[one"


def test_every_case_equals_transformers(template, now):
    pytest.importorskip("transformers")
    from pipeline.prompts.renderers import TransformersRenderer, render_chat

    oracle = TransformersRenderer(template, now)
    compared = 0
    for case in load_suite():
        try:
            expected = oracle.render(case).text
        except ModelError:
            with pytest.raises(ModelError):
                render_chat(template, case, now)
            continue
        assert render_chat(template, case, now) == expected, case.id
        compared += 1
    assert compared >= 130


def test_equals_granite_common(published):
    """IBM's own renderer, written independently of the jinja; its default system message has line ends for two spaces."""
    granite_common = pytest.importorskip("granite_common")
    template, processor = published("3.3"), granite_common.Granite33InputProcessor()
    compared = 0
    for case in load_suite():
        plain = all(m["role"] in ("system", "user", "assistant") and "tool_calls" not in m for m in case.messages)
        if case.tools or case.documents or case.continued or not plain or isinstance(case.messages[0]["content"], list):
            continue
        system = case.messages[0]["role"] == "system"
        if any(m["role"] == "system" for m in case.messages[1:]) or len(case.messages) == system:
            continue  # it takes one system message, first, and at least one other
        request = granite_common.ChatCompletion.model_validate({"messages": case.messages})
        theirs = processor.transform(request, add_generation_prompt=True)
        ours = template.render(case.messages, add_generation_prompt=True)
        if not system:
            theirs = theirs.replace("April 2024.\nToday's", "April 2024. Today's").replace(
                ".\nYou are Granite", ". You are Granite"
            )
        assert ours == theirs, case.id
        compared += 1
    assert compared > 60


class TestFolder:
    def test_reads_the_jinja_file_and_the_tokens(self, tokenizer_folder):
        template = ChatTemplate.from_folder(tokenizer_folder)
        assert template.source == EMBEDDED_TEMPLATE
        assert template.variables == {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}

    def test_reads_older_layouts(self, tmp_path):
        config = {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>", "lstrip": false}}', encoding="utf-8")
        found = ChatTemplate.from_folder(tmp_path)
        assert found == ChatTemplate("d", {"eos_token": "</s>"}, "t")
        # as apply_chat_template chooses
        assert (found.render([USER]), found.render([USER], tools=[{}])) == ("d", "t")

    def test_without_template_says_what_to_do(self, tmp_path):
        with pytest.raises(ModelError, match="no chat template") as caught:
            ChatTemplate.from_folder(tmp_path)
        assert "save_pretrained" in caught.value.remedy

    def test_missing_file(self, tmp_path):
        with pytest.raises(ModelError, match="cannot read"):
            ChatTemplate.from_file(tmp_path / "none.jinja")


class TestAssistantSpans:
    def test_each_turn_with_its_one_end_token(self, template, now):
        messages = [USER, ANSWER, {"role": "user", "content": "More"}, {"role": "assistant", "content": ""}]
        text = template.render(messages, now=now)
        spans = assistant_spans(template, messages, now=now)
        assert [text[a:b] for a, b in spans] == ["Hello<|end_of_text|>", "<|end_of_text|>"]
        assert all(text[:a].endswith("<|start_of_role|>assistant<|end_of_role|>") for a, _ in spans)

    def test_tool_calls_are_trained_and_results_are_not(self, embedded):
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
        messages = [USER, call, {"role": "tool", "content": "secret"}, ANSWER]
        text = embedded.render(messages)
        assert [text[a:b] for a, b in assistant_spans(embedded, messages)] == [
            '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|end_of_text|>',
            "Hello<|end_of_text|>",
        ]

    def test_agree_with_the_generation_marks(self, embedded):
        """transformers finds the same spans through the template's own marks."""
        pytest.importorskip("transformers")
        from transformers.utils.chat_template_utils import render_jinja_template

        call = {"role": "assistant", "content": "c", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
        messages = [{"role": "system", "content": "S"}, USER, call, {"role": "tool", "content": "r"}, ANSWER, USER, ANSWER]
        _, marked = render_jinja_template(
            conversations=[messages], chat_template=embedded.source, return_assistant_tokens_mask=True
        )
        assert [tuple(span) for span in marked[0]] == assistant_spans(embedded, messages)

    def test_conversation_that_starts_with_the_assistant(self, embedded):
        text = embedded.render([ANSWER, USER])
        assert [text[a:b] for a, b in assistant_spans(embedded, [ANSWER, USER])] == ["Hello<|end_of_text|>"]

    def test_end_token_inside_an_answer_is_refused(self, embedded):
        with pytest.raises(ModelError, match="exactly one"):
            assistant_spans(embedded, [USER, {"role": "assistant", "content": "a<|end_of_text|>b"}])

    def test_template_that_rewrites_earlier_turns_is_refused(self):
        source = (
            "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else m.content[:1] }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
        with pytest.raises(ModelError):
            assistant_spans(ChatTemplate(source, EOS), [USER, ANSWER, USER, ANSWER])

    def test_generation_prompt_unlike_the_turn_is_refused(self):
        source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
        with pytest.raises(ModelError, match="generation prompt"):
            assistant_spans(ChatTemplate(source, EOS), [USER, ANSWER])

    def test_needs_an_end_token(self):
        with pytest.raises(ModelError, match="eos_token"):
            assistant_spans(ChatTemplate("x"), [USER, ANSWER])
