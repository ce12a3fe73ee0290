from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import InputError, Interrupted, PipelineError
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.runs.stages import forced, run_stage


@pytest.mark.parametrize(
    ("force", "name", "expected"),
    [
        (True, "merge", True),
        (False, "merge", False),
        ("", "merge", False),
        ("all", "merge", True),
        ("merge", "merge", True),
        ("merge", "gguf", False),
        ("finetune, gguf", "gguf", True),
        ("export", "evaluate_base", True),
        ("export", "finetune", False),
        ("evaluate", "evaluate_tuned", True),
    ],
)
def test_force_names_stages(force: bool | str, name: str, expected: bool) -> None:
    assert forced(force, name) is expected


def test_a_name_that_is_no_stage_is_refused() -> None:
    with pytest.raises(InputError, match="no stage 'mrege' to force"):
        forced("mrege", "merge")


def _stage(run: RunFolder, calls: list[str], force: bool | str = False, text: str = "made") -> Any:
    def work() -> dict[str, Any]:
        calls.append("work")
        run.modelfile.write_text(text)
        return {"ok": True}

    return run_stage(run, "modelfile", {"recipe": 1}, [run.modelfile], work, force=force)


def test_a_stage_is_done_once_and_again_when_forced_or_damaged(run: RunFolder) -> None:
    calls: list[str] = []
    assert [_stage(run, calls).skipped, _stage(run, calls).skipped] == [False, True]
    assert not _stage(run, calls, force="modelfile").skipped
    assert _stage(run, calls, force="merge").skipped
    run.modelfile.write_text("edited")
    assert not _stage(run, calls).skipped
    assert len(calls) == 3


def test_a_failing_stage_is_not_recorded_and_its_log_says_why(run: RunFolder) -> None:
    def work() -> dict[str, Any]:
        raise PipelineError("the merge broke")

    with pytest.raises(PipelineError, match="the merge broke"):
        run_stage(run, "merge", {}, [], work)
    assert Manifest(run.manifest).stage("merge") is None
    (logged,) = run.logs.iterdir()
    assert "the merge broke" in logged.read_text()


def test_a_stage_that_was_asked_to_stop_is_kept_when_it_is_done(run: RunFolder) -> None:
    import os
    import signal

    def work() -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        run.modelfile.write_text("made")
        return {}

    with pytest.raises(Interrupted, match="modelfile is finished and kept"):
        run_stage(run, "modelfile", {}, [run.modelfile], work)
    assert run_stage(run, "modelfile", {}, [run.modelfile], work).skipped
