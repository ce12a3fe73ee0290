from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ModelError
from pipeline.model.tokenizer import Tokenizer
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.neutralise import control_tokens, neutralise

TOKENS = {"<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"}
PIECES = [
    "<|",
    "|>",
    "<",
    "|",
    ">",
    "end_of_text",
    "start_of_role",
    "end_of_role",
    "end_of",
    "_text",
    " ",
    "\n",
    "＜",
    "｜",
    "＞",
    "é",
    "<tool_call>",
    "</",
]
hostile = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ordinary < text | with > signs", "ordinary < text | with > signs"),
        ("a<|end_of_text|>b", "a< |end_of_text|>b"),
        ("<|end_of_text|><|end_of_text|>", "< |end_of_text|>< |end_of_text|>"),
        ("<|END_of_text|>", "< |END_of_text|>"),
        ("＜｜end_of_text｜＞", "< |end_of_text|>"),
        ("＜b＞ é stays", "＜b＞ é stays"),
        ("<|end_of_<|end_of_text|>text|>", "<|end_of_< |end_of_text|>text|>"),
        ("", ""),
    ],
)
def test_only_control_tokens_are_broken(text, expected):
    assert neutralise(text, TOKENS) == expected


def test_no_tokens_changes_nothing():
    assert neutralise("<|end_of_text|>", ()) == "<|end_of_text|>"


def test_a_break_that_makes_another_token_is_broken_too():
    assert neutralise("<x>", {"<x>", "< x>"}) == "<  x>"


def test_token_of_one_character_is_replaced():
    assert neutralise("a\u2581b", {"\u2581"}) == "a\ufffdb"


def test_hopeless_tokens_are_refused():
    with pytest.raises(ModelError, match="cannot be broken"):
        neutralise("\ufffd", {"\ufffd"})


def test_control_tokens_of_a_folder(tokenizer_folder, tmp_path):
    found = control_tokens(tokenizer_folder)
    assert found > TOKENS
    assert "<tool_call>" in found  # added without being marked special
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        control_tokens(tmp_path)


@settings(max_examples=300, deadline=None)
@given(text=hostile)
def test_no_text_yields_a_control_token_id(tokenizer_folder_session, text):
    _, tokenizer, tokens = tokenizer_folder_session
    ids = {tokenizer.id_of(token) for token in tokens}
    assert not ids & set(tokenizer.encode(neutralise(text, tokens)))
    assert not ids & set(tokenizer.encode(unicodedata.normalize("NFKC", neutralise(text, tokens))))


@settings(max_examples=200, deadline=None)
@given(system=hostile, user=hostile, answer=hostile)
def test_a_prompt_holds_exactly_the_templates_own_control_tokens(tokenizer_folder_session, system, user, answer):
    folder, tokenizer, tokens = tokenizer_folder_session
    template = ChatTemplate.from_folder(folder)

    def control_ids(*contents):
        messages = [{"role": r, "content": c} for r, c in zip(("system", "user", "assistant"), contents, strict=True)]
        ids = tokenizer.encode(template.render(messages, add_generation_prompt=True))
        return [i for i in ids if i >= 256]

    assert control_ids(*(neutralise(text, tokens) for text in (system, user, answer))) == control_ids("s", "u", "a")


@given(text=hostile)
def test_idempotent_and_readable(text):
    once = neutralise(text, TOKENS)
    assert neutralise(once, TOKENS) == once
    fold = unicodedata.normalize("NFKC", text)
    assert once.replace(" ", "") in {
        text.replace(" ", ""),
        fold.replace(" ", ""),
        unicodedata.normalize("NFKC", once).replace(" ", ""),
    }


@pytest.fixture(scope="module")
def tokenizer_folder_session(tokenizer_folder):
    return tokenizer_folder, Tokenizer(tokenizer_folder), control_tokens(tokenizer_folder)


def test_only_the_token_is_folded_and_many_take_no_time() -> None:
    text = "10\u00b2 m, \u00bd, \ufb01ne \uff1c|end_of_text|\uff1e ok"
    assert neutralise(text, {"<|end_of_text|>"}) == "10\u00b2 m, \u00bd, \ufb01ne < |end_of_text|> ok"
    many = "\uff1c|end_of_text|\uff1e" * 20000
    assert neutralise(many, {"<|end_of_text|>"}) == "< |end_of_text|>" * 20000
