"""The Modelfile of a run: GGUF, TEMPLATE, parameters, system message, licence - and which renderer Ollama will use for it."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, ModelError
from pipeline.model.gguf import read_gguf_header
from pipeline.modelfile.grammar import Modelfile, parse_modelfile, quoted, writable
from pipeline.modelfile.template import derive, kept_system, prove
from pipeline.net.chat import SAMPLING
from pipeline.prompts.chat import ChatTemplate
from pipeline.runs.files import read_json, read_utf8, write_atomic
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import BaseRecord

log = logging.getLogger(__name__)

Parameter = str | int | float | bool | Sequence[str]
Parameters = Mapping[str, Parameter] | None
# Ollama's options and their types (api/types.go, Options and Runner, August 2026)
_TYPES: dict[str, type] = {
    **dict.fromkeys(("num_keep", "seed", "num_predict", "top_k", "repeat_last_n"), int),
    **dict.fromkeys(("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict"), int),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "temperature"), float),
    **dict.fromkeys(("repeat_penalty", "presence_penalty", "frequency_penalty"), float),
    "use_mmap": bool,
    "stop": str,
}
_BOOLS = {**dict.fromkeys(("1", "t", "true"), True), **dict.fromkeys(("0", "f", "false"), False)}
_LONGEST_DEFAULT_CONTEXT = 8192


@dataclass(frozen=True)
class Choice:
    """Which renderer one generation of Ollama uses, and why."""

    generation: str
    renderer: str
    reason: str


def build_modelfile(
    *,
    gguf: str,
    template: ChatTemplate,
    system: str | None = None,
    parameters: Parameters = None,
    license: str | None = None,
    proof: bool = True,
) -> str:
    """Modelfile text for a GGUF (path as FROM shall hold it) and its chat template.

    ``num_ctx`` is required, because Ollama's own default cuts prompts silently. Raises ModelError when no proven TEMPLATE
    can be made, InputError when a value cannot be written down; a system message always can (in TEMPLATE if not as SYSTEM).
    Without ``proof`` the TEMPLATE of an unpublished chat template is not run: to write the same text again, not a new one.
    """
    derived = derive(template)
    if proof and not derived.known:
        prove(derived, template)
    if system and not writable(system):  # into TEMPLATE, where escapes exist
        derived, system = derive(template, system), None
    end = template.variables.get("eos_token", "<|end_of_text|>")
    wanted: dict[str, Parameter] = {**SAMPLING, "stop": [end], **(parameters or {})}
    if "num_ctx" not in wanted:
        raise InputError("a Modelfile needs num_ctx: Ollama's default context cuts longer prompts without a word")
    # what Ollama takes for a file: a path without a folder could be a model name, and ``~`` would be expanded
    local = gguf if gguf.startswith(("/", "./", "../")) or Path(gguf).is_absolute() else f"./{gguf}"
    commands = [("FROM", local), ("TEMPLATE", derived.text)]
    commands += [(f"PARAMETER {name}", item) for name, value in wanted.items() for item in _items(name, value)]
    commands += [("SYSTEM", system)] if system else []
    commands += [("LICENSE", license)] if license else []
    return "".join(f"{command} {quoted(value, command)}\n" for command, value in commands)


def to_create_request(modelfile: Modelfile, digest: str, name: str) -> dict[str, Any]:
    """Body for ``POST /api/create`` once the GGUF lies on the server as blob ``digest`` ("sha256:...").

    The API takes no Modelfile and checks no types (a wrong one fails at the first chat), so parameters are typed here.
    """
    body: dict[str, Any] = {"model": name, "files": {Path(modelfile.source).name: digest}, "stream": False}
    parameters = {key: _typed(key, values) for key, values in modelfile.parameters.items()}
    # one that only TEMPLATE could hold goes along as SYSTEM too, which the API takes as it is: without it an Ollama that
    # renders with the chat template in the GGUF would lose it
    system = own_system(modelfile)
    parts = {"template": modelfile.template, "system": system, "license": modelfile.licenses, "parameters": parameters}
    return body | {key: value for key, value in parts.items() if value}


def own_system(modelfile: Modelfile) -> str:
    """The system message for requests that bring none, whether SYSTEM or TEMPLATE holds it; empty when there is none."""
    return modelfile.system or kept_system(modelfile.template or "") or ""


@dataclass(frozen=True)
class Made:
    """A Modelfile's text, and the jinja that the GGUF beside it carries."""

    text: str
    jinja: str


