"""Chat templates rendered as transformers renders them, without importing it: the tokenizer's own jinja is the truth.

Not covered: tools given as Python functions (pass their JSON schema) and batches of conversations.
"""

import hashlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.model.gguf import read_gguf_header
from pipeline.prompts import sandbox
from pipeline.runs.files import read_object, read_utf8

Message = Mapping[str, Any]
# how Granite frames a turn
START, MIDDLE, END = "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>\n"

EMBEDDED_TEMPLATE = (Path(__file__).parent / "granite_embedded.jinja").read_text(encoding="utf-8")
"""The embedded base model's chat template: Granite's turn format with tools, documents and generation marks."""

# where transformers keeps the template for conversations with tools
TOOL_USE = "additional_chat_templates/tool_use.jinja"

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Where the continued message ends; any text that no message holds. The trailing space shows whether the template trims.
_CUT = "\u2063CUT-HERE\u2063 "


@dataclass(frozen=True)
class ChatTemplate:
    """A jinja chat template and the special-token strings it may use (``bos_token``, ``eos_token``, ...).

    ``tool_use`` is the one that some models have for conversations with tools, chosen as ``apply_chat_template`` chooses.
    """

    source: str
    variables: Mapping[str, str] = field(default_factory=dict)
    tool_use: str | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTemplate":
        """Read a model folder's chat_template.jinja, else its tokenizer_config.json; ModelError when there is none."""
        paths = (folder / "tokenizer_config.json", folder / "special_tokens_map.json")
        config, older = (read_object(path) if path.is_file() else {} for path in paths)
        named = {**older, **config}
        if (folder / "chat_template.jinja").is_file():
            more = folder / TOOL_USE
            tool_use = read_utf8(more) if more.is_file() else None
            return cls(read_utf8(folder / "chat_template.jinja"), _named_tokens(named, folder), tool_use)
        source, tool_use = config.get("chat_template"), None
        if isinstance(source, list):  # several named templates
            by_name = {e.get("name"): e.get("template") for e in source if isinstance(e, dict)}
            source, tool_use = by_name.get("default"), by_name.get("tool_use")
        if source and not isinstance(source, str):
            raise ModelError(f"{folder}/tokenizer_config.json: chat_template must be text, this is {type(source).__name__}")
        if not source:
            what = f"{folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)"
            raise ModelError(what, remedy="save it with the tokenizer: tokenizer.save_pretrained(folder)")
        return cls(source, _named_tokens(named, folder), tool_use if isinstance(tool_use, str) else None)

    @classmethod
    def from_file(cls, path: Path, variables: Mapping[str, str] | None = None) -> "ChatTemplate":
        """Read a .jinja file."""
        try:
            return cls(path.read_text(encoding="utf-8"), variables or {})
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"cannot read the chat template {path}: {error}") from None

    @classmethod
    def from_gguf(cls, path: Path, variables: Mapping[str, str] | None = None) -> "ChatTemplate":
        """Read the template a GGUF carries (its vocabulary is not read, so it names no special tokens)."""
        source = read_gguf_header(path).metadata.get("tokenizer.chat_template")
        if not source:
            raise ModelError(f"{path} carries no chat template", remedy="convert a folder that has chat_template.jinja")
        return cls(str(source), variables or {})

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the source."""
        return hashlib.sha256(self.source.encode("utf-8")).hexdigest()

    def chosen(self, tools: object) -> str:
        """The source that renders a conversation with these tools, or with none."""
        return self.tool_use if tools is not None and self.tool_use else self.source

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        now: datetime | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text, byte for byte what ``apply_chat_template(..., tokenize=False)`` returns.

        ``now`` is the clock that dated templates see; ``kwargs`` reach the template. Raises ModelError when the
        template refuses the messages.
        """
        if not messages:
            raise ModelError("an empty conversation has no prompt", remedy="give at least one message")
        if continue_final_message and add_generation_prompt:
            raise ModelError("a final message is either continued or followed by a generation prompt, not both")
        chat = _with_cut(messages) if continue_final_message else list(messages)
        context = {**self.variables, "strftime_now": (now or datetime.now()).strftime, **kwargs}
        given = {"messages": chat, "tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        text = sandbox.render(self.chosen(tools), {**given, **context})
        return _cut(text) if continue_final_message else text


def _named_tokens(named: Mapping[str, Any], folder: Path) -> dict[str, str]:
    found = {}
    for name in _NAMED_TOKENS:
        token = named.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        if text and not isinstance(text, str):
            raise ModelError(f"{folder}/tokenizer_config.json: {name} must be text, this is {type(text).__name__}")
        if text:
            found[name] = text
    return found


def _with_cut(messages: Sequence[Message]) -> list[Message]:
    """The messages, the last one's text (its last text part) followed by the cut mark."""
    chat: list[Any] = deepcopy(list(messages))
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1] = {**chat[-1], "content": content + _CUT}
        return chat
    for part in reversed(content or []):
        if "text" in part:
            part["text"] += _CUT
            return chat
    raise ModelError("the final message has no text to continue")


def _cut(text: str) -> str:
    at = text.rfind(_CUT.strip())
    if at < 0:
        raise ModelError("the chat template changes or drops the final message, so it cannot be continued")
    # a template that trims its messages has eaten the mark's trailing space: trim what was there before it too
    return text[:at] if text.startswith(_CUT, at) else text[:at].rstrip()


def assistant_spans(
    template: ChatTemplate, messages: Sequence[Message], *, now: datetime | None = None, **kwargs: Any
) -> list[tuple[int, int]]:
    """Character spans of what each assistant turn trains: its text and exactly one end-of-text token, nothing more.

    Found by rendering the conversation turn by turn. Raises ModelError when the template rewrites earlier turns
    (its prompts are then not prefixes of the training text), or when a turn does not hold exactly one end token.
    """
    end = template.variables.get("eos_token")
    if not end:
        raise ModelError("the tokenizer names no eos_token, so the end of a turn is unknown")
    clock = now or datetime.now()
    whole = template.render(messages, now=clock, **kwargs)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        done = whole if index + 1 == len(messages) else template.render(messages[: index + 1], now=clock, **kwargs)
        start = _turn_start(template, messages[: index + 1], done, clock, kwargs)
        if not whole.startswith(done) or not done.startswith(whole[:start]):
            raise ModelError(f"the chat template rewrites turn {index + 1} when later turns follow: it cannot be trained on")
        turn = done[start:]
        if turn.count(end) != 1 or turn.split(end)[1].strip():
            raise ModelError(f"assistant turn {index + 1} does not end with exactly one {end}", evidence=repr(turn[-200:]))
        spans.append((start, start + turn.index(end) + len(end)))
    return spans


def _turn_start(template: ChatTemplate, messages: Sequence[Message], done: str, now: datetime, kwargs: Mapping[str, Any]) -> int:
    """Where the last (assistant) turn's own text starts in ``done``, its rendering: after the prompt the model would have been given."""
    before = messages[:-1] or messages
    asked = template.render(before, now=now, add_generation_prompt=True, **kwargs)
    if before is messages:  # the conversation starts with the assistant: find its header, the generation prompt
        header = asked[len(done) :]
        if asked.startswith(done) and header and done.count(header) == 1:
            return done.index(header) + len(header)
    elif done.startswith(asked):
        return len(asked)
    raise ModelError("the chat template's generation prompt is not how it starts an assistant turn: served would not be trained")
