"""Ollama: a local ``ollama serve`` or any URL; the model is created over HTTP from a GGUF and Modelfile parts.

Models are made and removed with Ollama's own client. What that has no call for is asked with ours: whether a blob is there
(HEAD), the version, the prompt it renders, a model's SYSTEM and blob, next tokens under a format, and the lists of models, of
which every fault has to be told apart.
"""

import os
import re
import shutil
import subprocess
from asyncio import gather
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from packaging.version import InvalidVersion, Version

from pipeline.engines.base import (
    ASKED,
    LEAST_CONTEXT,
    LOOPBACK,
    UNNAMED,
    Availability,
    Body,
    Container,
    Engine,
    Launch,
    Top,
    require_feasible,
)
from pipeline.engines.flags import listed_flags
from pipeline.engines.listing import Listed, Listing, entries, integer
from pipeline.errors import EngineError, MissingDependency, ModelError
from pipeline.model.tokenizer import Tokenizer
from pipeline.model.toolcalls import Call
from pipeline.net.chat import Defaults
from pipeline.net.client import Unanswered, ask, client_settings, open_client, post, product_errors
from pipeline.net.reach import get_json
from pipeline.planning.gguf_fit import barrier_threads, fit_gguf, gguf_plan
from pipeline.planning.overrides import Overrides
from pipeline.planning.plan import Plan, Purpose, Request, Setting
from pipeline.prompts.conversation import Conversation, NotApplicable, Prompt, openai_body
from pipeline.prompts.ollama_view import as_api, joined
from pipeline.runs.hashes import sha256_file

_PARALLEL: dict[Purpose, int] = {"verify": 4, "serve": 4, "throughput": 8, "latency": 1}
_ALIASES = {f"--{w}": f"OLLAMA_{w.upper().replace('-', '_')}" for w in ("num-parallel", "keep-alive", "max-loaded-models")}
_PARAMETERS = {"--num-ctx": "num_ctx", "--num-gpu": "num_gpu", "--num-thread": "num_thread"}
_NO_DOCUMENTS = "Ollama's API has no documents"
# what Ollama answers to a chat that no way of sending makes it take, and why
_CANNOT = {
    "Unable to generate parser": "Ollama, where it renders with the chat template in the GGUF, refuses a tool without parameters",
    "cannot unmarshal": "Ollama's API has no place for such a tool or call: its types are not JSON schema's",
}
# next-token distributions of a rendered prompt are told since then; the prompt that is rendered since 0.11.5
OLDEST = Version("0.12.11")
_UPGRADE = f"upgrade Ollama to {OLDEST} or later"
# between two words of Ollama: it is silent while it copies a large model
_SILENT_SECONDS = 1800.0
_DELETE_SECONDS = 30.0
# what would make the import of its client fail, which makes a client of its own for whatever they say
_READ_AT_IMPORT = ("OLLAMA_HOST", *(f"{name}_proxy" for name in ("http", "https", "all")))
_INSTALL = "curl -fsSL https://ollama.com/install.sh | sh (macOS: brew install ollama), or set OLLAMA_BASE_URL to a running one"


