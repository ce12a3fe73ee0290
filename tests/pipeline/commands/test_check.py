"""``check``: every byte is read, nothing is written, and what is wrong is named by its file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from places import as_nobody
from small_run import make_run, record_exports
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.commands import kubernetes
from pipeline.errors import InputError, VerificationFailed
from pipeline.runs.files import write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest, sealed
from pipeline.serve.artefacts import manifest_hash


@pytest.fixture
def made(tmp_path: Path) -> RunFolder:
    """A run of several files, big enough that a byte can be flipped in the middle of one."""
    run = make_run(RunFolder("mine", tmp_path / "runs"))
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json"):
        (run.merged / name).write_bytes(os.urandom(3 << 20))
    (run.merged / "nested").mkdir()
    (run.merged / "nested" / "more.json").write_text("{}")
    run.modelfile.write_text("FROM ./unsloth.Q8_0.gguf\n")
    record_exports(run)
    return run


def _hash(run: RunFolder) -> str:
    return manifest_hash(Manifest(run.manifest))


def _check(run: RunFolder, wanted: str, *words: str) -> Result:
    return CliRunner().invoke(app, ["check", "--run", run.name, "--output", str(run.output), "--manifest", wanted, *words])


def _flip(path: Path) -> None:
    """One bit of one byte in the middle; size and times stay as they were."""
    seen, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def _refused(run: RunFolder, wanted: str, *words: str) -> list[str]:
    error = _check(run, wanted, *words).exception
    assert isinstance(error, VerificationFailed)
    assert error.exit_code == 1
    return error.evidence.splitlines()


def test_a_run_as_it_was_recorded_passes_and_every_byte_was_read(made: RunFolder) -> None:
    done = _check(made, _hash(made), "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["checked"] == ["unsloth.Q8_0.gguf", "merged_fp16", "adapter", "Modelfile"]
    assert said["bytes"] == sum(
        p.stat().st_size for name in said["checked"] for p in [made.path / name, *(made.path / name).rglob("*")] if p.is_file()
    )
    assert said["differences"] == []


@pytest.mark.parametrize(
    "file",
    ["merged_fp16/model-00002-of-00002.safetensors", "merged_fp16/nested/more.json", "adapter/model.safetensors", "unsloth.Q8_0.gguf", "Modelfile"],
)  # fmt: skip
def test_one_flipped_byte_is_told_by_its_file_whatever_is_remembered(made: RunFolder, file: str) -> None:
    wanted = _hash(made)
    assert _check(made, wanted).exit_code == 0
    _flip(made.path / file)
    assert _refused(made, wanted) == [f"{file}: changed"]


def test_a_missing_file_and_one_that_was_added_are_told(made: RunFolder) -> None:
    wanted = _hash(made)
    (made.merged / "tokenizer.json").unlink()
    (made.merged / "modeling_granite.py").write_text("import os")
    found = _refused(made, wanted)
    assert found == ["merged_fp16/tokenizer.json: missing", "merged_fp16/modeling_granite.py: not recorded"]
    shutil.rmtree(made.merged)
    assert _refused(made, wanted, "--engine", "vllm") == ["merged_fp16: missing"]


def test_only_what_an_engine_serves_is_read(made: RunFolder) -> None:
    wanted = _hash(made)
    _flip(made.gguf)
    assert _check(made, wanted, "--engine", "vllm").exit_code == 0
    assert _refused(made, wanted, "--engine", "llamacpp") == ["unsloth.Q8_0.gguf: changed"]
    _flip(made.modelfile)
    assert _refused(made, wanted, "--engine", "ollama") == ["unsloth.Q8_0.gguf: changed", "Modelfile: changed"]


def test_the_hash_of_another_fine_tune_is_refused_before_anything_is_read(made: RunFolder, tmp_path: Path) -> None:
    other = make_run(RunFolder("other", tmp_path / "runs"), weights=b"others")
    found = _refused(made, _hash(other))
    assert found == [f"manifest.json: this run is fine-tune {_hash(made)}"]


def test_covering_the_tracks_in_the_manifest_makes_it_another_fine_tune(made: RunFolder) -> None:
    wanted = _hash(made)
    _flip(made.merged / "tokenizer.json")
    Manifest(made.manifest).record("merge", {}, [made.merged], {}, 1)
    assert _refused(made, wanted)[0].startswith("manifest.json: this run is fine-tune ")


def test_an_edited_record_and_a_gguf_of_other_weights_are_told(made: RunFolder) -> None:
    wanted, data = _hash(made), Manifest(made.manifest).data
    data["stages"]["gguf"]["inputs"]["merged"] = "0" * 64
    write_json(made.manifest, data)
    found = _refused(made, wanted, "--engine", "llamacpp")
    assert found == [
        "manifest.json: the record of it was edited",
        "unsloth.Q8_0.gguf: made from other weights than the merged ones",
    ]


def test_a_forged_list_of_files_hides_nothing(made: RunFolder) -> None:
    """The list only names files: what counts is the folder's own hash, which the manifest hash covers."""
    wanted, victim = _hash(made), made.merged / "tokenizer.json"
    _flip(victim)
    forged = Manifest(made.manifest).seal(made.merged).files
    data = Manifest(made.manifest).data
    data["stages"]["merge"]["artefacts"]["merged_fp16"]["files"] = dict(forged)
    write_json(made.manifest, data)
    assert "merged_fp16: changed (which of its files cannot be told)" in _refused(made, wanted)


