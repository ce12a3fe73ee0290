"""Renderers compared: each turns a conversation into the prompt that one engine would feed the model."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Protocol

import httpx

from pipeline import engines
from pipeline.chat import ChatTemplate
from pipeline.config import key_for
from pipeline.conversation import Conversation
from pipeline.engines.base import Engine, NotApplicable, Prompt, ask
from pipeline.errors import ModelError
from pipeline.gorender import render_go
from pipeline.ollama_view import as_api

_TIMEOUT = 60.0


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
class EngineRenderer:
    """A running server of one of the engines, asked in that engine's own way."""

    name: str
    url: str
    model: str = ""

    @property
    def engine(self) -> Engine:
        """The engine of that name."""
        return engines.get(self.name)

    @cached_property
    def client(self) -> httpx.Client:
        """The client, made with the server's key, which is read once and not for each prompt."""
        return _client(self.url, key_for(self.engine.name))

    def render(self, conversation: Conversation) -> Prompt:
        """Ask the server what it would feed the model."""
        return self.engine.prompt(self.client, self.model, conversation)

    def detokenize(self, prompt: Prompt) -> str:
        """A vLLM prompt's token IDs as text, by the server's own tokenizer."""
        return str(ask(self.client, "/detokenize", {"model": self.model, "tokens": list(prompt.ids or ())})["prompt"])


@lru_cache(maxsize=8)
def _client(url: str, key: str) -> httpx.Client:
    """One client for all requests to a server: making one costs more than a request does."""
    # no connection is kept, so that a client that is dropped from the cache leaves nothing open
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT, limits=httpx.Limits(max_keepalive_connections=0))