class Ollama(Engine):
    """Ollama's server. Limits of a model (context, GPU layers, threads) are the model's parameters, not server flags.

    They are for the machine that it is made on: none of them but a context is in a run's Modelfile, which travels.
    """

    name = "ollama"
    title = "Ollama"
    default_port = 11434
    drawback = "llama.cpp underneath, with its own prompt templates: choose it where your tools already speak to Ollama"
    url_path = ""
    ready_path = "/api/version"
    start_timeout = 120.0
    serves = "gguf"
    default_model = "granite-soc:latest"
    tag = ":latest"
    tells_prompt = True
    # it renders with TEMPLATE or hands the chat to llama.cpp (``granite-pipeline modelfile --explain``)
    renderers = ("template", "ollama-jinja")
    doors = ("v1",)
    tells_texts = True
    copies_file = True
    creates_model = True
    host_variable = "OLLAMA_HOST"
    store_variable = "OLLAMA_MODELS"
    flags = listed_flags("ollama")
    # whatever the Modelfile says: only /api/chat and `ollama run` heed it (github.com/ollama/ollama/issues/17744)
    defaults = Defaults("Ollama's OpenAI layer", temperature=1.0, top_p=1.0, top_k=40, repetition_penalty=1.0)
    container = Container(
        image="ollama/ollama:0.33.3",
        gpu_image="ollama/ollama:0.33.3",
        health=("CMD", "ollama", "list"),
        volumes=("ollama:/root/.ollama",),
        create=("ollama", "create", "{model}", "-f", "Modelfile"),
        create_at="OLLAMA_HOST",
        program=("ollama",),
    )

    def available(self) -> Availability:
        """Look for ``ollama`` on PATH and ask its version."""
        program = shutil.which("ollama")
        if program is None:
            return Availability(False, reason="ollama is not on PATH", remedy=_INSTALL)
        # it would ask a running server first, which may hang: where nothing answers it tells its own version
        environment = {**os.environ, "OLLAMA_HOST": "127.0.0.1:9"}
        asked = [program, "--version"]
        try:
            done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False, env=environment)
        except (OSError, subprocess.SubprocessError) as error:
            return Availability(False, reason=f"{program} --version failed: {error}", remedy=_INSTALL)
        words = [word for word in (done.stdout + done.stderr).split() if word[:1].isdigit()]
        return _judged(program, words[-1] if words else "")

    async def at(self, root: str, timeout: float) -> Availability:
        """The Ollama at a URL, when it answers with a version that is new enough."""
        seen = await get_json(root, "/api/version", timeout=timeout)
        version = seen.data.get("version") if seen.ok and isinstance(seen.data, dict) else None
        if isinstance(version, str) and version:
            return replace(_judged(f"the Ollama at {root}", version), there=True)
        reason = seen.detail or f"what answers at {root} is no Ollama: /api/version has no version"
        nothing = seen.kind in ("refused", "name", "connect", "url")
        return Availability(False, reason=reason, remedy="start Ollama there, or correct OLLAMA_BASE_URL", there=not nothing)

    def as_url(self, address: str) -> str:
        """As Ollama reads OLLAMA_HOST: with or without scheme and port; the address that means all of a machine's is this one."""
        text = address.strip().strip("\"'").strip()
        with suppress(ValueError):  # an address of IPv6 without brackets
            text = f"[{ip_address(text)}]" if ":" in text else text
        scheme, given, rest = text.partition("://") if "://" in text else ("http", "", text)
        try:
            parts = urlsplit(f"{scheme}://{rest}")
            port = parts.port or ({"https": 443}.get(scheme, 80) if given else self.default_port)
        except ValueError:
            return address
        if scheme not in ("http", "https") or parts.username or " " in text:
            return address
        host = parts.hostname or LOOPBACK
        host = LOOPBACK if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        return f"{scheme}://{host}:{port}{parts.path.rstrip('/')}"

    def folders(self) -> list[Path]:
        """Where it keeps models."""
        return [Path.home() / ".ollama", *map(Path, filter(None, [os.environ.get("OLLAMA_MODELS")]))]

    def half_context(self, plan: Plan, request: Request) -> Mapping[str, str | None]:
        """Half of num_ctx."""
        length = plan.max_model_len // 2
        return {"--num-ctx": str(length)} if length >= LEAST_CONTEXT else {}

    async def listing(self, root: str, api_key: str, timeout: float) -> Listing:
        """All its models (``/api/tags``), and which of them are loaded (``/api/ps``)."""
        tags, ps = await gather(get_json(root, "/api/tags", timeout=timeout), get_json(root, "/api/ps", timeout=timeout))
        found = entries(tags, "models")
        if found is None:
            return Listing(tags, None)
        running = {str(entry.get("name")): entry for entry in entries(ps, "models") or []}
        models = []
        for entry in found:
            name, digest = str(entry.get("name", "")), str(entry.get("digest") or "")
            context = integer(running.get(name, {}).get("context_length"))
            models.append(Listed(name, name in running, context, integer(entry.get("size")), digest=digest))
        return Listing(tags, tuple(models))

    def to_have(self, model: str) -> str:
        """It is created from a run, or fetched."""
        return f"granite-pipeline serve ollama creates it, `ollama pull {model}` fetches a published one"

    def loaded_file(self, client: httpx.Client, model: str) -> str | None:
        """The blob in FROM's place, as ``/api/show`` has it: rewritten from the GGUF it was given, and named by its SHA-256."""
        try:
            said = str(post(client, "/api/show", {"model": model}).get("modelfile"))
        except EngineError:
            return None
        found = re.findall(r"^FROM (.*sha256-[0-9a-f]{64})$", said, re.MULTILINE)
        # more than one: an adapter or a projector changes what the first computes
        return found[0] if len(found) == 1 and not re.search("^ADAPTER ", said, re.MULTILINE) else None

    def _top(self, client: httpx.Client, model: str, prompt: Prompt, tokenizer: Tokenizer) -> Top:
        """One position, by ``/api/generate`` with ``raw``."""
        options = {"temperature": 0, "num_predict": 1}
        # not a word of probabilities comes with an end token: a format makes it write something; they are those before it
        said = {"raw": True, "stream": False, "truncate": False, "format": {"type": "boolean"}, "options": options}
        wanted = {"logprobs": True, "top_logprobs": ASKED}
        answer = post(client, "/api/generate", {"model": model, "prompt": prompt.text, **said, **wanted})
        if not answer.get("logprobs"):
            raise EngineError("this Ollama tells no log-probabilities", remedy=_UPGRADE)
        named = [(tokenizer.named(str(one["token"])), float(one["logprob"])) for one in answer["logprobs"][0]["top_logprobs"]]
        return [(UNNAMED if token is None else token, value) for token, value in named]

    def plan(self, request: Request) -> Plan:
        """Variables of ``ollama serve`` and Modelfile parameters; every parallel request takes its own num_ctx of KV cache."""
        user = Overrides.of(request.overrides, self.flags, _ALIASES)
        limit, on_cpu = request.model.shape.max_positions, not request.hardware.gpus
        parallel = user.integer("OLLAMA_NUM_PARALLEL", 1, 64)
        asked = user.integer("--num-ctx", 1, limit, f"the model's own limit is {limit}")
        layers = user.integer("--num-gpu", -1, 1000)
        user.integer("--num-thread", 1, 1024)
        most = parallel or _PARALLEL[request.purpose]
        sized = {"--parallel": str(most), "-c": str(asked * most)} if asked else {"--parallel": str(parallel)} if parallel else {}
        fit = fit_gguf(request, Overrides(sized), slots=most)
        one, cut = "the default loads up to three models a GPU; this plan counts on the memory for one", "cuts prompts silently"
        settings = [
            Setting("OLLAMA_NUM_PARALLEL", str(fit.slots), "requests computed together; each takes its own num_ctx of KV cache"),
            Setting("OLLAMA_MAX_LOADED_MODELS", "1", one),
            Setting("OLLAMA_KEEP_ALIVE", "30m", "the default unloads the model after five minutes without requests"),
            Setting("OLLAMA_CONTEXT_LENGTH", str(fit.length), f"for models created without num_ctx; the default of 4096 {cut}"),
            Setting("--num-ctx", str(fit.length), "the default of 4096 on small machines cuts long prompts silently"),
        ]
        own = "Ollama's own estimate of how many layers fit"
        settings.append(Setting("--num-gpu", "0", "no GPU here") if on_cpu else Setting("--num-gpu", "-1", own))
        if not fit.on_gpu:
            threads, why = barrier_threads(request.hardware.cpu)
            settings.append(Setting("--num-thread", str(threads), why))
        flags, env = user.lay_over(settings, self.flags)
        parameters = tuple(replace(flag, name=_PARAMETERS[flag.name]) for flag in flags)
        folder = request.model.format == "safetensors"
        refused = "Ollama refuses Granite safetensors folders: it needs the GGUF" if folder else ""
        return gguf_plan(self.name, request, fit, ((), env), refused=refused, on_cpu=layers == 0, parameters=parameters)

    def launch(self, plan: Plan, request: Request, *, host: str, port: int) -> Launch:
        """``ollama serve`` on this address; EngineError when the plan is not feasible."""
        require_feasible(plan)
        env, url = {**plan.environment, "OLLAMA_HOST": f"{host}:{port}"}, f"http://{host}:{port}"
        return Launch(self.name, (*self.program(), "serve"), env, url, self.ready_path, request.name, self.start_timeout)

    def program(self) -> Sequence[str]:
        """The program, on PATH or not."""
        return [shutil.which("ollama") or "ollama"]

    def create(self, root: str, name: str, gguf: Path, parts: Mapping[str, Any]) -> None:
        """Make or replace the model ``name`` from a GGUF; ``parts`` are ``template``, ``system``, ``parameters``, ``license``.

        Ollama ignores a ``modelfile`` field over HTTP and needs parameters of the right JSON type (num_ctx as a number).
        """
        digest = "sha256:" + sha256_file(gguf)
        with open_client(root) as client, product_errors(f"{self.title} at {root}"):
            # a blob that is there already is gigabytes that need not be sent
            there = client.head(f"/api/blobs/{digest}").status_code != httpx.codes.NOT_FOUND
        with _asking(root, f"could not create {name}") as ollama:
            if not there:
                ollama.create_blob(gguf)
            said = [part.status for part in ollama.create(model=name, files={gguf.name: digest}, stream=True, **parts)]
        if said[-1:] != ["success"]:
            raise EngineError(f"{self.title} could not create {name}", evidence=f"its last word: {(said or ['none'])[-1]}")

    def canonical(self, name: str) -> str:
        """Without what Ollama takes for granted: its own registry, ``library/`` and ``:latest``; case makes no difference."""
        short = name.casefold().removeprefix("registry.ollama.ai/").removeprefix("library/")
        return short if ":" in short.rpartition("/")[2] else f"{short}:latest"

    def remove(self, root: str, name: str) -> None:
        """``DELETE /api/delete``."""
        with _asking(root, f"could not delete {name}", known=(httpx.codes.NOT_FOUND,), seconds=_DELETE_SECONDS) as ollama:
            ollama.delete(name)

    def schema_requests(self, body: Body, schema: Body) -> list[tuple[str, Body]]:
        """``response_format``, and Ollama's own ``format``."""
        options = {"temperature": 0, "num_predict": body["max_tokens"]}
        own = {"model": body["model"], "messages": body["messages"], "stream": False, "format": schema, "options": options}
        return [*super().schema_requests(body, schema), ("/api/chat", own)]

    def force_call(self, body: Body, call: Call) -> Body | None:
        """Ollama ignores ``tool_choice``: None."""
        return None

    def chat_body(self, conversation: Conversation) -> Body:
        """As OpenAI's, without documents."""
        if conversation.documents:
            raise NotApplicable(_NO_DOCUMENTS)
        # its /v1 makes a message of every part of a content
        return openai_body(replace(conversation, messages=tuple(map(joined, conversation.messages))))

    def completion(self, model: str, prompt: Prompt, most: int, marks: Sequence[str]) -> tuple[str, Body]:
        """``/api/generate`` with ``raw``: its other paths put the prompt into the template once more."""
        options = {"temperature": 0, "num_predict": most}
        return "/api/generate", {"model": model, "prompt": prompt.text, "raw": True, "stream": False, "options": options}

    def completed(self, answer: Body) -> Body:
        """From its own names."""
        ended, tokens = answer.get("done_reason"), answer.get("eval_count")
        return {"choices": [{"text": answer["response"], "finish_reason": ended}], "usage": {"completion_tokens": tokens}}

    def prompt(self, client: httpx.Client, model: str, conversation: Conversation) -> Prompt:
        """The rendered prompt as text, from ``_debug_render_only`` (the model is loaded first); Ollama tells no token IDs."""
        seen = as_api(conversation)
        said = {"messages": list(seen.messages)} | ({"tools": list(seen.tools)} if seen.tools else {})
        return _rendered(client, "/api/chat", model, said, conversation)

    def prompt_through(self, door: str, client: httpx.Client, model: str, conversation: Conversation) -> Prompt:
        """What ``/v1`` makes of the conversation as any OpenAI client sends it."""
        return _rendered(client, f"/{door}/chat/completions", model, openai_body(conversation), conversation)

    def own_system(self, client: httpx.Client, model: str) -> str:
        """The SYSTEM that the model was created with."""
        return str(post(client, "/api/show", {"model": model}).get("system") or "")


