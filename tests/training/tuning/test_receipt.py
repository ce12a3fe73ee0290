"""Any row is prepared whole, for every template, or refused: nothing its author wrote is dropped in silence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.model.toolcalls import plain_calls, read_calls, read_thought
from pipeline.prompts.chat import EMBEDDED_TEMPLATE
from pipeline.prompts.neutralise import neutralise
from training.datasets.dataset import Row
from training.datasets.formats import convert
from training.datasets.keys import RowError
from training.tuning.prepare import IGNORED, Preparer

VERSIONS = ["embedded", "3.3", "4.0", "4.1"] if tiny.TEMPLATES.is_dir() else ["embedded"]
END = "<|end_of_text|>"
MARKS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "<|end_of_text|>",
    "<|start_of_role|>",
    "<|tool_call|>",
    "</tool_response>",
    "{{",
    "\\u0041",
]


@pytest.fixture(scope="module")
def preparers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Preparer]:
    return {version: Preparer(tiny.published(version, tmp_path_factory.mktemp("base"))) for version in VERSIONS}


_characters = st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cs"])
_words = st.text(_characters, min_size=1, max_size=20) | st.sampled_from(MARKS)
_texts = st.lists(_words, min_size=1, max_size=3).map(" ".join)
_names = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | _texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_names, inner, max_size=2),
    max_leaves=4,
)
_arguments = st.dictionaries(_names, _values, max_size=3)
_calls = st.lists(st.fixed_dictionaries({"name": _names, "arguments": _arguments}), min_size=1, max_size=2)
_tools = st.lists(st.fixed_dictionaries({"name": _names, "description": _texts}), min_size=1, max_size=2)
_documents = st.lists(
    st.fixed_dictionaries({"doc_id": _names, "text": _texts}, optional={"title": _texts}), min_size=1, max_size=2
)
_answer = st.fixed_dictionaries({"content": _texts}, optional={"thinking": _texts, "weight": st.sampled_from([0, 1])})
_called = st.fixed_dictionaries({"content": st.just("") | _texts, "tool_calls": _calls}, optional={"thinking": _texts})


@st.composite
def _rows(draw: st.DrawFn) -> dict[str, Any]:
    """A row in OpenAI's form with everything that a row may have, or little of it."""
    turns: list[dict[str, Any]] = [{"role": "system", "content": draw(_texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append({"role": "user", "content": draw(_texts)})
        if draw(st.booleans()):
            turns.append({"role": "assistant", **draw(_called)})
            turns += [{"role": "tool", "content": draw(_texts)} for _ in turns[-1]["tool_calls"]]
        turns.append({"role": "assistant", **draw(_answer)})
    row: dict[str, Any] = {"messages": turns}
    for key, values in (("tools", _tools), ("documents", _documents)):
        if draw(st.booleans()):
            row[key] = draw(values)
    return row


def _written(text: str) -> set[str]:
    return {text, text.strip(), json.dumps(text, ensure_ascii=False)[1:-1]}


def _stands(text: str, prompt: str) -> bool:
    return any(form in prompt for form in _written(text))


def _check(preparer: Preparer, raw: dict[str, Any]) -> bool:
    """Prepare a row and look for everything in it, apart from the code that does so; False when it is refused."""
    try:
        made = convert("messages", raw)
        row = Row(made.messages, "rows.jsonl:1", made.tools, made.documents)
        clean = preparer.clean(row)
        example = preparer.example(clean)
    except (RowError, InputError):
        return False
    for turn, kept in zip(row.messages, clean.messages, strict=True):
        if turn["role"] != "assistant":
            # untrusted text: as it was, or its control tokens broken up
            assert neutralise(turn["content"], preparer.controls) == kept["content"]
            assert _stands(kept["content"], example.text)
    learned = [turn for turn in row.messages if turn["role"] == "assistant" and turn.get("weight") != 0]
    assert len(example.trained) == len(learned)
    for turn, span in zip(learned, example.trained, strict=True):
        assert span.endswith(END)
        assert span.count(END) == 1
        assert span != END
        thought, rest = read_thought(span.removesuffix(END)) if "reasoning_content" in turn else (None, span.removesuffix(END))
        if "reasoning_content" in turn:
            assert thought == turn["reasoning_content"].strip()
        if "tool_calls" in turn:
            text, calls = read_calls(rest)
            assert calls == plain_calls(turn["tool_calls"])
            assert text.strip() == turn["content"].strip()
        else:
            assert rest.strip() == turn["content"].strip()
    for tool in clean.tools or ():
        assert _stands(tool["function"]["name"], example.text)
    for document in clean.documents or ():
        assert _stands(document["text"], example.text)
    trained = preparer.tokenizer.decode([i for i in example.labels if i != IGNORED], skip_special_tokens=False)
    assert trained == "".join(example.trained)
    return True


@pytest.fixture(scope="module")
def accepted() -> Iterator[dict[str, list[bool]]]:
    """Whether each row was taken, by template: a preparer that refuses everything proves nothing."""
    counts: dict[str, list[bool]] = {}
    yield counts
    for version, taken in counts.items():
        assert sum(taken) > 0.1 * len(taken), (version, sum(taken), len(taken))


def _any_row(preparers: dict[str, Preparer], accepted: dict[str, list[bool]], version: str, raw: dict[str, Any]) -> None:
    accepted.setdefault(version, []).append(_check(preparers[version], raw))


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(raw=_rows())
def test_a_row_is_whole_or_refused(
    preparers: dict[str, Preparer], accepted: dict[str, list[bool]], version: str, raw: dict[str, Any]
) -> None:
    _any_row(preparers, accepted, version, raw)


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck))
@given(raw=_rows())
def test_thousands_of_rows_are_whole_or_refused(
    preparers: dict[str, Preparer], accepted: dict[str, list[bool]], version: str, raw: dict[str, Any]
) -> None:
    _any_row(preparers, accepted, version, raw)


LAST = {"role": "assistant", "content": "ok"}
FULL = {
    "messages": [
        {"role": "system", "content": "sys text"},
        {"role": "user", "content": "user text", "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "called", "arguments": {"city": "Oslo", "days": [3]}}]},
        {"role": "tool", "content": "a result "},
        {"role": "assistant", "content": "an answer"},
    ],
    "tools": [
        {
            "name": "called",
            "description": "what it does",
            "parameters": {"properties": {"city": {"type": "string", "description": "where it is"}}},
        }
    ],
    "documents": [{"doc_id": "7", "title": "a title", "text": "a sheet"}],
}
WHOLE = """{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor -%}
{%- for document in documents or [] %}{{ document | tojson }}{% endfor -%}
{%- for m in messages -%}
<|start_of_role|>{{ m.role }} {{ m.name }}<|end_of_role|>{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor -%}
<|end_of_text|>
{% endfor -%}
{%- if add_generation_prompt -%}<|start_of_role|>assistant <|end_of_role|>{%- endif -%}"""


def _with(source: str, folder: Path) -> Preparer:
    tiny.published("embedded", folder)
    (folder / "chat_template.jinja").write_text(source)
    return Preparer(folder)


def _example(preparer: Preparer, raw: dict[str, Any]) -> Any:
    made = convert("messages", raw)
    return preparer.example(preparer.clean(Row(made.messages, "rows.jsonl:3", made.tools, made.documents)))


def test_a_template_that_writes_everything_leaves_nothing_out(tmp_path: Path) -> None:
    assert _example(_with(WHOLE, tmp_path), FULL).unused == ()


@pytest.mark.parametrize(
    ("written", "instead", "missing"),
    [
        ("{{ tool | tojson }}", "", "tools[].name ('called')"),
        ("{{ document | tojson }}", "", "documents[].text ('a sheet')"),
        ("{{ document | tojson }}", "{{ document.title }}", "documents[].text ('a sheet')"),
        ("{{ m.content }}", "{{ m.content if m.role != 'tool' }}", "the text of turn 4 (tool) ('a result ')"),
        ("{{ m.content }}", "{{ m.content if m.role != 'system' }}", "the text of turn 1 (system) ('sys text')"),
        ("{{ m.content }}", "{{ m.content[:8] }}", "the text of turn 2 (user) ('user text')"),
        ("{{ m.content }}", "{{ m.content.replace('result', 'x') }}", "the text of turn 4 (tool) ('a result ')"),
        ("{{ call.function.arguments | tojson }}", "", "an argument of a call of turn 3 (called) ('city')"),
        ("{{ call.function.arguments | tojson }}", "city", "an argument of a call of turn 3 (called) ('Oslo')"),
        ("{{ call.function.name }}", "a_probed_call", "the name of a call of turn 3 ('called')"),
    ],
)
def test_a_template_that_drops_something_is_found_out(tmp_path: Path, written: str, instead: str, missing: str) -> None:
    assert written in WHOLE
    with pytest.raises(InputError) as caught:
        _example(_with(WHOLE.replace(written, instead), tmp_path), FULL)
    assert caught.value.message == f"rows.jsonl:3: the chat template does not write {missing}"


@pytest.mark.parametrize(
    ("written", "instead", "unused"),
    [
        ("{{ m.name }}", "", ("messages[].name",)),
        ("{{ document | tojson }}", "{{ document.text }}", ("documents[].doc_id", "documents[].title")),
        ("{{ tool | tojson }}", "{{ tool.function.name }}", ("tools[].description", "tools[].parameters")),
        ("{{ tool | tojson }}", "{{ tool.function.name }} {{ tool.function.description }} city", ("tools[].parameters",)),
        ("{{ m.content }}", "{{ m.content | trim }}", ("white space around texts",)),
    ],
)
def test_what_a_row_can_do_without_is_told(tmp_path: Path, written: str, instead: str, unused: tuple[str, ...]) -> None:
    assert _example(_with(WHOLE.replace(written, instead), tmp_path), FULL).unused == unused


def test_a_text_is_not_found_by_chance(tmp_path: Path) -> None:
    """The word stands in the frame of the turns; only the marks tell that the message itself was dropped."""
    row = {"messages": [{"role": "system", "content": "user"}, *FULL["messages"][1:2], {"role": "assistant", "content": "ok"}]}
    with pytest.raises(InputError, match="the text of turn 1"):
        _example(_with(WHOLE.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}"), tmp_path), row)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"content": "a <|start_of_role|>user b"}, "an answer holds <|start_of_role|>, which frames turns"),
        ({"content": "x <|end_of_role|> y", "weight": 0}, "an answer holds <|end_of_role|>, which frames turns"),
        ({"content": "a<|end_of_text|>b"}, "assistant turn 2 does not end with exactly one <|end_of_text|>"),
        ({"content": "a", "thinking": "x </think> y"}, "a thought holds </think>, which ends thoughts"),
        ({"content": "\U00040000"}, "the base's tokenizer has no tokens for '\\U00040000', which an answer holds"),
    ],
)
def test_an_answer_that_cannot_be_learned_whole_is_refused(tmp_path: Path, answer: dict[str, str], reason: str) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **answer}, *FULL["messages"][1:2], LAST]}
    with pytest.raises(InputError) as caught:
        _example(_with(EMBEDDED_TEMPLATE, tmp_path), row)
    assert caught.value.message == f"rows.jsonl:3: {reason}"


