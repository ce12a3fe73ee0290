from __future__ import annotations

import asyncio
from typing import Any

import pytest
from stub_engine import Answers, serve

from pipeline.prompts.neutralise import neutralise
from pipeline.report.check import Check
from pipeline.serve.start import Endpoint
from pipeline.verify.material import Yardstick
from pipeline.verify.prober import Prober
from pipeline.verify.probes import ATTACK, injection


@pytest.fixture
def yardstick(tokenizer_folder):
    return Yardstick.of_folder(tokenizer_folder)


def run(engine: str, answers: Answers, yardstick: Yardstick) -> tuple[Check, Any]:
    with serve(answers) as (url, _):

        async def ask() -> Check:
            async with Prober(Endpoint(engine, url, "m"), 8) as prober:
                return await injection(prober, yardstick)

        check = asyncio.run(ask())
    return check, check.data


def words(yardstick: Yardstick, text: str) -> list[int]:
    """What an engine that keeps users' text apart would feed: control tokens only around it."""
    frame, encode = yardstick.ids("Z"), yardstick.tokenizer.encode
    at = frame.index(encode("Z")[0])
    return [*frame[:at], *(token for char in text for token in encode(char)), *frame[at + 1 :]]


def said(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"])


def test_an_engine_that_parses_control_tokens_in_user_text(yardstick):
    check, found = run("vllm", {"/tokenize": lambda body: {"tokens": yardstick.ids(said(body))}}, yardstick)
    assert (found["raw"], found["neutralised"], found["how"]) == (True, False, "token IDs")
    assert (check.id, check.status) == ("vllm.injection", "passed")
    assert "3 control tokens in raw text, 0 in neutralised text" in check.detail


def test_an_engine_that_keeps_user_text_apart(yardstick):
    check, found = run("vllm", {"/tokenize": lambda body: {"tokens": words(yardstick, said(body))}}, yardstick)
    assert (found["raw"], found["neutralised"], check.status) == (False, False, "passed")
    assert "stay text" in check.detail


def test_an_engine_that_undoes_neutralising_fails(yardstick):
    """Some servers strip or normalise text before they tokenize."""
    joined = {"/tokenize": lambda body: {"tokens": yardstick.ids(said(body).replace("< ", "<"))}}
    check, found = run("vllm", joined, yardstick)
    assert (found["raw"], found["neutralised"], check.status) == (True, True, "failed")
    assert "does NOT stop them" in check.detail


def test_by_rendered_text(yardstick):
    def chat(body: dict[str, Any]) -> dict[str, Any]:
        text = yardstick.template.render(body["messages"], add_generation_prompt=True)
        return {"_debug_info": {"rendered_template": text}}

    found = run("ollama", {"/api/chat": chat}, yardstick)[1]
    assert (found["raw"], found["neutralised"], found["how"]) == (True, False, "rendered text")


@pytest.mark.parametrize(("apart", "raw"), [(False, True), (True, False)])
def test_by_prompt_token_counts(yardstick, apart, raw):
    def chat(body: dict[str, Any]) -> dict[str, Any]:
        ids = words(yardstick, said(body)) if apart else yardstick.ids(said(body))
        return {"usage": {"prompt_tokens": len(ids)}}

    check, found = run("openai", {"/v1/chat/completions": chat}, yardstick)
    assert (found["raw"], found["neutralised"], found["how"]) == (raw, False, "prompt token counts")
    assert check.status == "passed"


@pytest.mark.parametrize(
    ("answer", "reason"), [({}, "nor the length of prompts"), ({"usage": {"prompt_tokens": 7}}, "not this tokenizer's")]
)
def test_unknown_is_said_and_skipped(yardstick, answer, reason):
    check, found = run("openai", {"/v1/chat/completions": lambda _: answer}, yardstick)
    assert (found["raw"], found["neutralised"], check.status) == (None, None, "skipped")
    assert reason in check.detail


def test_the_attack_really_holds_control_tokens(yardstick):
    plain = yardstick.count(yardstick.ids("x"))
    assert yardstick.count(yardstick.ids(ATTACK)) == plain + 3
    assert yardstick.count(yardstick.ids(neutralise(ATTACK, yardstick.controls))) == plain
