"""A live Ollama: what it renders, answers, calls and obeys. Creates and removes a model of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import datetime
from typing import Any

import httpx
import pytest

from pipeline.engines.ollama import Ollama
from pipeline.modelfile.grammar import parse_modelfile
from pipeline.modelfile.modelfile import build_modelfile, to_create_request
from pipeline.prompts.conversation import load_suite
from pipeline.prompts.parity import Reference, compare
from pipeline.serve.start import Endpoint
from pipeline.verify.material import Yardstick
from pipeline.verify.prober import Prober
from pipeline.verify.probes import injection, structured_output, tool_call
from pipeline.verify.score import HeldOut
from pipeline.verify.sources import EngineRenderer

pytestmark = [pytest.mark.slow, pytest.mark.ollama]
NAME = "granite-pipeline-test"
SYSTEM = 'Say "hi" {{ x }}\n'
ROW = HeldOut(({"role": "user", "content": "hi"},), "x")


@pytest.fixture(scope="module")
def model(ollama_url, base, gguf):
    """(URL, Modelfile) of a model created as serving creates it."""
    from pipeline.prompts.chat import ChatTemplate

    text = build_modelfile(gguf=str(gguf), template=ChatTemplate.from_folder(base), system=SYSTEM, parameters={"num_ctx": 16384})
    parsed = parse_modelfile(text)
    parts = {k: v for k, v in to_create_request(parsed, "", NAME).items() if k not in ("model", "files", "stream")}

    Ollama().create(ollama_url, NAME, gguf, parts)
    yield ollama_url, parsed
    Ollama().remove(ollama_url, NAME)


def ask(url: str, question: Any) -> Any:
    async def run() -> Any:
        async with Prober(Endpoint("ollama", url, NAME), 8) as prober:
            work: Coroutine[Any, Any, Any] = question(prober)
            return await work

    return asyncio.run(run())


def test_the_modelfile_survives(model):
    url, parsed = model
    shown = httpx.post(f"{url}/api/show", json={"model": NAME}, timeout=60).json()
    assert (shown["system"], shown["template"]) == (parsed.system, parsed.template)


def test_it_feeds_what_its_go_path_or_its_jinja_path_would(model, embedded):
    with_system = [case for case in load_suite() if case.messages[0]["role"] == "system"]
    renderer = EngineRenderer("ollama", model[0], NAME)
    assert compare(Reference(embedded, datetime.now()), [renderer], with_system).differences == []


def test_it_answers_a_chat(model):
    answer, tokens = ask(model[0], lambda prober: prober.chat(ROW))
    assert answer.finish_reason in ("stop", "length")
    assert tokens >= 1


def test_it_obeys_format_and_response_format(model):
    check = ask(model[0], lambda prober: structured_output(prober, ROW))
    assert check.data["result"] == "passed", check.figure


def test_a_call_comes_back_as_tool_calls_when_the_model_makes_one(model, embedded):
    """Ollama has no way to demand a call, and random weights make none of their own: asked with tools, it must answer."""
    check = ask(model[0], lambda prober: tool_call(prober, embedded.source))
    assert check.data["result"] in ("passed", "not tested"), check.figure


def test_the_injection_probe_reads_its_rendered_prompt(model, base):
    found = ask(model[0], lambda prober: injection(prober, Yardstick.of_folder(base))).data
    assert (found["raw"], found["neutralised"], found["how"]) == (True, False, "rendered text")