def test_an_older_record_without_files_is_checked_as_a_whole(made: RunFolder) -> None:
    data = Manifest(made.manifest).data
    for name, record in data["stages"].items():
        for artefact in record["artefacts"].values():
            artefact.pop("files", None)
        data["stages"][name] = sealed({key: value for key, value in record.items() if key != "seal"})
    write_json(made.manifest, data)
    wanted = _hash(made)
    assert _check(made, wanted).exit_code == 0
    _flip(made.merged / "tokenizer.json")
    assert _refused(made, wanted) == ["merged_fp16: changed (which of its files cannot be told)"]


@pytest.mark.parametrize("wanted", ["", "abc", "A" * 64, "0" * 63, "0" * 65, "--manifest"])
def test_what_is_no_hash_is_bad_input(made: RunFolder, wanted: str) -> None:
    done = _check(made, wanted)
    assert isinstance(done.exception, InputError) or done.exit_code == 2


def test_a_run_that_is_none_or_was_never_merged_is_bad_input(made: RunFolder, tmp_path: Path) -> None:
    nowhere = RunFolder("nowhere", tmp_path / "runs")
    assert isinstance(_check(nowhere, "0" * 64).exception, InputError)
    young = RunFolder("young", tmp_path / "runs")
    young.adapter.mkdir(parents=True)
    (young.adapter / "w").write_text("w")
    Manifest(young.manifest).record("finetune", {}, [young.adapter], {}, 1)
    error = _check(young, "0" * 64).exception
    assert isinstance(error, InputError)
    assert error.remedy == "granite-pipeline export --run young"


def test_long_reading_is_told_line_by_line_where_there_is_no_terminal(made: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "_SECONDS", 0.0)
    done = _check(made, _hash(made))
    told = [line for line in done.stderr.splitlines() if line.startswith("read ")]
    assert len(told) >= 9
    assert "GiB, model-00001-of-00002.safetensors" in done.stderr


def test_a_user_without_a_name_checks_a_folder_that_nobody_may_write(made: RunFolder, tmp_path: Path) -> None:
    """As in the pod: a real process of another user, without a home; its exit code, and no new file anywhere."""
    place = Path(tempfile.mkdtemp(prefix="check-"))
    try:
        shutil.copytree(made.output, place / "runs")
        (place / "tmp").mkdir()
        (place / "tmp").chmod(0o777)
        there = RunFolder("mine", place / "runs")
        for path in (place, *place.rglob("*")):
            path.chmod(0o777 if path.name == "tmp" else 0o555 if path.is_dir() else 0o444)
        before = sorted(place.rglob("*"))

        def run(wanted: str) -> subprocess.CompletedProcess[str]:
            words = ["-m", "pipeline", "check", "--run", "mine", "--output", str(there.output), "--manifest", wanted]
            return as_nobody(*words, cwd=place, HOME="/nonexistent", TMPDIR=str(place / "tmp"), PYTHONDONTWRITEBYTECODE="1")

        good = run(_hash(made))
        assert good.returncode == 0, good.stderr
        assert "as recorded" in good.stderr
        wrong = run("0" * 64)
        assert (wrong.returncode, "this run is fine-tune" in wrong.stderr) == (1, True)
        _flip(there.merged / "tokenizer.json")
        flipped = run(_hash(made))
        assert (flipped.returncode, "merged_fp16/tokenizer.json: changed" in flipped.stderr) == (1, True)
        assert run("abc").returncode == 2
        assert [path for path in sorted(place.rglob("*")) if path not in before and path.is_file()] == []
    finally:
        shutil.rmtree(place)
