"""Renderers compared: each turns a conversation into the prompt that one engine would feed the model."""

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from pipeline.errors import ModelError
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.conversation import Conversation, NotApplicable, Prompt
from pipeline.prompts.gorender import render_go
from pipeline.prompts.ollama_view import as_api


class Renderer(Protocol):
    """One way to a prompt."""

    @property
    def name(self) -> str:
        """Its column in the matrix."""
        ...

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of known deviations that a chat may take here."""
        ...

    def render(self, conversation: Conversation) -> Prompt:
        """The prompt; raises ModelError when the template refuses, NotApplicable, or EngineError."""
        ...


def render_chat(template: ChatTemplate, conversation: Conversation, now: datetime) -> str:
    """The reference: the conversation through ``pipeline.prompts.chat``."""
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
    """``pipeline.prompts.chat`` itself."""

    template: ChatTemplate
    now: datetime
    name: str = "chat"
    paths: tuple[str, ...] = ()

    def render(self, conversation: Conversation) -> Prompt:
        """Render in process."""
        return Prompt(render_chat(self.template, conversation, self.now))


@dataclass(frozen=True)
class TransformersRenderer:
    """transformers' own chat template code, on the same template text and clock."""

    template: ChatTemplate
    now: datetime
    name: str = "transformers"
    paths: tuple[str, ...] = ()

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
    paths: tuple[str, ...] = ("template",)

    def render(self, conversation: Conversation) -> Prompt:
        """Render one conversation."""
        if conversation.documents:
            raise NotApplicable("Ollama's API has no documents")
        seen = as_api(conversation)
        return Prompt(render_go(self.source, [(seen.messages, seen.tools)], self.now)[0])