def for_run(
    run: RunFolder, system: str | None = None, parameters: Parameters = None, license: str | None = None, *, proof: bool = True
) -> Made:
    """The Modelfile for a run's GGUF, which must carry the merged model's chat template."""
    for needed in (run.merged, run.gguf):
        if not needed.exists():
            raise InputError(f"run {run.name!r} has no {needed.name}", remedy=f"granite-pipeline export --run {run.name}")
    template = ChatTemplate.from_folder(run.merged)
    jinja = ChatTemplate.from_gguf(run.gguf).source
    if jinja.rstrip("\n") != template.source.rstrip("\n"):
        again = f"granite-pipeline export --run {run.name} --force"
        raise ModelError(f"{run.gguf} carries another chat template than {run.merged}", remedy=again)
    longest = read_json(run.merged / "config.json").get("max_position_embeddings")
    wanted = {"num_ctx": _context(longest), **(parameters or {})}
    gguf = f"./{run.gguf.name}"
    text = build_modelfile(gguf=gguf, template=template, system=system, parameters=wanted, license=license, proof=proof)
    return Made(text, jinja)


def for_gguf(
    gguf: Path, template: Path | None = None, system: str | None = None, parameters: Parameters = None, license: str | None = None
) -> Made:
    """The Modelfile for any GGUF, by the chat template it carries or by another one that it was trained with."""
    if not gguf.is_file():
        raise InputError(f"{gguf}: no such file")
    header = read_gguf_header(gguf)
    jinja = str(header.metadata.get("tokenizer.chat_template") or "")
    chosen = ChatTemplate.from_file(template) if template else ChatTemplate.from_gguf(gguf)
    wanted = {"num_ctx": _context(header.get("context_length")), **(parameters or {})}
    text = build_modelfile(gguf=str(gguf), template=chosen, system=system, parameters=wanted, license=license)
    return Made(text, jinja)


def write_modelfile(run: RunFolder, *, system: str | None = None, license: str | None = None) -> Path:
    """Write the run's Modelfile atomically; its path."""
    write_atomic(run.modelfile, for_run(run, system, license=license).text)
    return run.modelfile


def base_license(base: BaseRecord) -> str | None:
    """A base's licence: the LICENSE file of a folder, or what is known of the embedded base; None when it cannot be written."""
    file = Path(base.id) / "LICENSE"
    if not file.is_file():
        return base.note or None
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        log.warning("modelfile: %s is left out: it cannot be read (%s)", file, error.strerror)
        return None
    # Ollama drops what is not printable: form feeds, no-break spaces, a byte order mark
    text = "".join(c if c in "\t\n" or c.isprintable() else " " for c in text)
    if not writable(text):
        log.warning("modelfile: %s is left out: no way of quoting it makes Ollama read it as it is", file)
        return None
    return text


def _context(longest: Any) -> int:
    """The model's own context, at most 8192: hybrids declare a million tokens, and Ollama reserves what it is told."""
    if longest is not None and (not isinstance(longest, int) or isinstance(longest, bool)):
        raise ModelError(f"context_length in the GGUF is {longest!r}, not a whole number", remedy="convert the model again")
    return min(longest or _LONGEST_DEFAULT_CONTEXT, _LONGEST_DEFAULT_CONTEXT)


