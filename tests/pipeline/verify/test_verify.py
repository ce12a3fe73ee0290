"""An interrupted verification goes on where it was; a finished one is done again only when something asks for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Settings
from pipeline.errors import InputError, Interrupted, RunLocked, VerificationFailed
from pipeline.report.check import Check
from pipeline.report.schema import Result, parse
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.verify import verify as verifying
from pipeline.verify.assemble import Outcome, absent
from pipeline.verify.evidence import Evidence, Features, restored
from pipeline.verify.score import Answer

REPORT = Path(__file__).parents[1] / "sample_report.json"
Verify = Callable[..., dict[str, Any]]


def _evidence(name: str) -> Evidence:
    features = Features(
        (name,), Answer("yes", "stop"), (Check(f"{name}.injection", "passed", "stay text", data={"raw": False}),), ()
    )
    return Evidence(
        name, "1", "Q8_0", (0,), (Answer("a\u2028b", "stop"),), features=features, probes={3: {5: -0.5}}, process=(7, 1.5)
    )


@pytest.fixture
def asked() -> list[str]:
    """The backends that were asked."""
    return []


@pytest.fixture
def verify(run: RunFolder, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> Verify:
    """Verify with backends that pass unless they are named in ``failing``; ``stop`` interrupts before that backend."""
    run.path.mkdir(parents=True)
    report = parse(json.loads(REPORT.read_text(encoding="utf-8")))

    def verified(
        *names: str, failing: tuple[str, ...] = (), stop: str = "", made: Result = report, **given: Any
    ) -> dict[str, Any]:
        def backend(_: RunFolder, name: str, *__: Any, keep: bool) -> tuple[Outcome, Evidence | None]:
            if name == stop:
                raise Interrupted("stopped")
            asked.append(name)
            failed = absent(name, "failed", "no answer")
            return (failed, None) if name in failing else (judged(_evidence(name)), _evidence(name))

        def judged(evidence: Evidence, _: object = None) -> Outcome:
            return Outcome(report.backends[0].model_copy(update={"name": evidence.engine}), (), evidence.answers)

        monkeypatch.setattr(verifying, "_backend", backend)
        monkeypatch.setattr(verifying, "judged", judged)

        def assemble(_: object, __: object, outcomes: dict[str, Outcome]) -> Result:
            entries = [outcome.entry for outcome in outcomes.values()]
            ok = all(entry.status != "failed" for entry in entries)
            return made.model_copy(
                update={
                    "backends": entries,
                    "checks": [*made.checks, *(c for o in outcomes.values() for c in o.checks)],
                    "passed": ok,
                }
            )

        monkeypatch.setattr(verifying, "assemble", assemble)
        monkeypatch.setattr(verifying, "read_material", lambda *_: None)
        monkeypatch.setattr(verifying.backends, "find", lambda *_: None)
        return verifying.verify(run, names, Settings(), **given)

    return verified


def test_a_backend_that_passed_before_the_interruption_is_not_asked_again(
    verify: Verify, asked: list[str], run: RunFolder
) -> None:
    with pytest.raises(Interrupted):
        verify("vllm", "llamacpp", "ollama", failing=("llamacpp",), stop="ollama")
    verify("vllm", "llamacpp", "ollama")
    assert asked == ["vllm", "llamacpp", "llamacpp", "ollama"]
    assert sorted(p.name for p in run.report.iterdir()) == ["evidence.json", "junit.xml", "report.html", "report.json"]


def test_another_verification_asks_again(verify: Verify, asked: list[str]) -> None:
    with pytest.raises(Interrupted):
        verify("vllm", "ollama", stop="ollama")
    verify("vllm", limit=5)
    assert asked == ["vllm", "vllm"]


@pytest.mark.parametrize("broken", ["", "[]", "{}", '{"vllm": {"engine": "llamacpp"}}'])
def test_a_damaged_note_is_no_note(verify: Verify, asked: list[str], run: RunFolder, broken: str) -> None:
    with pytest.raises(Interrupted):
        verify("vllm", "ollama", stop="ollama")
    note = run.report / "verify.part"
    note.write_text(note.read_text().splitlines()[0] + "\n" + broken)
    verify("vllm")
    assert asked == ["vllm", "vllm"]


def test_what_was_kept_stays_until_the_report_is_written(verify: Verify, asked: list[str]) -> None:
    wrong = parse(json.loads(REPORT.read_text(encoding="utf-8"))).model_copy(update={"checks": [Check("x", "failed", "no")]})
    with pytest.raises(InputError):
        verify("vllm", made=wrong)
    verify("vllm")
    assert asked == ["vllm"]


def test_a_verification_that_passed_is_repeated_when_forced_changed_or_beside_a_server(
    verify: Verify, asked: list[str], run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify("vllm")["passed"] is verify("vllm")["passed"] is True
    assert asked == ["vllm"]
    verify("vllm", force="verify")
    run.gguf.write_text("another")
    verify("vllm")
    run.report_file.unlink()
    verify("vllm")
    assert len(asked) == 4
    run.evidence.write_text("{}")
    verify("vllm")
    assert len(asked) == 5


def test_no_report_is_written_into_a_run_that_another_process_holds(verify: Verify, run: RunFolder) -> None:
    command = "import sys; from pathlib import Path; from pipeline.runs.folder import RunFolder; from pipeline.runs import lock\n"
    command += "with lock.held(RunFolder(sys.argv[1], Path(sys.argv[2])), 'train'): print(flush=True); sys.stdin.read()"
    arguments = [sys.executable, "-c", command, run.name, str(run.output)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RunLocked):
            verify("vllm")
    assert not run.report.exists()


def test_backends_that_are_not_asked_keep_what_they_answered(verify: Verify, asked: list[str], run: RunFolder) -> None:
    verify("vllm", "llamacpp")
    verify("llamacpp", force=True)
    assert asked == ["vllm", "llamacpp", "llamacpp"]
    assert sorted(restored(json.loads(run.evidence.read_text()))) == ["llamacpp", "vllm"]
    assert sorted(Manifest(run.manifest).served) == ["llamacpp", "vllm"]
    verify("vllm", "llamacpp")  # both are there, and nothing has changed
    assert asked == ["vllm", "llamacpp", "llamacpp"]
    run.gguf.write_text("another")  # then the answers are those of another model
    verify("llamacpp", force=True)
    assert sorted(restored(json.loads(run.evidence.read_text()))) == ["llamacpp"]
    assert sorted(Manifest(run.manifest).served) == ["llamacpp"]


def test_a_backend_that_failed_and_is_not_asked_now_stays_failed(verify: Verify, asked: list[str], run: RunFolder) -> None:
    verify("vllm", "llamacpp", failing=("vllm",))
    report = verify("llamacpp")
    assert (report["passed"], {e["name"]: e["status"] for e in report["backends"]}) == (
        False,
        {"vllm": "failed", "llamacpp": "passed"},
    )
    stage = Manifest(run.manifest).stage("verify")
    assert stage is not None and stage.inputs["backends"] == ["llamacpp"]
    with pytest.raises(VerificationFailed, match="verification failed") as told:
        verifying.require_passed(report)
    assert "vllm.serving: no answer" in told.value.evidence
    assert "granite-pipeline verify --backends vllm" in told.value.remedy
    run.report_file.unlink()  # the manifest knows it too
    assert not verify("llamacpp")["passed"]
    asked.clear()
    assert verify("vllm", "llamacpp")["passed"]
    assert asked == ["vllm", "llamacpp"]
    verify("llamacpp")
    assert asked == ["vllm", "llamacpp"]
