"""A run is a folder: copied, moved or renamed, with or without its base and data, it is the same run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import certified
import pytest

from pipeline.config import Settings
from pipeline.doctor.runs import list_runs
from pipeline.errors import ModelError
from pipeline.runs.files import write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_json
from pipeline.runs.manifest import Manifest, sealed
from pipeline.serve.artefacts import of_file
from pipeline.verify.verify import verify
from training.certify.offline import certify_offline
from training.export import evaluate, gguf, merge
from training.parameters import FinetuneParameters, content
from training.tuning.finetune import finetune

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A small run with its base and data beside it, served and questioned by llama.cpp."""
    run = certified.make(tmp_path_factory.mktemp("moved") / "project")
    verify(run, ["llamacpp"], Settings())
    return run


@pytest.fixture
def project(verified: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the whole project, free to be moved about."""
    return RunFolder(verified.name, Path(shutil.copytree(verified.output.parent, tmp_path / "project")) / "output")


def _checks(run: RunFolder) -> dict[str, str]:
    return {check.id: check.status for check in certify_offline(run).checks}


def _exported_again(run: RunFolder) -> list[bool]:
    done = [merge.merge(run), gguf.export_gguf(run), gguf.package(run), *evaluate.evaluate(run).values()]
    return [stage.skipped for stage in done]


def _as_written_before(run: RunFolder, first: RunFolder) -> None:
    """A copy's manifest as releases wrote it that knew absolute paths only: those of the first run."""
    data = json.loads(run.manifest.read_text())
    trained, launched = data["stages"]["finetune"], data["served"]["llamacpp"]
    del trained["inputs"]["beside"]
    trained["key"] = sha256_json(trained["inputs"])
    launched["argv"] = [word.replace("./", f"{first.path}/") if word.startswith("./") else word for word in launched["argv"]]
    assert str(first.gguf) in launched["argv"]
    for group, name in ((data["stages"], "finetune"), (data["served"], "llamacpp")):
        group[name] = sealed({key: value for key, value in group[name].items() if key != "seal"})
    write_json(run.manifest, data)


def test_what_was_started_is_recorded_relative_to_the_run(verified: RunFolder) -> None:
    assert "./unsloth.Q8_0.gguf" in (Manifest(verified.manifest).served["llamacpp"].argv or ())
    for path in (verified.manifest, verified.evidence, verified.report_file):
        assert f"{verified.path}/" not in path.read_text(), path


@pytest.mark.parametrize("old_manifest", [False, True])
def test_a_copy_under_another_name_is_certified_while_the_first_is_still_there(
    verified: RunFolder, tmp_path: Path, old_manifest: bool
) -> None:
    copied = RunFolder("another.name", tmp_path / "disk")
    shutil.copytree(verified.path, copied.path)
    if old_manifest:
        _as_written_before(copied, verified)
    certificate = certify_offline(copied)
    assert [check.id for check in certificate.broken] == []
    assert certificate.run == "another.name"
    # base and data are still where they were
    assert {check.id for check in certificate.checks if check.status == "skipped"} == set()
    assert [(info.name, info.state) for info in list_runs(copied.output)] == [
        ("another.name", list_runs(verified.output)[0].state)
    ]
    served = of_file(copied.gguf)
    assert served is not None and (served.run, served.fine_tune) == ("another.name", of_file(verified.gguf).fine_tune)  # type: ignore[union-attr]
    assert all(_exported_again(copied))


def test_a_model_that_is_not_the_run_s_is_still_caught_in_a_copy(verified: RunFolder, tmp_path: Path) -> None:
    copied = RunFolder("copied", tmp_path)
    shutil.copytree(verified.path, copied.path)
    data = json.loads(copied.manifest.read_text())
    foreign = {**{key: value for key, value in data["served"]["llamacpp"].items() if key != "seal"}, "sha256": "0" * 64}
    data["served"]["llamacpp"] = sealed(foreign)
    write_json(copied.manifest, data)
    assert _checks(copied)["custody.launch"] == "failed"


def test_a_project_that_was_moved_whole_finds_its_base_and_data_beside_it(project: RunFolder, tmp_path: Path) -> None:
    moved = RunFolder(project.name, Path(shutil.move(project.output.parent, tmp_path / "elsewhere")) / "output")
    # the first project's files are another training's by now
    parameters = json.loads(moved.manifest.read_text())["stages"]["finetune"]["inputs"]["parameters"]
    changed = Path(parameters["data"])
    before = changed.read_text()
    try:
        changed.write_text(before + before)
        checks = _checks(moved)
    finally:
        changed.write_text(before)
    assert (checks["custody.base"], checks["custody.dataset"], checks["custody.launch"]) == ("passed",) * 3
    assert all(_exported_again(moved))


def test_base_and_data_elsewhere_and_checkpoints_more_often_are_the_same_training(project: RunFolder) -> None:
    folder = project.output.parent
    before = Manifest(project.manifest).require_training()
    params = FinetuneParameters(**before.parameters)
    moved = replace(
        params,
        base=str((folder / "base").rename(folder / "renamed base")),
        data=str((folder / "train.jsonl").rename(folder / "rows.jsonl")),
        eval_data=str((folder / "held_out.jsonl").rename(folder / "never seen.jsonl")),
        save_steps=3,
    )
    assert finetune(project, moved).skipped
    after = Manifest(project.manifest).require_training()
    assert (after.parameters["base"], after.parameters["save_steps"]) == (str(folder / "renamed base"), 3)
    assert all(_exported_again(project))
    assert set(_checks(project).values()) == {"passed"}
    assert not finetune(project, replace(moved, seed=8)).skipped


def test_an_edited_record_is_not_made_good_by_a_move(project: RunFolder) -> None:
    params = FinetuneParameters(**Manifest(project.manifest).require_training().parameters)
    data = json.loads(project.manifest.read_text())
    data["stages"]["finetune"]["inputs"]["parameters"]["seed"] = 8
    write_json(project.manifest, data)
    assert not Manifest(project.manifest).holds(
        Manifest(project.manifest).stage("finetune"),
        {**data["stages"]["finetune"]["inputs"], "parameters": {**params.to_json(), "seed": 8, "save_steps": 3}},
        content,
    )


def test_a_run_without_its_base_is_exported_already_and_says_what_it_lacks_to_do_it_again(
    project: RunFolder, tmp_path: Path
) -> None:
    alone = RunFolder("alone", tmp_path / "machine")
    shutil.copytree(project.path, alone.path)
    trained = Manifest(alone.manifest)
    gone = {**trained.stages["finetune"].inputs}
    gone["parameters"] = {**gone["parameters"], "base": str(tmp_path / "gone"), "data": str(tmp_path / "gone.jsonl")}
    trained.restate("finetune", gone | {"beside": {}})
    assert all(_exported_again(alone))
    found = _checks(alone)
    assert "failed" not in found.values() and found["custody.base"] == found["custody.dataset"] == "skipped"
    with pytest.raises(ModelError) as caught:
        merge.merge(alone, force=True)
    assert "train --name alone --base FOLDER" in str(caught.value)


def test_the_output_folder_may_be_a_link_relative_or_end_with_a_slash(
    project: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(project.output, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    for output in ("link", "link/", "project/output/", "./project/../link"):
        run = RunFolder(project.name, Path(output))
        assert set(_checks(run).values()) == {"passed"}, output
        assert all(_exported_again(run)), output


def test_an_export_without_a_terminal_prints_lines_and_no_bars(project: RunFolder) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    command = [sys.executable, "-m", "pipeline", "export", "--name", project.name, "--output", str(project.output)]
    done = subprocess.run([*command, "--force", "evaluate"], capture_output=True, env=environment, timeout=300, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert b"evaluate_tuned: done" in said
    assert not [word for word in (b"\r", b"it/s", b"s/it", b"Loading weights", b"Tensorflow", b"Unsloth") if word in said], said