def _rendered(client: httpx.Client, path: str, model: str, said: Body, conversation: Conversation) -> Prompt:
    """The prompt that ``_debug_render_only`` shows of a chat; NotApplicable when Ollama cannot take such a chat."""
    if conversation.documents:
        raise NotApplicable(_NO_DOCUMENTS)
    try:
        answer = ask(client, path, {"model": model, **said, "stream": False, "_debug_render_only": True})
    except ModelError as refused:
        if why := next((why for words, why in _CANNOT.items() if words in refused.evidence), ""):
            raise NotApplicable(why) from None
        raise
    rendered = (answer.get("_debug_info") or {}).get("rendered_template")
    if rendered is None:
        raise EngineError("this Ollama does not tell the prompt it renders", remedy=_UPGRADE)
    return Prompt(str(rendered))


def _judged(which: str, version: str) -> Availability:
    """Usable unless the version is too old; one built from source without a version is 0.0.0, and one that is none is believed."""
    try:
        number = Version(version)
    except InvalidVersion:
        return Availability(True, version or None)
    if Version("0.0.0") < Version(number.base_version) < OLDEST:
        return Availability(False, version, f"{which} is version {version}, and {OLDEST} or later is needed", _UPGRADE)
    return Availability(True, version)


@contextmanager
def _asking(root: str, failed: str, known: Sequence[int] = (), seconds: float = _SILENT_SECONDS) -> Iterator[Any]:
    """Ollama's own client for the server at a URL; EngineError with Ollama's words, Unanswered where it breaks off.

    A refusal with a status in ``known`` is passed over. OLLAMA_API_KEY is for Ollama's own service and goes to no other host.
    """
    package = _package()
    settings = client_settings(root, "", httpx.Timeout(seconds, connect=10))
    settings |= {"host": settings.pop("base_url"), "follow_redirects": False, "event_hooks": {"request": [_without_key]}}
    try:
        with product_errors(f"Ollama at {root}"), package.Client(**settings) as client:
            yield client
    except ConnectionError:
        raise Unanswered(f"Ollama at {root} does not answer", httpx.ConnectError("connection refused")) from None
    except package.ResponseError as refused:
        if refused.status_code not in known:
            status = f" ({refused.status_code})" if refused.status_code > 0 else ""
            raise EngineError(f"Ollama {failed}{status}", evidence=str(refused.error)[:2000]) from None


def _without_key(request: httpx.Request) -> None:
    request.headers.pop("authorization", None)


@cache
def _package() -> Any:
    """Ollama's client package, which makes a client of its own while it is imported."""
    names = [name for name in os.environ if name in _READ_AT_IMPORT or name.lower() in _READ_AT_IMPORT]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        import ollama
    except ImportError:
        raise MissingDependency("Ollama's client for Python is not installed", remedy="make setup") from None
    finally:
        os.environ.update(hidden)
    return ollama
