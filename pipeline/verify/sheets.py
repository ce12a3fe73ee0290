"""Held-out rows and their answers as the report shows them: calls and thoughts apart from the text, documents in short."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.answers import THOUGHT
from pipeline.report.schema import Example
from pipeline.verify.material import Material
from pipeline.verify.score import CUT, Answer, HeldOut, call_key, parse, said, same

_EXAMPLES = 12
# characters shown of each document
_DOCUMENT = 200


def examples(material: Material, answered: Mapping[str, Sequence[Answer]]) -> list[Example]:
    """Some rows with every answer: first those that any backend (name -> answers) gets wrong, then the others."""
    rows = material.rows

    def trouble(i: int) -> int:
        return -sum(not same(rows[i], answers[i], _expected(rows[i])) for answers in answered.values())

    wrong_first = sorted(range(len(rows)), key=trouble)
    chosen = sorted({*wrong_first[: _EXAMPLES // 3], *range(_EXAMPLES - _EXAMPLES // 3)} & set(range(len(rows))))
    return [
        Example(
            prompt=asked(rows[i]),
            expected=told(rows[i], _expected(rows[i])),
            base=_cut_marked(rows[i], material.base[i]),
            tuned=told(rows[i], material.tuned[i]),
            answers={name: told(rows[i], answers[i]) for name, answers in answered.items()},
        )
        for i in chosen
    ]


def _cut_marked(row: HeldOut, answer: Answer | None) -> str | None:
    """What the base said (None: it was not asked), with a mark where it was not asked to go on."""
    if answer is None:
        return None
    return f"{answer.text} …" if answer.finish_reason == CUT else told(row, answer)


def _expected(row: HeldOut) -> Answer:
    return Answer(row.answer, "stop", row.calls, said(row, Answer(row.expected, "stop")).thought)


def told(row: HeldOut, answer: Answer) -> str:
    """An answer's text; where it calls, thinks or should, a JSON object: thought, answer (or its own fields), and each call.

    Calls are in one order and spacing, so that answers that say the same look the same.
    """
    text, calls, thought = said(row, answer)
    if not (calls or thought or row.calls or row.thinks):
        return text
    fields: dict[str, Any] = {THOUGHT: thought} if thought else {}
    if text.strip():
        fields |= parse(text) or {"answer": text.strip()}
    for number, (name, arguments) in enumerate(json.loads(key) for key in sorted(map(call_key, calls))):
        fields[f"call {number + 1}"] = f"{name} {json.dumps(arguments, ensure_ascii=False)}"
    return json.dumps(fields, ensure_ascii=False) if fields else text


def asked(row: HeldOut) -> str:
    """What was asked: the last user message, the names of the tools offered, the beginning of each document."""
    parts = [row.prompt]
    if row.tools:
        parts.append("Tools: " + ", ".join(str(tool.get("function", tool).get("name")) for tool in row.tools))
    for number, document in enumerate(row.documents or (), 1):
        text = str(document.get("text") or json.dumps(document, ensure_ascii=False))
        named = document.get("title") or document.get("doc_id") or number
        parts.append(f"Document {named}: {text[:_DOCUMENT]}{'…' if len(text) > _DOCUMENT else ''}")
    return "\n\n".join(parts)
