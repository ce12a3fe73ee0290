"""The shapes that users' rows have, trained for a step on bases with the published templates: what is left is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from pipeline.errors import DataError
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.verify.score import HeldOut, read_held_out
from training.parameters import FinetuneParameters
from training.tuning.finetune import finetune

CASES = Path(__file__).parents[4] / "shared/cases"
VERSIONS = ["embedded", "3.3", "4.0", "4.1"]
# each base costs a start of the converter; 3.3 and 4.1 write calls and documents differently
OLD_AND_NEW = [pytest.param(v, marks=() if v in ("3.3", "4.1") else pytest.mark.wide) for v in VERSIONS]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CASES.is_dir() or not tiny.TEMPLATES.is_dir(), reason="the cases are not beside the project"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {version: tiny.published_base(version, tmp_path_factory.mktemp("base")) for version in VERSIONS}


def _train(base: Path, output: Path, name: str, **parameters: Any) -> tuple[list[HeldOut], dict[str, str]]:
    """Held-out rows and the fate of each key after one step."""
    run = RunFolder("case", output)
    given = {"base": str(base), "data": str(CASES / name), "eval_share": 0.3, "max_steps": 1, "trainer": "hf", "rank": 2}
    finetune(run, FinetuneParameters(**given | parameters))
    account = Manifest(run.manifest).require_training().account
    return read_held_out(run.heldout), {row["what"]: row["became"] for row in account["table"]}


@pytest.mark.parametrize("version", OLD_AND_NEW)
def test_calls_are_trained_and_expected(bases: dict[str, Path], tmp_path: Path, version: str) -> None:
    rows, fates = _train(bases[version], tmp_path, "xlam.jsonl")
    assert all(row.calls and row.tools for row in rows)
    assert rows[0].expected.startswith("<|tool_call|>[" if version == "3.3" else "<tool_call>")
    assert (fates["tools"], fates["id"]) == ("used", "harmless")


@pytest.mark.parametrize("version", OLD_AND_NEW)
def test_documents_are_trained_and_held_out(bases: dict[str, Path], tmp_path: Path, version: str) -> None:
    rows, fates = _train(bases[version], tmp_path, "documents.jsonl")
    assert all(row.documents and "closed" in row.documents[0]["text"] for row in rows)
    assert fates["documents"] == "used"
    assert ("documents[].title" in fates) == (version == "3.3")


@pytest.mark.parametrize("version", OLD_AND_NEW)
def test_thoughts_stay_as_they_were_written(bases: dict[str, Path], tmp_path: Path, version: str) -> None:
    rows, _ = _train(bases[version], tmp_path, "think_inline.jsonl")
    assert all(row.expected.startswith("<think>\nadd one\n</think>") for row in rows)
    assert all("<think>\ndouble" in str(row.messages[1]["content"]) for row in rows)


def test_weights_and_choices(bases: dict[str, Path], tmp_path: Path) -> None:
    rows, fates = _train(bases["4.1"], tmp_path / "weight", "openai_weight.jsonl")
    assert rows[0].messages[1] == {"role": "assistant", "content": "WRONG-DO-NOT-LEARN"}
    assert fates["messages[].weight"] == "used"
    _, fates = _train(bases["4.1"], tmp_path / "greeting", "assistant_first.jsonl", greeting="keep")
    assert fates["greeting kept without loss"] == "on request"
    _, fates = _train(bases["4.1"], tmp_path / "bad", "one_bad_of_many.jsonl", skip_bad=True)
    assert fates["rows"] == "refused"
    _, fates = _train(bases["4.1"], tmp_path / "chosen", "messages_rejected.jsonl", ignore="chosen,rejected")
    assert fates["rejected"] == "ignored"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("messages_rejected.jsonl", "--ignore chosen --ignore rejected"),
        ("assistant_first.jsonl", "--greeting keep"),
        ("one_bad_of_many.jsonl", "one_bad_of_many.jsonl:18"),
        ("semicolon_cp1252.csv", "it looks like cp1252"),
        ("function_call_with_text.jsonl", "where this base writes calls alone"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_loaded(
    bases: dict[str, Path], tmp_path: Path, name: str, said: str
) -> None:
    with pytest.raises(DataError) as caught:
        _train(bases["3.3"], tmp_path, name)
    assert said in str(caught.value)
    assert not (tmp_path / "case" / "adapter").exists()


def test_the_account_is_in_the_manifest(bases: dict[str, Path], tmp_path: Path) -> None:
    _train(bases["4.1"], tmp_path, "one_bad_of_many.jsonl", skip_bad=True)
    account = json.loads((tmp_path / "case" / "manifest.json").read_text())["stages"]["finetune"]["result"]["account"]
    assert (account["refused"], account["refusals"][0][1]) == (1, "turn 2 (assistant) is empty")
