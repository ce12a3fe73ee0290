from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import _bare_force, app
from pipeline.doctor.runs import list_runs, removals, remove_listed
from pipeline.errors import InputError
from pipeline.runs import lock
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest


def _run(output: Path, name: str, *stages: str, passed: bool | None = None) -> RunFolder:
    run = RunFolder(name, output)
    run.path.mkdir(parents=True)
    for stage in stages:
        Manifest(run.manifest).record(stage, {}, [], {}, 1)
    if passed is not None:
        run.report.mkdir()
        (run.report / "report.json").write_text(json.dumps({"passed": passed}))
    return run


@pytest.fixture
def output(tmp_path: Path) -> Path:
    done = _run(tmp_path, "done", "finetune", "merge", "gguf", "evaluate_tuned", passed=True)
    (done.checkpoints / "checkpoint-9").mkdir(parents=True)
    (done.path / ".adapter.abcd1234").mkdir()
    (done.path / ".adapter.abcd1234" / "w").write_text("12345")
    _run(tmp_path, "failed", "finetune", "merge", "gguf", "evaluate_tuned", passed=False)
    _run(tmp_path, "half", "finetune", "merge")
    training = _run(tmp_path, "training")
    for name in ("checkpoint-50", "checkpoint-100", "damaged-checkpoint-150"):
        (training.checkpoints / name).mkdir(parents=True)
    (training.checkpoints / "inputs.json").write_text("{}")
    broken = _run(tmp_path, "broken")
    broken.manifest.write_text("{")
    empty = _run(tmp_path, "empty")
    empty.checkpoints.mkdir()
    (empty.checkpoints / "inputs.json").write_text("{}")
    (tmp_path / "source" / "report").mkdir(parents=True)
    (tmp_path / "source" / "code.py").write_text("1")
    (tmp_path / "source" / "lock.json").write_text('{"dependencies": {}}')
    (tmp_path / ".base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "done")
    return tmp_path


def test_states(output: Path) -> None:
    assert {info.name: info.state for info in list_runs(output)} == {
        "broken": "damaged",
        "done": "verified",
        "empty": "empty",
        "failed": "failed verification",
        "half": "merged",
        "training": "training, checkpoint of step 100",
    }


def test_a_held_run_says_by_whom_and_is_left_alone(output: Path) -> None:
    with lock.held(RunFolder("training", output), "train"):
        info = next(info for info in list_runs(output) if info.name == "training")
        assert info.holder is not None
        assert info.holder.startswith("train, process ")
        assert removals(output, ["training"], whole=True) == []


def test_an_owner_on_another_machine_is_shown_with_its_last_sign_and_free_without_one(output: Path) -> None:
    run = RunFolder("training", output)
    with lock.held(run, "train"):
        record = json.loads((run.path / "lock.json").read_text())
    record["owners"][0] |= {"host": "node-b", "boot": "its own"}
    (run.path / "lock.json").write_text(json.dumps(record))
    for silent in (4, 61):
        (run.path / ".lock").touch()
        then = (run.path / ".lock").stat().st_mtime - silent
        os.utime(run.path / "lock.json", (then, then))
        holder = next(info.holder for info in list_runs(output) if info.name == "training")
        if silent == 4:
            assert re.search(r" on node-b, since .*, renewed \d+ s ago$", str(holder))
        else:
            assert holder is None
        assert bool(removals(output, ["training"], whole=True)) == (silent == 61)


def _paths(output: Path, **options: bool) -> list[str]:
    return [str(item.path.relative_to(output)) for item in removals(output, **options)]


def test_by_default_only_what_no_run_needs(output: Path) -> None:
    assert _paths(output) == ["done/.adapter.abcd1234", "done/checkpoints", "training/checkpoints/damaged-checkpoint-150"]


def test_unfinished_runs_are_added_when_asked_for(output: Path) -> None:
    assert _paths(output, unfinished=True) == [
        "done/.adapter.abcd1234", "done/checkpoints", "empty", "half", "training",
    ]  # fmt: skip


def test_a_run_with_an_unreadable_manifest_goes_only_by_name(output: Path) -> None:
    assert _paths(output, unfinished=True).count("broken") == 0
    assert [item.path for item in removals(output, ["broken"], whole=True)] == [output / "broken"]


def test_what_was_finished_since_it_was_listed_is_kept(output: Path) -> None:
    listed = [item for item in removals(output, unfinished=True) if item.run == "half"]
    half = RunFolder("half", output)
    Manifest(half.manifest).record("evaluate_tuned", {}, [], {}, 1)
    assert remove_listed(half, listed, unfinished=True) == 0
    assert "evaluate_tuned" in Manifest(half.manifest).data["stages"]


def test_whole_runs_only_by_name(output: Path) -> None:
    with pytest.raises(InputError, match="only removed by name"):
        removals(output, whole=True)
    assert [str(i.path) for i in removals(output, ["done"], whole=True)] == [str(output / "done")]
    with pytest.raises(InputError, match="no run 'link'"):
        removals(output, ["link"], whole=True)


def _cli(*words: str) -> tuple[int, str, BaseException | None]:
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, result.stdout, result.exception


def test_nothing_is_removed_without_a_yes(output: Path) -> None:
    _, _, error = _cli("prune", "--output", str(output))
    assert isinstance(error, InputError)
    assert "add --yes" in error.remedy
    assert (output / "done" / "checkpoints").exists()


def test_with_a_yes_it_is(output: Path) -> None:
    code, said, _ = _cli("prune", "half", "--whole", "--yes", "--json", "--output", str(output))
    assert (code, json.loads(said)["removed"]) == (0, True)
    assert not (output / "half").exists()
    assert _cli("prune", "--yes", "--output", str(output))[0] == 0
    assert sorted(p.name for p in (output / "done").iterdir()) == [".lock", "manifest.json", "report"]
    assert _paths(output) == []


def test_runs_as_json(output: Path) -> None:
    code, said, _ = _cli("runs", "--json", "--output", str(output))
    found = {info["name"]: info for info in json.loads(said)["runs"]}
    assert code == 0
    assert (found["done"]["state"], found["done"]["finished"], found["half"]["finished"]) == ("verified", True, False)
    assert found["training"]["holder"] is None


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["run", "--force"], ["run", "--force=all"]),
        (["run", "--force", "--name", "x"], ["run", "--force=all", "--name", "x"]),
        (["run", "--force", "gguf"], ["run", "--force", "gguf"]),
        (["run", "--force=gguf"], ["run", "--force=gguf"]),
    ],
)
def test_force_without_a_stage_means_all(words: list[str], meant: list[str]) -> None:
    assert _bare_force(words) == meant


def test_an_earlier_trainings_checkpoints_go_once_a_later_one_is_finished(output: Path) -> None:
    for name in ("half", "training"):
        (output / name / "checkpoints-of-other-inputs").mkdir()
    assert [removal.run for removal in removals(output) if removal.path.name == "checkpoints-of-other-inputs"] == ["half"]
