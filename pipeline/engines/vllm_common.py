"""What vLLM is told on every kind of machine: the model and its name, tool calling, and environment."""

from __future__ import annotations

from pipeline.gpus import Gpu
from pipeline.plan import Request, Setting


def identity(request: Request) -> list[Setting]:
    """Which model, under which name."""
    model = request.model
    return [
        Setting("--model", str(model.path or hub_id(model.name)), "the model to serve"),
        Setting("--served-model-name", request.served_name or model.name, "the name clients ask for"),
    ]


def hub_id(name: str) -> str:
    """The public id of a shape's chat model; 3.x ids end in -instruct."""
    return f"ibm-granite/{name}-instruct" if name.startswith("granite-3.") else f"ibm-granite/{name}"


def tool_parser(request: Request) -> list[Setting]:
    """Tool calling in the form of the model's chat template, where it has tools."""
    parser = request.model.tool_format
    if parser is None:
        return []
    return [
        Setting("--enable-auto-tool-choice", None, "requests with tools are refused without it"),
        Setting("--tool-call-parser", parser, "the form in which the chat template writes tool calls"),
    ]


def structured_outputs() -> list[Setting]:
    """JSON answers without white space of the model's choosing: a small model may pad with it until the token limit."""
    wanted = '{"backend":"xgrammar","disable_any_whitespace":true}'
    why = "JSON by schema comes compact: left free, a small model pads it with white space until the token limit"
    return [Setting("--structured-outputs-config", wanted, why)]


def template_warning(request: Request) -> list[str]:
    """A folder without a chat template refuses every chat, and only when asked."""
    if request.model.has_chat_template:
        return []
    return ["the folder has no chat template: every chat would be refused; save it with the tokenizer"]


def common_environment(local: bool) -> list[Setting]:
    """Variables every start gets: no usage reports, and no hub look-ups for a model that is a local folder."""
    settings = [
        Setting("VLLM_NO_USAGE_STATS", "1", "no usage reports leave the machine"),
        Setting("DO_NOT_TRACK", "1", "no usage reports leave the machine"),
    ]
    if local:
        settings.append(Setting("HF_HUB_OFFLINE", "1", "the model is a local folder: no hub look-ups at start"))
    return settings


def refusal(request: Request, gpu: Gpu | None) -> str:
    """Why vLLM cannot serve this model on this kind of machine at all, or ""."""
    if request.model.format == "gguf":
        return "vLLM is given a GGUF: its GGUF loader is experimental and does not know Granite; serve the merged folder"
    if gpu is None:
        return ""
    if gpu.vendor == "apple":
        return "vLLM has no Metal build that serves Granite: use llama.cpp or Ollama on this Mac"
    if gpu.vendor == "nvidia" and gpu.capability < (7, 0):
        return f"vLLM needs compute capability 7.0; {gpu.name} has {gpu.compute_capability}"
    return ""
