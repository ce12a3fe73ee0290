from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pipeline.errors import DiskFull, InputError
from pipeline.runs.files import read_json, require_free_space, staged, tree_bytes, write_atomic, write_json
from pipeline.runs.hashes import sha256_file, sha256_tree


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"granite")
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"granite").hexdigest()


def test_tree_hash_sees_content_and_names_but_not_times(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("same")
    os.utime(tmp_path / "one" / "x", (1, 1))
    assert sha256_tree(tmp_path / "one") == sha256_tree(tmp_path / "two")
    (tmp_path / "two" / "x").rename(tmp_path / "two" / "y")
    assert sha256_tree(tmp_path / "one") != sha256_tree(tmp_path / "two")


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_staged_replaces_a_folder_whole(tmp_path: Path) -> None:
    final = tmp_path / "out"
    final.mkdir()
    (final / "old").touch()
    with staged(final) as target:
        target.mkdir()
        (target / "new").touch()
        assert (final / "old").exists()
    assert [p.name for p in final.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [final]


def test_staged_keeps_the_old_one_when_stopped_between_its_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, rename = tmp_path / "model", Path.rename
    final.mkdir()
    (final / "old").write_text("1")

    def stopped(path: Path, target: Path) -> Path:
        if target == final and path.name == final.name:  # the new one takes its name
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt), staged(final) as target:
        target.mkdir()
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["model", "model/old"]


def test_staged_keeps_the_old_one_on_failure(tmp_path: Path) -> None:
    final = tmp_path / "out"
    final.write_text("old")
    with pytest.raises(IsADirectoryError), staged(final) as target:
        target.write_text("half")
        tmp_path.write_text("fails")
    assert final.read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_no_space_is_said_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=r"the merged model needs 1048576\.00 GiB in .*, only [\d.]+ GiB are free"):
        require_free_space(tmp_path / "not" / "yet", 2**50, "the merged model")


def test_broken_json_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{\n"a": 1,\n}')
    with pytest.raises(InputError, match=rf"{path}:3: not valid JSON"):
        read_json(path)


def test_json_round_trip_and_size(tmp_path: Path) -> None:
    write_json(tmp_path / "d" / "a.json", {"ä": 1})
    assert read_json(tmp_path / "d" / "a.json") == {"ä": 1}
    assert tree_bytes(tmp_path) == tree_bytes(tmp_path / "d" / "a.json") == len('{\n  "ä": 1\n}\n'.encode())


@pytest.mark.parametrize(("umask", "file", "program"), [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755), (0o002, 0o664, 0o775)])
def test_what_appears_whole_has_the_permissions_the_umask_says(umask: int, file: int, program: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with staged(tmp_path / "model") as target:
            target.mkdir()
            for name, mode in (
                ("weights", 0o600),
                ("open", 0o666),
                ("program", 0o711),
            ):  # as safetensors, and as compilers leave them
                (target / name).write_text("x")
                (target / name).chmod(mode)
        write_atomic(tmp_path / "note", "x")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (*(tmp_path / "model").iterdir(), tmp_path / "note")}
    assert modes == {"weights": file, "open": file, "program": program, "note": file}
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~umask
