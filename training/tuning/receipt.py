"""The receipt of a row: every text its author wrote stands in the prompt, or the row is refused.

A chat template drops what it has no place for - calls, documents, thoughts - without a word.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from pipeline.errors import DataError

_Object = Mapping[str, Any]
_Objects = Sequence[_Object]
# what of documents a template may leave out; it is then told as not used
_BESIDE_TEXT = ("doc_id", "title", "source", "url", "id", "score", "author", "date")


class Chat(NamedTuple):
    """What a chat template is given."""

    messages: _Objects
    tools: _Objects | None = None
    documents: _Objects | None = None


@dataclass(frozen=True)
class Piece:
    """A text that has to stand in the prompt: what it is, and the number of its turn (0: of none).

    ``optional`` pieces - titles of documents, names of speakers - are told as not used instead.
    """

    what: str
    text: str
    turn: int = 0
    optional: bool = False


def unused(chat: Chat, prompt: str, render: Callable[[Chat], str]) -> tuple[str, ...]:
    """What of a row its prompt does not hold and may do without, such as ``documents[].title``.

    Raises DataError for any other piece that is missing. Each is looked for in ``prompt``, and once more in the prompt that ``render``
    makes with every text replaced by a mark of its own, so that a text is not found by chance.
    """
    pieces, marks = list[Piece](), list[Piece]()
    _mapped(chat, lambda piece: pieces.append(piece) or piece.text)  # type: ignore[func-returns-value]

    def mark(piece: Piece) -> str:
        marks.append(Piece(piece.what, f"Qx{len(marks):05}xQ", piece.turn, piece.optional))
        return marks[-1].text

    marked = render(_mapped(chat, mark))
    missing = [*_missing(pieces, pieces, prompt), *_missing(marks, pieces, marked)]
    for piece in missing:
        if not piece.optional:
            remedy = "use a base whose chat template writes it, or take it out of the row"
            key = piece.what.partition("[")[0]
            if key in ("tools", "documents"):
                remedy = f"use a base whose chat template takes {key}, or leave them out: --ignore {key}"
            raise DataError(f"the chat template does not write {piece.what} ({piece.text[:60]!r})", remedy=remedy)
    return tuple(sorted({piece.what for piece in missing}))


def _missing(looked_for: Sequence[Piece], told: Sequence[Piece], prompt: str) -> list[Piece]:
    """Those of ``told`` whose counterpart in ``looked_for`` a prompt lacks; turns have to come in their order."""
    missing, begin, ends, turn = [], 0, [0], 0
    for piece, name in zip(looked_for, told, strict=True):
        if piece.turn != turn:
            turn, begin, ends = piece.turn, max([begin, *ends]), [0]
        at = [prompt.find(text, begin if turn else 0) for text in _written(piece.text)]
        found = [place for place in at if place >= 0]
        if not found and (place := prompt.find(piece.text.strip(), begin if turn else 0)) >= 0:
            found = [place]
            missing.append(Piece("white space around texts", "", optional=True))
        if found and turn:
            ends.append(min(found))
        if not found:
            missing.append(name)
    return missing


def _written(text: str) -> list[str]:
    """The ways in which a template may write a text: as it is, or inside JSON."""
    return [text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]]


def _mapped(chat: Chat, visit: Callable[[Piece], str]) -> Chat:
    """A conversation with what ``visit`` makes of each of its texts in their places, turn by turn."""
    tools = [_tool(tool, visit) for tool in chat.tools or ()]
    documents = [_document(document, visit) for document in chat.documents or ()]
    messages = [_message(message, number, visit) for number, message in enumerate(chat.messages, 1)]
    return Chat(messages, tools or None, documents or None)


def _message(message: _Object, turn: int, visit: Callable[[Piece], str]) -> dict[str, Any]:
    made, role = dict(message), message["role"]
    if message.get("name") and role != "tool":
        made["name"] = visit(Piece("messages[].name", str(message["name"]), turn, optional=True))
    for key, what in (("reasoning_content", "thought"), ("content", "text")):
        if message.get(key):
            made[key] = visit(Piece(f"the {what} of turn {turn} ({role})", message[key], turn))
    if message.get("tool_calls"):
        made["tool_calls"] = [_call(call, turn, visit) for call in message["tool_calls"]]
    return made


def _call(call: _Object, turn: int, visit: Callable[[Piece], str]) -> dict[str, Any]:
    function = call["function"]
    name, what = function["name"], f"a call of turn {turn}"
    arguments = _leaves(function["arguments"], lambda text: visit(Piece(f"an argument of {what} ({name})", text, turn)))
    return {**call, "function": {**function, "name": visit(Piece(f"the name of {what}", name, turn)), "arguments": arguments}}


def _leaves(value: Any, visit: Callable[[str], str]) -> Any:
    """A JSON value with what ``visit`` makes of each key, text and number; an empty text says nothing."""
    if isinstance(value, Mapping):
        return {visit(key): _leaves(inner, visit) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_leaves(inner, visit) for inner in value]
    text = value if isinstance(value, str) else json.dumps(value)
    return visit(text) if text else value


def _tool(tool: _Object, visit: Callable[[Piece], str]) -> dict[str, Any]:
    function = dict(tool["function"])
    function["name"] = visit(Piece("tools[].name", function["name"]))
    if function.get("description"):
        function["description"] = visit(Piece("tools[].description", str(function["description"]), optional=True))
    if function.get("parameters"):
        function["parameters"] = _schema(
            function["parameters"], lambda text: visit(Piece("tools[].parameters", text, optional=True))
        )
    return {**tool, "function": function}


def _schema(schema: Any, visit: Callable[[str], str]) -> Any:
    """A JSON schema with what ``visit`` makes of the names of its properties and of its texts; words of the schema itself stay."""
    if isinstance(schema, Mapping):
        made = {}
        for key, value in schema.items():
            if key == "properties" and isinstance(value, Mapping):
                made[key] = {visit(name): _schema(inner, visit) for name, inner in value.items()}
            else:
                made[key] = value if key == "type" else _schema(value, visit)
        return made
    if isinstance(schema, list | tuple):
        return [_schema(inner, visit) for inner in schema]
    return visit(schema) if isinstance(schema, str) and schema else schema


def _document(document: _Object, visit: Callable[[Piece], str]) -> dict[str, Any]:
    made = dict(document)
    for key, value in document.items():
        optional = key != "text" and ("text" in document or key in _BESIDE_TEXT)
        if value is not None:
            made[key] = _values(value, partial(_visit_as, visit, f"documents[].{key}", optional))
    return made


def _visit_as(visit: Callable[[Piece], str], what: str, optional: bool, text: str) -> str:
    return visit(Piece(what, text, optional=optional))


def _values(value: Any, visit: Callable[[str], str]) -> Any:
    """A JSON value with what ``visit`` makes of each text and number in it; keys stay, for templates ask for them."""
    if isinstance(value, Mapping):
        return {key: _values(inner, visit) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_values(inner, visit) for inner in value]
    text = value if isinstance(value, str) else json.dumps(value)
    return visit(text) if text else value
