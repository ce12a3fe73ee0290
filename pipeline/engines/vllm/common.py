"""What vLLM is told on every kind of machine: the model and its name, tool calling, and environment."""

from __future__ import annotations

from pipeline.planning.gpu_fit import hub_id
from pipeline.planning.plan import Request, Setting


def identity(request: Request) -> list[Setting]:
    """Which model, under which name."""
    model = request.model
    return [
        Setting("--model", str(model.path or hub_id(model.name)), "the model to serve"),
        Setting("--served-model-name", request.served_name or model.name, "the name clients ask for"),
    ]


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