def explain(modelfile: Modelfile, jinja: str) -> list[Choice]:
    """Which renderer each generation of Ollama uses for a model with this Modelfile and this jinja in its GGUF.

    Rules: server/images.go, shouldPreferChatTemplate (0.30, May 2026); before it, TEMPLATE was always used.
    """
    go, chat = "TEMPLATE", "the GGUF's chat template"
    if modelfile.template is None:
        newer = Choice("0.30 and later", chat, "there is no TEMPLATE (create may still pick a built-in one that looks alike)")
        return [Choice("before 0.30", "a guessed built-in template", "there is no TEMPLATE"), newer]
    preferred, reason = _prefers_jinja(modelfile.template, jinja)
    lost = "; `ollama create` then loses the system message, which only TEMPLATE could hold (granite-pipeline serve keeps it)"
    lost = lost if kept_system(modelfile.template) is not None else ""
    return [
        Choice("before 0.30", go, "these versions render every chat with TEMPLATE"),
        Choice("0.30 and later", chat if preferred else go, reason + (lost if preferred else "")),
        Choice("0.30 and later, OLLAMA_GO_TEMPLATE=1", go, "the variable asks for TEMPLATE"),
        Choice("0.30 and later, OLLAMA_GO_TEMPLATE=0", chat, f"the variable asks for the chat template{lost}"),
    ]


def _prefers_jinja(go: str, jinja: str) -> tuple[bool, str]:
    """Whether Ollama 0.30 and later takes the jinja, and why."""
    in_jinja = {"tools": "tools" in jinja or "tool_call" in jinja, "thinking": "<think>" in jinja and "</think>" in jinja}
    names = {name.lower() for name in re.findall(r"\.([A-Za-z]+)", go)}
    in_go = {"tools": "tools" in names, "thinking": "thinking" in names}
    results = ("tool_response", "tool_results", "role'] == 'tool'", "message.role == 'tool'", 'message.role == "tool"', "ipython")
    jinja_round_trip = in_jinja["tools"] and "tool_calls" in jinja and any(mark in jinja for mark in results)
    go_marks = ('eq .Role "tool"', "tool_response", "TOOL_RESULTS")
    go_round_trip = {"tools", "toolcalls"} <= names and any(mark in go for mark in go_marks)
    more, equal = sum(in_jinja.values()) > sum(in_go.values()), in_jinja == in_go
    if more and (jinja_round_trip or not go_round_trip):
        gained = ", ".join(name for name in in_jinja if in_jinja[name] and not in_go[name])
        return True, f"it declares more than TEMPLATE does ({gained}), and it is what the model was trained with"
    if equal and in_jinja["tools"] and jinja_round_trip and not go_round_trip:
        return True, "both declare tools, and only the chat template is recognised as handling tool results; it is exact"
    if more:
        return False, "TEMPLATE handles tools, tool calls and tool results, and the chat template is not recognised as doing so"
    return False, "the chat template in the GGUF declares nothing that TEMPLATE lacks"


def _items(name: str, value: Parameter) -> list[str]:
    items = [value] if isinstance(value, str | int | float) else list(value)
    texts = [str(item).lower() if isinstance(item, bool) else str(item) for item in items]
    _typed(name, texts)
    return texts


def _typed(name: str, values: Sequence[str]) -> Any:
    kind = _TYPES.get(name)
    if kind is None:
        raise InputError(f"Ollama has no parameter {name!r}", remedy=f"use one of {', '.join(sorted(_TYPES))}")
    if kind is str:
        return list(values)
    try:
        return _BOOLS[values[-1].lower()] if kind is bool else kind(values[-1])
    except (KeyError, ValueError, IndexError):
        raise InputError(f"PARAMETER {name} must be {kind.__name__}, not {', '.join(values)!r}") from None


def read_modelfile(path: Path) -> Modelfile:
    """Parse a Modelfile; InputError names the file and the line that Ollama would refuse."""
    try:
        return parse_modelfile(read_utf8(path))
    except InputError as error:
        if str(path) in error.message:
            raise
        raise InputError(f"{path}: {error.message}", evidence=error.evidence, remedy=error.remedy) from None
