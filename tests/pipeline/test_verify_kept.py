from __future__ import annotations

import json

import pytest

from pipeline.checks import Check
from pipeline.outcome import Outcome
from pipeline.runs import RunFolder
from pipeline.score import Answer
from pipeline.verify_kept import Kept


def _outcome(status: str = "passed") -> Outcome:
    checks = [Check("vllm.chat", "passed", "answered 3 characters")]
    return Outcome({"name": "vllm", "status": status, "exact": 0.5}, checks, [Answer("yes", "stop")])


def test_a_backend_that_passed_is_not_asked_again(run: RunFolder) -> None:
    Kept(run, "key").write("vllm", _outcome())
    assert Kept(run, "key").read("vllm") == _outcome()


def test_another_verification_asks_again(run: RunFolder) -> None:
    Kept(run, "key").write("vllm", _outcome())
    assert Kept(run, "other").read("vllm") is None
    assert Kept(run, "key").read("llamacpp") is None


@pytest.mark.parametrize("status", ["failed", "skipped"])
def test_what_did_not_pass_deserves_a_second_try(status: str, run: RunFolder) -> None:
    Kept(run, "key").write("vllm", _outcome(status))
    assert Kept(run, "key").read("vllm") is None


@pytest.mark.parametrize("broken", ["", "[]", "{}", json.dumps({"key": "key", "entry": {"name": "llamacpp"}})])
def test_a_damaged_note_is_no_note(broken: str, run: RunFolder) -> None:
    run.report.mkdir(parents=True)
    (run.report / "vllm.part").write_text(broken)
    assert Kept(run, "key").read("vllm") is None


def test_a_complete_verification_leaves_nothing(run: RunFolder) -> None:
    kept = Kept(run, "key")
    kept.write("vllm", _outcome())
    (run.report / "report.json").write_text("{}")
    kept.clear()
    assert [p.name for p in run.report.iterdir()] == ["report.json"]
