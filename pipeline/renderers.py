"""Renderers compared: each turns a conversation into the prompt that one engine would feed the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Protocol

import httpx

from pipeline.chat import ChatTemplate
from pipeline.conversation import Conversation
from pipeline.errors import EngineError, ModelError, PipelineError
from pipeline.gorender import render_go
from pipeline.ollama_view import as_api

_TIMEOUT = 60.0


@dataclass(frozen=True)
class Prompt:
    """What an engine feeds the model: token IDs where it tells them, and the text where it tells that."""

    text: str | None = None
    ids: tuple[int, ...] | None = None


class NotApplicable(Exception):
    """The engine's API cannot express this conversation; the message says what it lacks."""


class Renderer(Protocol):
    """One way to a prompt."""

    @property
    def name(self) -> str:
        """Its column in the matrix."""
        ...

    def render(self, conversation: Conversation) -> Prompt:
        """The prompt; raises ModelError when the template refuses, NotApplicable, or EngineError."""
        ...


def render_chat(template: ChatTemplate, conversation: Conversation, now: datetime) -> str:
    """The reference: the conversation through ``pipeline.chat``."""
    return template.render(
        conversation.messages,
        tools=conversation.tools,
        documents=conversation.documents,
        add_generation_prompt=not conversation.continued,
        continue_final_message=conversation.continued,
        now=now,
    )


@dataclass(frozen=True)
class JinjaRenderer:
    """``pipeline.chat`` itself."""

    template: ChatTemplate
    now: datetime
    name: str = "chat"

    def render(self, conversation: Conversation) -> Prompt:
        """Render in process."""
        return Prompt(render_chat(self.template, conversation, self.now))


@dataclass(frozen=True)
class TransformersRenderer:
    """transformers' own chat template code, on the same template text and clock."""

    template: ChatTemplate
    now: datetime
    name: str = "transformers"

    def render(self, conversation: Conversation) -> Prompt:
        """Render with ``render_jinja_template``, which is what ``apply_chat_template`` calls."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, _ = render_jinja_template(
                conversations=[[dict(message) for message in conversation.messages]],
                tools=[dict(t) for t in conversation.tools] if conversation.tools else None,
                documents=[dict(d) for d in conversation.documents] if conversation.documents else None,
                chat_template=self.template.source,
                add_generation_prompt=not conversation.continued,
                continue_final_message=conversation.continued,
                strftime_now=self.now.strftime,
                **self.template.variables,
            )
        except Exception as error:  # jinja raises whatever the template's operation raised
            raise ModelError(f"the chat template refuses these messages: {error}") from None
        return Prompt(texts[0])


@dataclass(frozen=True)
class GoRenderer:
    """An Ollama TEMPLATE run by Go's ``text/template``."""

    source: str
    now: datetime
    name: str = "go"

    def render(self, conversation: Conversation) -> Prompt:
        """Render one conversation."""
        if conversation.documents:
            raise NotApplicable("Ollama's API has no documents")
        seen = as_api(conversation)
        return Prompt(render_go(self.source, [(seen.messages, seen.tools)], self.now)[0])


@dataclass(frozen=True)
class LlamaCppRenderer:
    """A running llama-server: /apply-template, then /tokenize."""

    url: str
    name: str = "llamacpp"

    def render(self, conversation: Conversation) -> Prompt:
        """Ask the server; it continues a final assistant message by itself."""
        text = str(_post(f"{self.url}/apply-template", _openai_body(conversation))["prompt"])
        body = {"content": text, "add_special": False, "parse_special": True}
        return Prompt(text, tuple(_post(f"{self.url}/tokenize", body)["tokens"]))


@dataclass(frozen=True)
class VllmRenderer:
    """A running vLLM server: /tokenize."""

    url: str
    model: str
    name: str = "vllm"

    def render(self, conversation: Conversation) -> Prompt:
        """Ask the server for token IDs."""
        return Prompt(ids=tuple(_post(f"{self.url}/tokenize", self.body(conversation))["tokens"]))

    def body(self, conversation: Conversation) -> dict[str, Any]:
        """The request; unlike the others, this server must be told when to continue."""
        return _openai_body(conversation) | {
            "model": self.model,
            "add_generation_prompt": not conversation.continued,
            "continue_final_message": conversation.continued,
        }

    def detokenize(self, prompt: Prompt) -> str:
        """A prompt's token IDs as text, by the server's own tokenizer."""
        return str(_post(f"{self.url}/detokenize", {"model": self.model, "tokens": list(prompt.ids or ())})["prompt"])


@dataclass(frozen=True)
class OllamaRenderer:
    """A running Ollama: /api/chat with its render-only switch (undocumented; the model is loaded first)."""

    url: str
    model: str
    name: str = "ollama"

    def render(self, conversation: Conversation) -> Prompt:
        """Ask the server for the text it would feed."""
        if conversation.documents:
            raise NotApplicable("Ollama's API has no documents")
        seen = as_api(conversation)
        body = {"model": self.model, "messages": list(seen.messages), "stream": False, "_debug_render_only": True}
        answer = _post(f"{self.url}/api/chat", body | ({"tools": list(seen.tools)} if seen.tools else {}))
        rendered = (answer.get("_debug_info") or {}).get("rendered_template")
        if rendered is None:
            raise EngineError("this Ollama does not tell the prompt it renders", remedy="use Ollama 0.12 or later")
        return Prompt(str(rendered))


def _openai_body(conversation: Conversation) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": [_openai_message(message) for message in conversation.messages]}
    if conversation.tools:
        body["tools"] = list(conversation.tools)
    if conversation.documents:
        body["chat_template_kwargs"] = {"documents": list(conversation.documents)}
    return body


def _openai_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's form: call arguments are a JSON string."""
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    made = []
    for call in calls:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        made.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": made}


@lru_cache(maxsize=1)
def _client() -> httpx.Client:
    """One client for all requests: making one costs more than a request does."""
    return httpx.Client(timeout=_TIMEOUT)


def _post(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    try:
        answer = _client().post(url, json=body)
    except httpx.HTTPError as error:
        raise EngineError(f"{url} does not answer: {error}") from None
    if answer.status_code >= 400:
        kind: type[PipelineError] = ModelError if answer.status_code in (400, 422, 500) else EngineError
        raise kind(f"{url} answered {answer.status_code}", evidence=answer.text[:500])
    found: dict[str, Any] = answer.json()
    return found
