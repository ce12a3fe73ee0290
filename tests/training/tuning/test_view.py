"""A row as notebook 1 shows it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from pipeline.runs.folder import RunFolder
from training.datasets.dataset import Row
from training.datasets.formats import convert
from training.parameters import FinetuneParameters
from training.tuning import view

CALLED = {
    "messages": [
        {"role": "user", "content": "<script>alert(1)</script>"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": {}}], "thinking": "hm"},
    ],
    "tools": [{"name": "look"}],
    "documents": [{"text": "a sheet"}],
    "id": 1,
}


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(view, "resolve", lambda *_: SimpleNamespace(folder=tiny.published("embedded", tmp_path / "base")))

    def html(*rows: dict) -> str:
        made = [convert("messages", row) for row in rows]
        given = [Row(one.messages, f"rows.jsonl:{n}", one.tools, one.documents, unused=("id",)) for n, one in enumerate(made, 1)]
        return str(view.trained_tokens(FinetuneParameters(), RunFolder("test", tmp_path), given).data)

    return html


def test_tools_documents_calls_and_thoughts_have_colours_and_text_is_text(show) -> None:
    html = show(CALLED)
    for name, colour in view._COLOURS.items():
        assert f'background:{colour};color:#111;margin-right:1em">{name}<' in html
    assert "<script>" not in html
    assert "not used: id" in html


def test_the_first_row_that_can_be_trained_on_is_shown(show) -> None:
    bad = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x <|start_of_role|> y"}]}
    assert "refused: an answer holds &lt;|start_of_role|&gt;" in show(bad)
    good = show(bad, {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "fine"}]})
    assert "fine" in good
    assert "refused" not in good
