from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import NOBODY, as_nobody

from pipeline.errors import InputError
from pipeline.runs import folder
from pipeline.runs.folder import RunFolder


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-x", "a b", ".base", "x" * 65, "a\n"])
def test_names_that_could_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="is not usable"):
        RunFolder(name)


def test_documented_paths() -> None:
    run = RunFolder("generic", Path("training/output"))
    assert [str(p) for p in (run.adapter, run.merged, run.gguf, run.modelfile, run.manifest)] == [
        "training/output/generic/adapter",
        "training/output/generic/merged_fp16",
        "training/output/generic/unsloth.Q8_0.gguf",
        "training/output/generic/Modelfile",
        "training/output/generic/manifest.json",
    ]


@pytest.mark.parametrize("name", ["certificate", "servers", "reference", "manifest.json", "unsloth.Q8_0.gguf"])
def test_a_part_of_a_run_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    run = RunFolder("t", tmp_path / "out")
    run.path.mkdir(parents=True)
    run.require_inside()
    (run.path / name).symlink_to(tmp_path)
    with pytest.raises(InputError, match=f"{name} is a symbolic link"):
        run.require_inside()


# what libraries ask of a home folder, and what is left of ours
ASKED = """
import getpass, json, os, sys
from pathlib import Path
from pipeline.runs import folder
folder.writable_home()
home = Path.home()
(home / "probe").write_text("x")
kept = folder.cache_folder() / "kept"
kept.parent.mkdir(parents=True, exist_ok=True)
kept.write_text("x")
hub, old = os.environ.get("HF_HUB_CACHE"), os.environ.get("GRANITE_PIPELINE_OLD_HUB_CACHE")
asked = {"home": str(home), "user": getpass.getuser(), "caches": os.environ.get("XDG_CACHE_HOME"), "hub": hub, "old": old}
print(json.dumps(asked))
"""


@pytest.fixture
def open_tmp() -> Iterator[Path]:
    """A temporary folder that other users reach; pytest's own they do not."""
    made = Path(tempfile.mkdtemp(prefix="places-"))
    made.chmod(0o755)
    (made / "tmp").mkdir()
    (made / "tmp").chmod(0o1777)
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("home", [None, "/", "/nonexistent", "relative", "closed"])
def test_a_user_without_a_usable_home_or_name_gets_a_temporary_one(home: str | None, open_tmp: Path) -> None:
    (open_tmp / "closed").mkdir(mode=0o755)
    env = {"TMPDIR": str(open_tmp / "tmp")} | ({} if home is None else {"HOME": home.replace("closed", f"{open_tmp}/closed")})
    done = as_nobody("-c", ASKED, cwd=open_tmp, **env)
    assert done.returncode == 0, done.stderr
    given = f"{open_tmp}/tmp/granite-pipeline-{NOBODY}"
    assert json.loads(done.stdout) == {"home": given, "user": f"uid-{NOBODY}", "caches": None, "hub": None, "old": None}
    assert done.stderr.count("\n") == 1 and done.stderr.endswith(f"caches and settings of libraries go to {given}\n")
    assert (open_tmp / "tmp" / f"granite-pipeline-{NOBODY}").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("own", [False, True])
def test_the_hubs_cache_below_a_home_that_cannot_be_written_stays_in_reach(own: bool, open_tmp: Path) -> None:
    hub = open_tmp / ".cache" / "huggingface" / "hub"
    hub.mkdir(parents=True)
    if own:
        os.chown(hub, NOBODY, NOBODY)
    done = as_nobody("-c", ASKED, cwd=open_tmp, HOME=str(open_tmp), TMPDIR=str(open_tmp / "tmp"))
    found, kept = json.loads(done.stdout), str(open_tmp / ".cache" / "huggingface" / "hub")
    # downloads go to the temporary one
    assert (found["hub"], found["old"]) == ((kept, None) if own else (None, kept)), done.stderr


def test_a_cache_folder_that_belongs_to_root_is_not_used_though_the_home_is_ones_own(open_tmp: Path) -> None:
    """As Docker leaves it where a volume is mounted below it."""
    home = open_tmp / "home"
    (home / ".cache" / "huggingface" / "hub").mkdir(parents=True)
    os.chown(home, NOBODY, NOBODY)
    done = as_nobody("-c", ASKED, cwd=open_tmp, HOME=str(home), TMPDIR=str(open_tmp / "tmp"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["home"], found["hub"], found["old"]) == (str(home), None, str(home / ".cache" / "huggingface" / "hub"))
    assert found["caches"].startswith(str(open_tmp / "tmp"))


@pytest.mark.parametrize("kind", ["folder", "file", "link to nothing"])
def test_what_someone_else_laid_in_the_temporary_folder_s_place_is_not_used(kind: str, open_tmp: Path) -> None:
    there = open_tmp / "tmp" / f"granite-pipeline-{NOBODY}"
    if kind == "folder":
        there.mkdir(mode=0o777)
    elif kind == "file":
        there.touch()
    else:
        there.symlink_to("/nowhere/at/all")
    done = as_nobody("-c", ASKED, cwd=open_tmp, TMPDIR=str(open_tmp / "tmp"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["home"].startswith(f"{open_tmp}/tmp/granite-pipeline-{NOBODY}-")


def test_a_usable_home_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    folder.writable_home()
    assert {name: value for name, value in os.environ.items() if name != "USER"} == {
        name: value for name, value in before.items() if name != "USER"
    }
    assert caplog.messages == []


@pytest.mark.parametrize("home", [None, "/"])
@pytest.mark.parametrize(
    "words",
    [
        ["doctor", "--json"],
        ["plan", "--engine", "llamacpp", "--model-shape", "granite-4.0-350m", "--check"],
        ["plan", "--engine", "ollama", "--model-shape", "granite-4.0-350m", "--json"],
        ["config"],
        ["runs"],
    ],
)
def test_verbs_work_without_a_home_a_name_or_a_folder_to_write(words: list[str], home: str | None, open_tmp: Path) -> None:
    env = {"TMPDIR": str(open_tmp / "tmp")} | ({} if home is None else {"HOME": home})
    done = as_nobody("-m", "pipeline", *words, cwd=open_tmp, **env)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == (3 if words[0] == "doctor" and "fail" in done.stdout else 0), done.stderr
    assert "getpwuid" not in done.stdout and "could not be made" not in done.stdout


def test_a_file_in_the_place_of_the_temporary_folder_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder.tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"granite-pipeline-{os.getuid()}").write_text("somebody's")
    folder._temporary.cache_clear()
    found = folder._temporary()
    folder._temporary.cache_clear()
    assert found.is_dir() and found.parent == tmp_path
