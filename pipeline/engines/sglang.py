"""SGLang: GPU servers from their own Python environment (``SGLANG_PYTHON``), since its pins exclude this one's."""

from __future__ import annotations

import os
import subprocess
import sys

import httpx

from pipeline.conversation import Conversation
from pipeline.engines.base import Availability, Launch, OpenAiRequests, Prompt, require_feasible
from pipeline.engines.sglang_plan import plan as _plan
from pipeline.errors import EngineError
from pipeline.plan import Plan, Request

_INSTALL = "python -m venv sglang-env && sglang-env/bin/pip install sglang, then SGLANG_PYTHON=sglang-env/bin/python"
_VERSION_CODE = "import importlib.metadata as m; print(m.version('sglang'))"


class Sglang(OpenAiRequests):
    """SGLang's OpenAI-compatible server."""

    name = "sglang"
    default_port = 8004
    call_forms: tuple[str, ...] = ()  # it has no parser for Granite

    def available(self) -> Availability:
        """Ask the Python that would launch SGLang for its version, without importing it."""
        try:
            asked = subprocess.run([_python(), "-c", _VERSION_CODE], capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            return Availability(False, reason=f"{_python()} does not run: {error}", remedy=_INSTALL)
        if asked.returncode:
            return Availability(False, reason=f"SGLang is not installed in {_python()}", remedy=_INSTALL)
        return Availability(True, version=asked.stdout.strip())

    def plan(self, request: Request) -> Plan:
        """Flags for this model, these GPUs and this purpose."""
        return _plan(request)

    def launch(self, plan: Plan, request: Request, *, host: str, port: int) -> Launch:
        """``python -m sglang.launch_server`` with the plan's flags; EngineError when the plan is not feasible."""
        require_feasible(plan)
        argv = (_python(), "-m", "sglang.launch_server", *plan.arguments, "--host", host, "--port", str(port))
        name = request.served_name or request.model.name
        return Launch(self.name, argv, plan.environment, f"http://{host}:{port}", "/health", name)

    def prompt(self, client: httpx.Client, model: str, conversation: Conversation) -> Prompt:
        """Always raises EngineError: SGLang's /tokenize takes text only and no route renders a chat."""
        raise EngineError(
            "SGLang does not tell the rendered prompt",
            remedy="compare prompts with the vllm, llamacpp or ollama engine",
        )


def _python() -> str:
    return os.environ.get("SGLANG_PYTHON") or sys.executable
