"""llama.cpp's HTTP server: a ``llama-server`` on PATH when there is one, else the one inside the xllamacpp wheel."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys

import httpx

from pipeline.engines.base import Availability, Body, Launch, OpenAiRequests, openai_body, require_feasible
from pipeline.engines.flags import LLAMACPP
from pipeline.model.toolcalls import Call
from pipeline.net.client import ask
from pipeline.planning.gguf_fit import SHORT_SPIN, GgufFit, fit_gguf, gguf_that_fits, room
from pipeline.planning.overrides import Overrides
from pipeline.planning.plan import Plan, Request, Setting
from pipeline.prompts.conversation import Conversation, Prompt

_ALIASES = {
    "--ctx-size": "-c", "--c": "-c", "--np": "--parallel", "--t": "--threads", "--ngl": "--n-gpu-layers", "--fa": "--flash-attn",
    "--ctk": "--cache-type-k", "--ctv": "--cache-type-v", "--b": "--batch-size", "--ub": "--ubatch-size",
    "--kvu": "--kv-unified", "--a": "--alias", "--tb": "--threads-batch", "--m": "--model",
}  # fmt: skip


def plan(request: Request) -> Plan:
    """Flags for one GGUF; ``-c`` is the context of all slots together, so it is slots x context per request."""
    user = Overrides.of(request.overrides, _ALIASES)
    model = request.model
    why_not = "" if model.format != "safetensors" else f"llama.cpp reads GGUF files, {model.path} is a safetensors folder"
    fit = fit_gguf(request, user)
    flags, env = user.lay_over(_settings(request, fit), LLAMACPP)
    kind = model.quantization or ("Q8_0" if model.format == "shape" else None)
    return Plan(
        engine="llamacpp",
        feasible=fit.feasible and not why_not,
        flags=flags,
        env=env,
        dtype=model.dtype,
        quantization=kind,
        tensor_parallel=1,
        max_model_len=fit.length,
        max_num_seqs=fit.slots,
        memory=fit.memory,
        alternatives=_alternatives(request, fit, why_not),
        warnings=_warnings(request, fit, why_not),
    )


def _settings(request: Request, fit: GgufFit) -> list[Setting]:
    model, cpu = request.model, request.hardware.cpu
    total = fit.slots * fit.length
    settings = [
        Setting("--model", str(model.path or f"{model.name}.Q8_0.gguf"), "the GGUF to serve"),
        Setting("--alias", request.served_name or model.name, "the name clients ask for"),
        Setting(
            "-c",
            str(total),
            f"{fit.slots} slots x {fit.length} tokens; left out, the model's declared context is taken (hybrids: 1,048,576)",
        ),
        Setting("--parallel", str(fit.slots), "requests computed together; each slot owns an equal share of -c"),
        Setting("--threads", str(cpu.cores), "the cores this process may use (affinity and container quota applied)"),
        Setting("--jinja", None, "prompts come from the model's own chat template"),
    ]
    if cpu.numa_nodes > 1 and not fit.on_gpu:
        settings.append(Setting("--numa", "distribute", f"threads and memory spread over {cpu.numa_nodes} NUMA nodes"))
    if not fit.on_gpu:
        settings.append(SHORT_SPIN)
    return settings


def _alternatives(request: Request, fit: GgufFit, why_not: str) -> tuple[str, ...]:
    if why_not:
        return ("granite-pipeline export makes a Q8_0 GGUF of it", "the vllm engine serves the folder as it is")
    if fit.feasible and (fit.on_gpu or not request.hardware.gpus):
        return ()
    found = gguf_that_fits(request.model, request.hardware) if request.model.format == "shape" else None
    words = [f"the {found[0]} GGUF ({found[1]:.1f} GiB), {found[2]}"] if found and found[0] != "Q8_0" else []
    if not fit.feasible:
        words += ["a GGUF with fewer bits per weight (Q4_K_M), or a smaller Granite"] if not words else []
    return tuple(words)


def _warnings(request: Request, fit: GgufFit, why_not: str) -> tuple[str, ...]:
    m, found = fit.memory, [why_not] if why_not else []
    if not fit.feasible:
        found.append(
            f"needs {m.total:.1f} GiB (weights {m.weights:.1f}, KV cache {m.kv_cache:.1f}, buffers {m.overhead:.1f}), {m.available:.1f} GiB are available"
        )
    elif request.hardware.gpus and not fit.on_gpu:
        found.append(
            f"{m.total:.1f} GiB do not fit on the GPU ({room(request.hardware).gpu:.1f} GiB usable): part of the layers run on the CPU"
        )
    if not request.model.has_chat_template:
        found.append("the GGUF has no chat template: llama.cpp would guess a format; export it with its template")
    if request.model.format == "shape":
        found.append("planned for a Q8_0 GGUF; give --model FILE.gguf for another type")
    return tuple(found)


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
        return plan(request)

    def launch(self, plan: Plan, request: Request, *, host: str, port: int) -> Launch:
        """The server process with the plan's flags; EngineError when the plan is not feasible."""
        require_feasible(plan)
        program = shutil.which("llama-server")
        prefix = [program] if program else [sys.executable, "-m", "pipeline.engines.llamacpp_server"]
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
