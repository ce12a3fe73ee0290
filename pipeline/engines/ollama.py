"""Ollama: a local ``ollama serve`` or any URL; the model is created over HTTP from a GGUF and Modelfile parts."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from pipeline.conversation import Conversation
from pipeline.engines.base import Availability, Body, Launch, NotApplicable, OpenAiRequests, Prompt, ask, require_feasible
from pipeline.engines.ollama_plan import plan as _plan
from pipeline.errors import EngineError
from pipeline.files import sha256_file
from pipeline.ollama_view import as_api
from pipeline.plan import Plan, Request
from pipeline.toolcalls import Call

_INSTALL = "curl -fsSL https://ollama.com/install.sh | sh (macOS: brew install ollama), or set OLLAMA_BASE_URL to a running one"
_CHUNK = 1 << 20


class Ollama(OpenAiRequests):
    """Ollama's server. Limits of a model (context, GPU layers) are Modelfile parameters, not server flags."""

    name = "ollama"
    default_port = 11434

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

    def plan(self, request: Request) -> Plan:
        """Server variables and model parameters for this model, machine and purpose."""
        return _plan(request)

    def launch(self, plan: Plan, request: Request, *, host: str, port: int) -> Launch:
        """``ollama serve`` on this address; EngineError when the plan is not feasible."""
        require_feasible(plan)
        env = {**plan.environment, "OLLAMA_HOST": f"{host}:{port}"}
        argv = (shutil.which("ollama") or "ollama", "serve")
        name = request.served_name or request.model.name
        return Launch(self.name, argv, env, f"http://{host}:{port}", "/api/version", name, start_timeout=120.0)

    async def create(self, client: httpx.AsyncClient, name: str, gguf: Path, parts: Mapping[str, Any]) -> None:
        """Make or replace the model ``name`` from a GGUF; ``parts`` are ``template``, ``system``, ``parameters``, ``license``.

        Ollama ignores a ``modelfile`` field over HTTP and needs parameters of the right JSON type (num_ctx as a number).
        """
        digest = "sha256:" + sha256_file(gguf)
        known = await client.head(f"/api/blobs/{digest}")
        if known.status_code == httpx.codes.NOT_FOUND:
            sent = await client.post(f"/api/blobs/{digest}", content=_chunks(gguf), timeout=None)
            if sent.is_error:
                raise EngineError(f"Ollama refused the upload of {gguf.name} ({sent.status_code})", evidence=sent.text[:2000])
        body = {"model": name, "files": {gguf.name: digest}, "stream": False, **parts}
        answer = await client.post("/api/create", json=body, timeout=None)
        said = (
            answer.json()
            if answer.headers.get("content-type", "").startswith("application/json")
            else {"error": answer.text[:2000]}
        )
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

    def prompt(self, client: httpx.Client, model: str, conversation: Conversation) -> Prompt:
        """The rendered prompt as text, from ``_debug_render_only`` (the model is loaded first); Ollama tells no token IDs."""
        if conversation.documents:
            raise NotApplicable("Ollama's API has no documents")
        seen = as_api(conversation)
        body: dict[str, Any] = {"model": model, "messages": list(seen.messages), "stream": False, "_debug_render_only": True}
        answer = ask(client, "/api/chat", body | ({"tools": list(seen.tools)} if seen.tools else {}))
        rendered = (answer.get("_debug_info") or {}).get("rendered_template")
        if rendered is None:
            raise EngineError("this Ollama does not tell the prompt it renders", remedy="use Ollama 0.12 or later")
        return Prompt(str(rendered))


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            yield chunk
