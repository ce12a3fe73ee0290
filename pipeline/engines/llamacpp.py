"""llama.cpp's HTTP server: a ``llama-server`` on PATH when there is one, else the one inside the xllamacpp wheel."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from asyncio import gather
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import httpx

from pipeline.engines.base import ASKED, LEAST_CONTEXT, WHY_DEFAULT, Availability, Body, Container, Engine, Mismatch, Top
from pipeline.engines.flags import listed_flags
from pipeline.engines.listing import Listing, integer, openai_listing
from pipeline.machine.hardware import Hardware
from pipeline.model.tokenizer import Tokenizer
from pipeline.model.toolcalls import Call
from pipeline.net.chat import Defaults
from pipeline.net.client import ask
from pipeline.net.reach import get_json
from pipeline.planning.gguf_fit import GgufFit, fit_gguf, gguf_plan
from pipeline.planning.overrides import Overrides
from pipeline.planning.plan import Plan, Request, Setting
from pipeline.prompts.conversation import Conversation, Prompt, openai_body

# llama-server's short words, and the one setting whose short word is planned
_ALIASES = {"--ctx-size": "-c", "--c": "-c", "--np": "--parallel", "--kvu": "--kv-unified", "--a": "--alias", "--m": "--model"}
_ALIASES |= {"--t": "--threads", "--tb": "--threads-batch", "--ngl": "--n-gpu-layers", "--fa": "--flash-attn"}
_ALIASES |= {"--ctk": "--cache-type-k", "--ctv": "--cache-type-v", "--b": "--batch-size", "--ub": "--ubatch-size"}
_ALIASES |= {"--temperature": "--temp"}
_SAMPLING = {"temperature": "--temp", "top_p": "--top-p"}
# Its builds use OpenMP, whose threads sleep after so many spins: one per core also where the machine is shared. 1000 is libgomp's
# own count when there are more threads than cores. Measured on 2 shared cores, tokens/s at 1, 8 and 32 requests:
# sleeping at once 40, 59, 76; 1000 spins 81, 104, 91; 100,000 spins 106, 9, 13 (benchmarks/serve.py --sweep)
_SPIN = "threads spin shortly at barriers, then sleep"
_SHORT_SPIN = Setting(
    "GOMP_SPINCOUNT", "1000", f"{_SPIN}: sleeping at once halves the speed, long spins stall a machine that is shared"
)


def _settings(request: Request, fit: GgufFit) -> list[Setting]:
    model, cpu = request.model, request.hardware.cpu
    why = f"{fit.slots} slots x {fit.length} tokens; left out, the model's declared context is taken (hybrids: 1,048,576)"
    settings = [
        Setting("--model", str(model.path or f"{model.name}.Q8_0.gguf"), "the GGUF to serve"),
        Setting("--alias", request.name, "the name clients ask for"),
        Setting("-c", str(fit.slots * fit.length), why),
        Setting("--parallel", str(fit.slots), "requests computed together; each slot owns an equal share of -c"),
        Setting("--threads", str(cpu.cores), "the cores this process may use (affinity and container quota applied)"),
        Setting("--jinja", None, "prompts come from the model's own chat template"),
    ]
    if cpu.numa_nodes > 1 and not fit.on_gpu:
        settings.append(Setting("--numa", "distribute", f"threads and memory spread over {cpu.numa_nodes} NUMA nodes"))
    # beside a GPU too, where the portable wheel still computes on the CPU: with libgomp's own spins its first 20 answers took 83 s on 16
    # cores while a model was trained, and the next 20 a second each time when that had ended
    return [*settings, _SHORT_SPIN]


class LlamaCpp(Engine):
    """llama.cpp's OpenAI-compatible server; both programs take the same flags.

    A ``llama-server`` on PATH comes first: its owner built it for this machine (GPU, AVX-512), the wheel is a portable AVX2 build.
    """

    name = "llamacpp"
    title = "llama.cpp"
    default_port = 8005
    drawback = "it computes few requests at once; vLLM's batching is several times faster under load"
    tells_flags = True
    start_timeout = 300.0
    serves = "gguf"
    key_variable = "LLAMA_API_KEY"
    settings: ClassVar[Mapping[str, str]] = {"LLAMACPP_CTX_SIZE": "ctx-size", "LLAMACPP_PARALLEL": "parallel"}
    tells_prompt = True
    renderers = ("llamacpp",)
    # it learns the form from the chat template's past calls, and Granite 3's template writes none
    call_forms = ("granite4",)
    flags = listed_flags("llamacpp")
    defaults = Defaults("the README of llama.cpp's server", temperature=0.8, top_p=0.95, top_k=40, repetition_penalty=1.0)
    container = Container(
        image="ghcr.io/ggml-org/llama.cpp:server-b10731",
        gpu_image="ghcr.io/ggml-org/llama.cpp:server-cuda-b10731",
        variables={"--alias": "LLAMACPP_MODEL", "-c": "LLAMACPP_CTX_SIZE", "--parallel": "LLAMACPP_PARALLEL"},
        health=("CMD", "curl", "-fsS", "http://127.0.0.1:{port}/health"),
        program=("/app/llama-server",),
    )

    def available(self) -> Availability:
        """Look for ``llama-server`` on PATH and for the xllamacpp wheel, without starting a server."""
        if found := shutil.which("llama-server"):
            return Availability(True, version=_llama_server_version(found))
        try:
            return Availability(True, version=f"xllamacpp {importlib.metadata.version('xllamacpp')}")
        except importlib.metadata.PackageNotFoundError:
            reason = "neither llama-server is on PATH nor is the xllamacpp package installed"
            remedy = "pip install xllamacpp, or install llama.cpp (brew install llama.cpp)"
            return Availability(False, reason=reason, remedy=remedy)

    def mismatch(self, hardware: Hardware, version: str, packages: Mapping[str, str]) -> Mismatch | None:
        """The portable CPU wheel beside a GPU."""
        if not hardware.gpus or "xllamacpp" not in version:
            return None
        remedy = "put a llama-server built for this GPU on PATH (brew install llama.cpp, or llama.cpp's releases)"
        return Mismatch(False, "may be the portable CPU wheel, and there is a GPU", remedy)

    def half_context(self, plan: Plan, request: Request) -> Mapping[str, str | None]:
        """Half of ``-c``, with the same slots."""
        total = next((flag.value for flag in plan.flags if flag.name == "-c"), None) or "0"
        slots, mine = max(1, plan.max_num_seqs), any(f.name == "--parallel" and f.source == "user" for f in plan.flags)
        half = min(int(total) // 2, slots * request.model.shape.max_positions)
        if half // slots < LEAST_CONTEXT:
            return {}
        return {"-c": str(half)} | ({} if mine else {"--parallel": str(slots)})

    def plan(self, request: Request) -> Plan:
        """Flags for one GGUF; ``-c`` is the context of all slots together, so it is slots x context per request."""
        user, model = Overrides.of(request.overrides, self.flags, _ALIASES), request.model
        refused = f"llama.cpp reads GGUF files, {model.path} is a safetensors folder" if model.format == "safetensors" else ""
        fit, notes = fit_gguf(request, user), []
        if not model.has_chat_template:
            notes.append("the GGUF has no chat template: llama.cpp would guess a format; export it with its template")
        if model.format == "shape":
            notes.append("planned for a Q8_0 GGUF; give --model FILE.gguf for another type")
        settings = user.lay_over([*_settings(request, fit), *self.default_flags(request.sampling)], self.flags)
        return gguf_plan(self.name, request, fit, settings, refused=refused, notes=notes)

    def default_flags(self, sampling: Mapping[str, float]) -> list[Setting]:
        """``--temp`` and ``--top-p``."""
        return [Setting(_SAMPLING[name], f"{value:g}", WHY_DEFAULT) for name, value in sampling.items()]

    def program(self) -> Sequence[str]:
        """``llama-server``, else the wheel's in this interpreter."""
        program = shutil.which("llama-server")
        return [program] if program else [sys.executable, "-m", "pipeline.engines.llamacpp_server"]

    async def listing(self, root: str, api_key: str, timeout: float) -> Listing:
        """With the context of one slot and the file it loaded, from ``/props``."""
        listed, props = await gather(get_json(root, "/v1/models", api_key, timeout), get_json(root, "/props", api_key, timeout))
        found = openai_listing(listed)
        said = props.data if props.ok and isinstance(props.data, dict) else {}
        slot = said.get("default_generation_settings")
        context = integer(slot.get("n_ctx")) if isinstance(slot, dict) else None
        path = str(said.get("model_path", ""))
        told = [replace(one, context=context or one.context, path=one.path or path, loaded=True) for one in found.models or ()]
        return replace(found, models=found.models and tuple(told))

    def loaded_file(self, client: httpx.Client, model: str) -> str | None:
        """``/props`` names it."""
        try:
            return str(client.get("/props").json().get("model_path") or "") or None
        except (httpx.HTTPError, ValueError, AttributeError):
            return None

    def tokenize(self, client: httpx.Client, text: str) -> list[int] | None:
        """``/tokenize``: the tokenizer in the GGUF is a conversion of the folder's."""
        answer = ask(client, "/tokenize", {"content": text, "add_special": False, "parse_special": True})
        return [int(token) for token in answer["tokens"]]

    def _top(self, client: httpx.Client, model: str, prompt: Prompt, tokenizer: Tokenizer) -> Top:
        """One position, asked by llama.cpp's own completions."""
        wanted = {"n_predict": 1, "temperature": 0, "n_probs": ASKED, "post_sampling_probs": False}
        answer = ask(client, "/completion", {"model": model, "prompt": list(prompt.ids or ()), **wanted})
        tops = answer["completion_probabilities"][0]["top_logprobs"]
        return [(int(entry["id"]), float(entry["logprob"])) for entry in tops]

    def force_call(self, body: Body, call: Call) -> Body | None:
        """``tool_choice`` required: from the opening on, llama.cpp's grammar for this chat template demands a call.

        Without the opening the grammar lets a model talk for as long as it likes first.
        """
        opened = {"role": "assistant", "content": call.opening}
        return body | {"tool_choice": "required", "messages": [*body["messages"], opened]}

    def completion(self, model: str, prompt: Prompt, most: int, marks: Sequence[str]) -> tuple[str, Body]:
        """It leaves special tokens out of an answer, except those named."""
        path, body = super().completion(model, prompt, most, marks)
        return path, body | {"preserved_tokens": list(marks)}

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
