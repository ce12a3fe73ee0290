from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import InputError, RunLocked
from pipeline.report.check import Check
from pipeline.runs.folder import RunFolder
from pipeline.verify.outcome import Kept, Outcome
from pipeline.verify.score import Answer
from pipeline.verify.verify import publish


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


def test_what_was_kept_goes_once_the_report_is_written(run: RunFolder) -> None:
    report = json.loads((Path(__file__).parents[1] / "sample_report.json").read_text())
    Kept(run, "key").write("vllm", _outcome())
    with pytest.raises(InputError):
        publish(run, {"schema": 1})
    assert Kept(run, "key").read("vllm") == _outcome()
    publish(run, report)
    assert sorted(p.name for p in run.report.iterdir()) == ["junit.xml", "report.html", "report.json"]


def test_no_report_is_written_into_a_run_that_another_process_holds(run: RunFolder) -> None:
    command = "import sys; from pathlib import Path; from pipeline.runs.folder import RunFolder; from pipeline.runs import lock\n"
    command += "with lock.held(RunFolder(sys.argv[1], Path(sys.argv[2])), 'train'): print(flush=True); sys.stdin.read()"
    arguments = [sys.executable, "-c", command, run.name, str(run.output)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RunLocked):
            publish(run, json.loads((Path(__file__).parents[1] / "sample_report.json").read_text()))
    assert not run.report.exists()
