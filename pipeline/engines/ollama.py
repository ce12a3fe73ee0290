"""Ollama: a local ``ollama serve`` or any URL; the model is created over HTTP from a GGUF and Modelfile parts."""

import os
import shutil
import subprocess
from asyncio import gather
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from pipeline.engines.base import LEAST_CONTEXT, Availability, Body, Container, Engine, Launch, require_feasible
from pipeline.engines.flags import listed_flags
from pipeline.engines.listing import Listed, Listing, entries, integer
from pipeline.errors import EngineError
from pipeline.model.toolcalls import Call
from pipeline.net.chat import Defaults
from pipeline.net.client import ask
from pipeline.net.reach import get_json
from pipeline.planning.gguf_fit import barrier_threads, fit_gguf, gguf_plan
from pipeline.planning.overrides import Overrides
from pipeline.planning.plan import Plan, Purpose, Request, Setting
from pipeline.prompts.conversation import Conversation, NotApplicable, Prompt, openai_body
from pipeline.prompts.ollama_view import as_api
from pipeline.runs.hashes import sha256_file

_PARALLEL: dict[Purpose, int] = {"verify": 4, "serve": 4, "throughput": 8, "latency": 1}
_ALIASES = {f"--{w}": f"OLLAMA_{w.upper().replace('-', '_')}" for w in ("num-parallel", "keep-alive", "max-loaded-models")}
_PARAMETERS = {"--num-ctx": "num_ctx", "--num-gpu": "num_gpu", "--num-thread": "num_thread"}
_NO_DOCUMENTS = "Ollama's API has no documents"
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
    creates_model = True
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
    )

    def available(self) -> Availability:
        """Look for ``ollama`` on PATH and ask its version."""
        program = shutil.which("ollama")
        if program is None:
            return Availability(False, reason="ollama is not on PATH", remedy=_INSTALL)
        try:
            done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            return Availability(False, reason=f"{program} --version failed: {error}", remedy=_INSTALL)
        words = [word for word in (done.stdout + done.stderr).split() if word[:1].isdigit()]
        return Availability(True, version=words[-1] if words else None)

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

    def next_tokens(self, client: httpx.Client, model: str, prompts: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        """Always raises EngineError: its API takes text."""
        raise EngineError("ollama takes no token IDs", remedy="its prompts and answers are compared as text")

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

    def create(self, client: httpx.Client, name: str, gguf: Path, parts: Mapping[str, Any]) -> None:
        """Make or replace the model ``name`` from a GGUF; ``parts`` are ``template``, ``system``, ``parameters``, ``license``.

        Ollama ignores a ``modelfile`` field over HTTP and needs parameters of the right JSON type (num_ctx as a number).
        """
        # not with the client of PyPI's ollama: it sends a blob again that is there already (gigabytes), puts OLLAMA_API_KEY
        # into requests to any host, has no /api/version and no _debug_render_only, and reads lists strictly
        digest = "sha256:" + sha256_file(gguf)
        if client.head(f"/api/blobs/{digest}").status_code == httpx.codes.NOT_FOUND:
            with gguf.open("rb") as content:
                sent = client.post(f"/api/blobs/{digest}", content=content, timeout=None)
            if sent.is_error:
                raise EngineError(f"Ollama refused the upload of {gguf.name} ({sent.status_code})", evidence=sent.text[:2000])
        body = {"model": name, "files": {gguf.name: digest}, "stream": False, **parts}
        answer = client.post("/api/create", json=body, timeout=None)
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        said = answer.json() if is_json else {"error": answer.text[:2000]}
        if answer.is_error or said.get("status") != "success":
            raise EngineError(f"Ollama could not create {name} ({answer.status_code})", evidence=str(said.get("error", said)))

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
        return openai_body(conversation)

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
        if conversation.documents:
            raise NotApplicable(_NO_DOCUMENTS)
        seen = as_api(conversation)
        body: dict[str, Any] = {"model": model, "messages": list(seen.messages), "stream": False, "_debug_render_only": True}
        answer = ask(client, "/api/chat", body | ({"tools": list(seen.tools)} if seen.tools else {}))
        rendered = (answer.get("_debug_info") or {}).get("rendered_template")
        if rendered is None:
            raise EngineError("this Ollama does not tell the prompt it renders", remedy="use Ollama 0.12 or later")
        return Prompt(str(rendered))
