"""Prompt parity on the real servers: llama.cpp from the wheel, vLLM's rendering server (its own code, no weights)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import pytest
from servers import llama

from pipeline.engines.vllm.engine import Vllm
from pipeline.model.tokenizer import Tokenizer
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.conversation import Conversation, load_suite
from pipeline.prompts.parity import Reference, compare
from pipeline.prompts.renderers import JinjaRenderer, render_chat
from pipeline.verify.sources import EngineRenderer

pytestmark = pytest.mark.slow


class VllmWith(Vllm):
    """vLLM with the chat template of the request, so that one server does for all."""

    def __init__(self, template: str) -> None:
        self.template = template

    def tokenize_body(self, model: str, conversation: Conversation) -> dict:
        return super().tokenize_body(model, conversation) | {"chat_template": self.template}


@dataclass(frozen=True)
class RendererWith(EngineRenderer):
    """A renderer that asks in an engine's way of a test's own."""

    asked: Vllm | None = None

    @property
    def engine(self) -> Vllm:
        return self.asked


def test_llamacpp_feeds_the_tokenizers_ids(base, gguf, template, tmp_path):
    with llama(gguf, template.source, tmp_path) as server:
        url, now = server.url(180), datetime.now()
        matrix = compare(Reference(template, now, Tokenizer(base)), [EngineRenderer("llamacpp", url)])
        assert matrix.differences == []
        assert matrix.counts()["llamacpp"]["listed"] == (8 if "<think>" in template.source else 3)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<|end_of_role|>", "<|end_of_role|>\\n"),
        ("<|end_of_text|>\\n", "<|end_of_text|>"),
        ("{%- if tools -%}", "{%- if false -%}"),
    ],
    ids=["newline after end_of_role", "no newline after end_of_text", "no tools"],
)
def test_llamacpp_with_a_mutated_template_is_caught(base, gguf, embedded, tmp_path, old, new):
    mutated = ChatTemplate(embedded.source.replace(old, new), embedded.variables)
    cases = [case for case in load_suite() if case.id in ("system-user", "tools-one-system")]
    with llama(gguf, mutated.source, tmp_path) as server:
        reference = Reference(embedded, datetime.now(), Tokenizer(base))
        matrix = compare(reference, [JinjaRenderer(embedded, reference.now), EngineRenderer("llamacpp", server.url(180))], cases)
    assert {cell.renderer for cell in matrix.differences} == {"llamacpp"}
    assert any(cell.conversation == "tools-one-system" for cell in matrix.differences)


def test_vllm_feeds_the_tokenizers_ids(base, vllm_renderer, template):
    reference = Reference(template, datetime.now(), Tokenizer(base))
    matrix = compare(reference, [RendererWith("vllm", vllm_renderer, "m", asked=VllmWith(template.source))])
    assert matrix.differences == []
    assert matrix.counts()["vllm"]["listed"] == 3


def test_vllm_uses_the_folders_own_template(base, vllm_renderer):
    template = ChatTemplate.from_folder(base)
    renderer = EngineRenderer("vllm", vllm_renderer, "m")
    case = load_suite()[0]
    assert renderer.detokenize(renderer.render(case)) == render_chat(template, case, datetime.now())
