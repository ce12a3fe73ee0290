"""The shapes that users' rows have, each read, prepared for every published template, and kept whole or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from pipeline.errors import PipelineError
from training.datasets.dataset import read, require_clean
from training.parameters import reading
from training.tuning.prepare import Preparer, held_out_line
from training.tuning.view import shown

CASES = Path(__file__).parents[4] / "shared/cases"
VERSIONS = ["embedded", "3.3", "4.0", "4.1"]
GRANITE_4 = ["embedded", "4.0", "4.1"]
CALL = '<tool_call>\n{"name": "room_temp", "arguments": {"room": "0"}}\n</tool_call>'
OLD_CALL = '<|tool_call|>[{"name": "room_temp", "arguments": {"room": "0"}}]'
END = "<|end_of_text|>"

pytestmark = pytest.mark.skipif(not CASES.is_dir() or not tiny.TEMPLATES.is_dir(), reason="the cases are not beside the project")


@pytest.fixture(scope="module")
def preparers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Preparer]:
    return {version: Preparer(tiny.published(version, tmp_path_factory.mktemp("base"))) for version in VERSIONS}


def _seen(preparer: Preparer, name: str, **options: Any) -> list[dict[str, object]]:
    dataset = read(CASES / name, reading=reading(**options))
    require_clean(dataset)
    return [shown(preparer.tried(row)) for row in dataset.rows]


@pytest.mark.parametrize(
    ("name", "options", "versions", "trained"),
    [
        ("parallel_calls.jsonl", {}, GRANITE_4, [f"{CALL}\n{CALL.replace('0', '1')}{END}", f"20 and 21.{END}"]),
        ("parallel_calls.jsonl", {}, ["3.3"], [f"{OLD_CALL[:-1]}, {OLD_CALL[14:].replace('0', '1')}{END}", f"20 and 21.{END}"]),
        ("think_inline.jsonl", {}, VERSIONS, [f"<think>\ndouble 0\n</think>\n\n0{END}", f"<think>\nadd one\n</think>\n\n1{END}"]),
        ("openai_weight.jsonl", {}, VERSIONS, [f"Order 0 left the depot.{END}"]),
        ("documents.jsonl", {}, VERSIONS, [f"Sheet 0 says closed.{END}"]),
        ("function_call_with_text.jsonl", {}, GRANITE_4, [f"Let me look.\n{CALL}{END}"]),
        ("llamafactory_tools.json", {}, GRANITE_4, [f"{CALL}{END}", f"Room 0 has 19 degrees.{END}"]),
        ("llamafactory_tools.json", {}, ["3.3"], [f"{OLD_CALL}{END}", f"Room 0 has 19 degrees.{END}"]),
        ("xlam.jsonl", {}, GRANITE_4, [f"{CALL}{END}"]),
        ("xlam.jsonl", {}, ["3.3"], [f"{OLD_CALL}{END}"]),
        ("tool_result_object.jsonl", {}, GRANITE_4, [f"{CALL}{END}", f"20.{END}"]),
        ("assistant_first.jsonl", {"greeting": "keep"}, VERSIONS, [f"Badge 0 will be replaced today.{END}"]),
        ("assistant_first.jsonl", {"greeting": "drop"}, VERSIONS, [f"Badge 0 will be replaced today.{END}"]),
        ("messages_rejected.jsonl", {"ignore": ("chosen", "rejected")}, VERSIONS, [f"Dunno.{END}"]),
        ("dolly.jsonl", {}, VERSIONS, [f"Pump replaced.{END}"]),
        ("question_answer.jsonl", {}, VERSIONS, [f"Shelf 0.{END}"]),
        ("question_answer.jsonl", {"columns": "prompt=question,completion=answer"}, VERSIONS, [f"Shelf 0.{END}"]),
        ("text_only.jsonl", {}, VERSIONS, [f"Shelf 0.{END}"]),
        ("nan.jsonl", {}, VERSIONS, [f"a0{END}"]),
        ("wrapped.json", {}, VERSIONS, [f"Shelf.{END}"]),
    ],
)
def test_what_is_trained_is_what_was_written(
    preparers: dict[str, Preparer], name: str, options: dict[str, Any], versions: list[str], trained: list[str]
) -> None:
    for version in versions:
        assert _seen(preparers[version], name, **options)[0]["trained"] == trained, version


def test_documents_and_tools_and_results_are_in_the_prompt(preparers: dict[str, Preparer]) -> None:
    for version in VERSIONS:
        assert "The hall is closed." in str(_seen(preparers[version], "documents.jsonl")[0]["text"]), version
        for name in ("llamafactory_tools.json", "xlam.jsonl", "parallel_calls.jsonl", "tool_result_object.jsonl"):
            assert "Temperature of a room" in str(_seen(preparers[version], name)[0]["text"]), (version, name)
        assert '{"celsius": 20}' in str(_seen(preparers[version], "tool_result_object.jsonl")[0]["text"])
    assert _seen(preparers["3.3"], "documents.jsonl")[0]["unused"] == ["documents[].title"]


def test_a_greeting_is_kept_or_dropped(preparers: dict[str, Preparer]) -> None:
    for version in VERSIONS:
        kept, dropped = (_seen(preparers[version], "assistant_first.jsonl", greeting=how)[0] for how in ("keep", "drop"))
        assert ("help desk" in str(kept["text"]), "help desk" in str(dropped["text"])) == (True, False)


def test_text_before_a_call_is_refused_where_the_base_writes_calls_alone(preparers: dict[str, Preparer]) -> None:
    for seen in _seen(preparers["3.3"], "function_call_with_text.jsonl"):
        assert seen["refused"] == "'Let me look.' stands before a call, where this base writes calls alone"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("messages_rejected.jsonl", "--ignore chosen --ignore rejected"),
        ("assistant_first.jsonl", "--greeting keep"),
        ("one_bad_of_many.jsonl", "--skip-bad"),
        ("semicolon_cp1252.csv", "cp1252"),
    ],
)
def test_what_is_refused_says_how_to_go_on(name: str, said: str) -> None:
    with pytest.raises(PipelineError) as caught:
        require_clean(read(CASES / name))
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 8


def test_one_bad_row_is_named_and_the_others_can_be_used(preparers: dict[str, Preparer]) -> None:
    dataset = read(CASES / "one_bad_of_many.jsonl")
    assert [one.where.rsplit(":", 1)[1] for one in dataset.refused] == ["18"]
    assert len(preparers["4.0"].prepare(dataset.rows, 512).examples) == len(dataset.rows) == 23


def test_a_held_out_line_says_what_is_expected(preparers: dict[str, Preparer]) -> None:
    def line(version: str, name: str) -> dict[str, object]:
        preparer = preparers[version]
        clean = preparer.clean(read(CASES / name).rows[0])
        made: dict[str, object] = json.loads(held_out_line(clean, preparer.example(clean), preparer))
        return made

    called = line("4.0", "xlam.jsonl")
    assert (called["expected"], set(called)) == (CALL, {"messages", "tools", "expected"})
    assert line("3.3", "xlam.jsonl")["messages"][-1] == {"role": "assistant", "content": OLD_CALL}  # type: ignore[index]
    assert set(line("4.0", "documents.jsonl")) == {"messages", "documents"}
    assert [m.get("weight") for m in line("4.1", "openai_weight.jsonl")["messages"]] == [None] * 4  # type: ignore[attr-defined]