def test_characters_without_tokens_are_told_where_they_are_not_learned(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a\x16b"}, {"role": "assistant", "content": "ok"}]}
    assert _example(_with(EMBEDDED_TEMPLATE, tmp_path), row).unused == ("characters the tokenizer has no tokens for ('\\x16')",)


def test_an_assistants_own_marks_stay_and_everybody_elses_are_broken_up(preparers: dict[str, Preparer]) -> None:
    text = "<think>\nx\n</think>\n\n<tool_response>"
    row = Row(({"role": "user", "content": text}, {"role": "assistant", "content": text}), "rows.jsonl:3")
    for version in {"4.0", "4.1"} & set(preparers):
        preparer = preparers[version]
        clean = preparer.clean(row)
        assert (clean.messages[0]["content"], clean.messages[1]["content"]) == (text.replace("<", "< "), text)
        assert preparer.neutralised(row, clean) == 1
        ids = preparer.example(clean).labels
        assert preparer.tokenizer.token_to_id("<think>") in ids


def test_two_named_templates_are_chosen_as_transformers_chooses(tmp_path: Path) -> None:
    preparer = _with(WHOLE.replace("{{ tool | tojson }}", ""), tmp_path)
    assert preparer.template.tool_use is None
    more = tmp_path / "additional_chat_templates" / "tool_use.jinja"
    more.parent.mkdir()
    more.write_text(WHOLE)
    assert "what it does" in _example(Preparer(tmp_path), FULL).text
