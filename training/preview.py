"""Show which tokens of a row are trained, for notebooks."""

from __future__ import annotations

from html import escape
from typing import Any

from pipeline.runs import RunFolder
from training.base import resolve
from training.data import Row
from training.parameters import FinetuneParameters
from training.prepare import IGNORED, Preparer


def trained_tokens(params: FinetuneParameters, run: RunFolder, row: Row) -> Any:
    """The row as the model sees it, token by token; tokens that carry loss are marked."""
    from IPython.display import HTML

    preparer = Preparer(resolve(params.base, run.output / ".base", params.revision).folder)
    example = preparer.example(preparer.clean(row))
    pieces = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        text = escape(preparer.tokenizer.decode([token], skip_special_tokens=False)).replace("\n", "↵<br>")
        style = "background:#b7e4c7" if label != IGNORED else "background:#eee"
        pieces.append(f'<span style="{style};color:#111;border-right:1px solid #fff">{text}</span>')
    return HTML(f'<div style="font-family:monospace;line-height:1.9">{"".join(pieces)}</div>')
