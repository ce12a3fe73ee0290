"""llama.cpp's HTTP server: a ``llama-server`` on PATH when there is one, else the one inside the xllamacpp wheel."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys

import httpx

from pipeline.conversation import Conversation
from pipeline.engines.base import Availability, Body, Launch, OpenAiRequests, Prompt, ask, openai_body, require_feasible
from pipeline.engines.llamacpp_plan import plan as _plan
from pipeline.plan import Plan, Request
from pipeline.toolcalls import Call


class LlamaCpp(OpenAiRequests):
    """llama.cpp's OpenAI-compatible server; both programs take the same flags.

    A ``llama-server`` on PATH comes first: its owner built it for this machine (GPU, AVX-512), the wheel is a portable AVX2 build.
    """

    name = "llamacpp"
    default_port = 8005
    # it learns the form from the chat template's past calls, and Granite 3's template writes none
    call_forms: tuple[str, ...] = ("granite4",)

    def available(self) -> Availability:
        """Look for ``llama-server`` on PATH and for the xllamacpp wheel, without starting a server."""
        if found := shutil.which("llama-server"):
            return Availability(True, version=_llama_server_version(found))
        try:
            return Availability(True, version=f"xllamacpp {importlib.metadata.version('xllamacpp')}")
        except importlib.metadata.PackageNotFoundError:
            reason = "neither llama-server is on PATH nor is the xllamacpp package installed"
            return Availability(
                False, reason=reason, remedy="pip install xllamacpp, or install llama.cpp (brew install llama.cpp)"
            )

    def plan(self, request: Request) -> Plan:
        """Flags for this GGUF, machine and purpose."""
        return _plan(request)

    def launch(self, plan: Plan, request: Request, *, host: str, port: int) -> Launch:
        """The server process with the plan's flags; EngineError when the plan is not feasible."""
        require_feasible(plan)
        program = shutil.which("llama-server")
        prefix = [program] if program else [sys.executable, "-m", "pipeline.engines.xllamacpp_server"]
        argv = (*prefix, *plan.arguments, "--host", host, "--port", str(port))
        name = request.served_name or request.model.name
        return Launch(self.name, argv, plan.environment, f"http://{host}:{port}", "/health", name, start_timeout=300.0)

    def force_call(self, body: Body, call: Call) -> Body | None:
        """``tool_choice`` required: from the opening on, llama.cpp's grammar for this chat template demands a call.

        Without the opening the grammar lets a model talk for as long as it likes first.
        """
        opened = {"role": "assistant", "content": call.opening}
        return body | {"tool_choice": "required", "messages": [*body["messages"], opened]}

    def prompt(self, client: httpx.Client, model: str, conversation: Conversation) -> Prompt:
        """Text and token IDs: ``/apply-template`` renders as chat completions do (a final assistant message is continued),
        ``/tokenize`` then parses special tokens as they do.
        """
        text = str(ask(client, "/apply-template", openai_body(conversation))["prompt"])
        # add_special lets the model's own metadata decide about a BOS token, which is what the completion path does
        answer = ask(client, "/tokenize", {"content": text, "add_special": True, "parse_special": True})
        return Prompt(text, tuple(answer["tokens"]))


def _llama_server_version(program: str) -> str:
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=False)
        found = re.search(r"version: (\S+)", said.stdout + said.stderr)
    except (OSError, subprocess.SubprocessError):
        found = None
    return f"llama-server {found[1] if found else 'of unknown version'} ({program})"
