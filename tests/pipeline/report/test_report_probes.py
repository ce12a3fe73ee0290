"""What the report says of attacks, JSON schemas and tool calls."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.report.page import feature, injection, plain_client
from pipeline.report.schema import Backend, Feature, Injection, PlainClient, parse
from pipeline.report.write import render_html, summary_table


@pytest.fixture
def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(__file__).parents[1] / "sample_report.json").read_text(encoding="utf-8"))
    return found


def test_the_page_has_a_column_for_each(result: dict[str, Any]) -> None:
    text = re.sub(r"<[^>]*>", " ", render_html(result))
    for word in ("Raw control tokens", "JSON schema", "Tool calls", "work", "works", "not supported"):
        assert re.search(rf"\b{word}\b", text), word


def test_the_terminal_has_a_line_for_each_engine(result: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), width=300)
    console.print(summary_table(result))
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "vLLM: raw control tokens in user text WOULD WORK on this engine" in said
    assert "neutralised text stays text; JSON schema: works; tool calls: works" in said
    assert "tool calls: not supported" in said
    assert "Ollama: raw" not in said


def test_what_a_client_gets_that_names_no_settings_is_on_page_and_terminal(result: dict[str, Any]) -> None:
    page = re.sub(r"<[^>]*>", " ", render_html(result))
    assert "Plain client" in page
    assert re.search(r"\b87\.5\s%", page)
    assert re.search(r"68\.8\s%\s\(87\.5\s%\)", page)
    console = Console(file=io.StringIO(), width=1000)
    console.print(summary_table(result))
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "a client without sampling settings: exact 0.688 of 16 rows without sampling settings, 0.875 with" in said
    assert "send temperature 0 and top_p 1; the gateway fills it in" in said


@pytest.mark.parametrize(
    ("exact", "same", "cell"),
    [(0.875, 16, "87.5\u00a0%"), (0.875, 12, "87.5\u00a0% (87.5\u00a0%)"), (0.5, 9, "50\u00a0% (87.5\u00a0%)")],
)
def test_a_plain_client_in_a_cell(result: dict[str, Any], exact: float, same: int, cell: str) -> None:
    backend: Backend = parse(result).backends[0]
    found = PlainClient(rows=16, exact=exact, exact_greedy=0.875, same=same)
    assert plain_client(backend.model_copy(update={"plain_client": found})) == cell
    assert plain_client(backend.model_copy(update={"plain_client": None})) == "–"


def test_older_reports_have_none_of_it(result: dict[str, Any]) -> None:
    for entry in result["backends"]:
        for key in ("injection", "structured_output", "tool_calls", "plain_client"):
            entry.pop(key, None)
    assert all(backend.injection is None for backend in parse(result).backends)
    assert "Raw control tokens</th>" not in render_html(result)
    assert "Plain client</th>" not in render_html(result)


@pytest.mark.parametrize(("raw", "word"), [(True, "work"), (False, "stay text"), (None, "–")])
def test_injection_in_a_word(result: dict[str, Any], raw: bool | None, word: str) -> None:
    backend: Backend = parse(result).backends[0]
    assert injection(backend.model_copy(update={"injection": Injection(raw=raw)})) == word


@pytest.mark.parametrize(
    ("found", "word"),
    [("passed", "works"), ("failed", "fails"), ("not tested", "not tested"), ("not supported by this engine", "not supported")],
)
def test_a_feature_in_a_word(found: str, word: str) -> None:
    assert feature(Feature(result=found)) == word
    assert feature(None) == "–"
