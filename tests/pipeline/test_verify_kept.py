from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.checks import Check
from pipeline.runs import RunFolder
from pipeline.score import Answer
from pipeline.verify_kept import Kept

_CHECKS, _ANSWERS = [Check("vllm.chat", "passed", "answered 3 characters")], [Answer("yes", "stop")]


def _entry(status: str = "passed") -> dict[str, Any]:
    return {"name": "vllm", "status": status, "exact": 0.5}


def test_a_backend_that_passed_is_not_asked_again(run: RunFolder) -> None:
    Kept(run, "key").write("vllm", _entry(), _CHECKS, _ANSWERS)
    found = Kept(run, "key").read("vllm")
    assert found is not None
    assert found["entry"] == _entry()
    assert [Check(**c) for c in found["checks"]] == _CHECKS
    assert [Answer(**a) for a in found["answers"]] == _ANSWERS


def test_another_verification_asks_again(run: RunFolder) -> None:
    Kept(run, "key").write("vllm", _entry(), _CHECKS, _ANSWERS)
    assert Kept(run, "other").read("vllm") is None
    assert Kept(run, "key").read("llamacpp") is None


@pytest.mark.parametrize("status", ["failed", "skipped"])
def test_what_did_not_pass_deserves_a_second_try(status: str, run: RunFolder) -> None:
    Kept(run, "key").write("vllm", _entry(status), _CHECKS, _ANSWERS)
    assert Kept(run, "key").read("vllm") is None


@pytest.mark.parametrize("broken", ["", "[]", "{}", json.dumps({"key": "key", "entry": {"name": "llamacpp"}})])
def test_a_damaged_note_is_no_note(broken: str, run: RunFolder) -> None:
    run.report.mkdir(parents=True)
    (run.report / "vllm.part").write_text(broken)
    assert Kept(run, "key").read("vllm") is None


def test_a_complete_verification_leaves_nothing(run: RunFolder) -> None:
    kept = Kept(run, "key")
    kept.write("vllm", _entry(), _CHECKS, _ANSWERS)
    (run.report / "report.json").write_text("{}")
    kept.clear()
    assert [p.name for p in run.report.iterdir()] == ["report.json"]
