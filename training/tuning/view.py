"""Rows as the model sees them - the text, what of it is learned, what is not used - and the account of all of them."""

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from pipeline.model.toolcalls import CLOSE, OPEN
from pipeline.runs.folder import RunFolder
from training.base import resolve
from training.datasets.dataset import Dataset, Refusal, Row
from training.parameters import FinetuneParameters
from training.tuning.prepare import IGNORED, Prepared, Preparer, Tried

_REFUSALS = 50
_LEARNED, _PLAIN = "#b7e4c7", "#eeeeee"
# what a row brings beside its turns, in colours of its own, by the marks that Granite's templates put around it
_COLOURS = {"tools": "#cfe2ff", "documents": "#fff3cd", "calls": "#8ecae6", "thoughts": "#e0c3fc"}
_MARKS = {"<tools>": ("</tools>", "tools"), "<documents>": ("</documents>", "documents"), OPEN: (CLOSE, "thoughts")}
_MARKS |= {"<tool_call>": ("</tool_call>", "calls"), "<|tool_call|>": ("<|end_of_text|>", "calls")}
# Granite 3 gives tools and documents turns of their own
_MARKS |= {
    f"<|start_of_role|>{role}": ("<|end_of_text|>", name)
    for role, name in (("available_tools", "tools"), ("document ", "documents"))
}


def shown(one: Tried) -> dict[str, Any]:
    """A row's ``row`` (file:line), ``text``, ``trained`` parts, ``unused`` keys and ``neutralised`` texts.

    A row that cannot be trained on has ``refused``, the reason, and ``remedy`` instead of a text.
    """
    if isinstance(one.made, Refusal):
        return {"row": one.row.where, "refused": one.made.reason, "remedy": one.made.remedy}
    _, example = one.made
    seen = {"row": one.row.where, "text": example.text, "trained": example.trained, "unused": list(example.unused)}
    return {**seen, "neutralised": one.neutralised}


def trained_tokens(params: FinetuneParameters, run: RunFolder, rows: Sequence[Row]) -> Any:
    """The first row that can be trained on as the model sees it, token by token: what is learned, tools, documents, calls and thoughts
    in colours. Where there is none, why the first is refused.
    """
    from IPython.display import HTML

    preparer = Preparer(resolve(params.base, run.base_cache, params.revision).folder)
    tried = (preparer.tried(row) for row in rows)
    first = next(tried)
    made = (
        first.made
        if not isinstance(first.made, Refusal)
        else next((t.made for t in tried if isinstance(t.made, tuple)), first.made)
    )
    if isinstance(made, Refusal):
        return HTML(f"<p>refused: {escape(made.reason)}</p>")
    _, example = made
    offsets = preparer.tokenizer.encode(example.text, add_special_tokens=False).offsets
    kinds, pieces = _kinds(example.text), []
    for token, label, (start, _) in zip(example.input_ids, example.labels, offsets, strict=True):
        text = escape(preparer.tokenizer.decode([token], skip_special_tokens=False)).replace("\n", "↵<br>")
        kind = next((name for begin, end, name in kinds if begin <= start < end), "")
        colour = _COLOURS.get(kind, _PLAIN if label == IGNORED else _LEARNED)
        under = "transparent" if label == IGNORED else "#2d6a4f"
        style = f"background:{colour};border-bottom:3px solid {under};color:#111;border-right:1px solid #fff"
        pieces.append(f'<span style="{style}">{text}</span>')
    legend = {"learned": _LEARNED, **{name: colour for name, colour in _COLOURS.items() if any(name == k for _, _, k in kinds)}}
    keys = "".join(
        f'<span style="background:{colour};color:#111;margin-right:1em">{name}</span>' for name, colour in legend.items()
    )
    left_out = f"<p>not used: {escape(', '.join(example.unused))}</p>" if example.unused else ""
    return HTML(f'<p>{keys}</p><div style="font-family:monospace;line-height:2.1">{"".join(pieces)}</div>{left_out}')


def _kinds(text: str) -> list[tuple[int, int, str]]:
    """Where a prompt holds tools, documents, calls and thoughts: first character, the one after the last, and which."""
    found = []
    for mark, (end, name) in _MARKS.items():
        start = text.find(mark)
        while start >= 0:
            stop = text.find(end, start)
            # an end of turn is not the call's own
            stop = len(text) if stop < 0 else stop + (0 if end.startswith("<|") else len(end))
            found.append((start, stop, name))
            start = text.find(mark, stop)
    return found


def account(files: Sequence[Dataset], prepared: Sequence[Prepared] = ()) -> dict[str, Any]:
    """``table``: {"what", "became", "rows"} of each key and text; ``refused``: how many rows; ``refusals``: the first, with reasons."""
    counts: Counter[tuple[str, str]] = Counter()
    for dataset in files:
        counts.update({(key, fate): rows for key, fate, rows in dataset.keys})
    for one in prepared:
        for row, example in one.pairs:
            counts.update((key, "not in the prompt") for key in set(example.unused) - set(row.unused))
        counts["control tokens in texts", "neutralised"] += one.neutralised
        counts["rows longer than the maximum", "left out"] += len(one.too_long)
    refused = [one for dataset in files for one in dataset.refused] + [one for part in prepared for one in part.refused]
    counts["rows", "refused"] += len(refused)
    return {
        "table": [{"what": what, "became": fate, "rows": rows} for (what, fate), rows in counts.items() if rows],
        "refused": len(refused),
        "refusals": [[one.where, one.reason] for one in refused[:_REFUSALS]],
    }


def told(found: dict[str, Any]) -> list[str]:
    """An account as lines for a log: one for each fate, then each refusal that is known."""
    by_fate: dict[str, list[str]] = {}
    for row in found["table"]:
        by_fate.setdefault(row["became"], []).append(f"{row['what']} ({row['rows']})")
    refused = [f"refused: {where}: {reason}" for where, reason in found["refusals"]]
    return [*(f"{fate}: {', '.join(keys)}" for fate, keys in by_fate.items()), *refused]
