"""What vLLM is told on every kind of machine: the model and its name, tool calling, and environment."""

from collections.abc import Sequence

from pipeline.planning.gpu_fit import hub_id
from pipeline.planning.plan import Request, Setting

_COMPACT = '{"backend":"xgrammar","disable_any_whitespace":true}'


def with_common(request: Request, planned: Sequence[Setting]) -> list[Setting]:
    """The settings planned for a machine, between those of every machine."""
    model, parser = request.model, request.model.tool_format
    settings = [
        Setting("--model", str(model.path or hub_id(model.name)), "the model to serve"),
        Setting("--served-model-name", request.name, "the name clients ask for"),
        *planned,
    ]
    if parser is not None:
        settings += [
            Setting("--enable-auto-tool-choice", None, "requests with tools are refused without it"),
            Setting("--tool-call-parser", parser, "the form in which the chat template writes tool calls"),
        ]
    why = "JSON by schema comes compact: left free, a small model pads it with white space until the token limit"
    settings += [
        Setting("--structured-outputs-config", _COMPACT, why),
        Setting("VLLM_NO_USAGE_STATS", "1", "no usage reports leave the machine"),
        Setting("DO_NOT_TRACK", "1", "no usage reports leave the machine"),
    ]
    if model.path is not None:
        settings.append(Setting("HF_HUB_OFFLINE", "1", "the model is a local folder: no hub look-ups at start"))
    return settings


def template_warning(request: Request) -> list[str]:
    """A folder without a chat template refuses every chat, and only when asked."""
    if request.model.has_chat_template:
        return []
    return ["the folder has no chat template: every chat would be refused; save it with the tokenizer"]
