from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from pipeline.runs import hashes
from pipeline.runs.hashes import HashCache, sha256_file, sha256_tree


def _settle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns()
    monkeypatch.setattr(hashes.time, "time_ns", lambda: now + 10_000_000_000)


def test_a_settled_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "w").write_text("weights")
    _settle(folder, monkeypatch)
    assert HashCache(tmp_path).tree(folder) == sha256_tree(folder)
    read: list[Path] = []
    monkeypatch.setattr(hashes, "sha256_file", lambda path: read.append(path) or "")
    HashCache(tmp_path).tree(folder)
    assert read == []


def test_a_file_that_just_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w"
    path.write_text("weights")
    HashCache(tmp_path).tree(path)
    read: list[Path] = []
    monkeypatch.setattr(hashes, "sha256_file", lambda path: read.append(path) or "x")
    assert HashCache(tmp_path).tree(path) == "x"
    assert read == [path]


def test_a_change_is_seen_even_when_size_and_time_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w"
    path.write_text("weights")
    before = path.stat()
    _settle(path, monkeypatch)
    first = HashCache(tmp_path).tree(path)
    time.sleep(0.02)
    path.write_text("WEIGHTS")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert HashCache(tmp_path).tree(path) == sha256_file(path) != first


@pytest.mark.parametrize("broken", ["", "[]", '{"x": 1}', "\x00"])
def test_a_damaged_cache_only_costs_time(broken: str, tmp_path: Path) -> None:
    (tmp_path / ".hashes.json").write_text(broken)
    path = tmp_path / "w"
    path.write_text("weights")
    assert HashCache(tmp_path).tree(path) == sha256_file(path)


def test_what_is_gone_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    _settle(tmp_path, monkeypatch)
    HashCache(tmp_path).tree(tmp_path / "a")
    (tmp_path / "a").unlink()
    HashCache(tmp_path).tree(tmp_path / "b")
    assert list(json.loads((tmp_path / ".hashes.json").read_text())) == [str(tmp_path / "b")]


def test_of_a_folder_that_cannot_be_written_hashes_are_kept_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "w").write_text("weights")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "writable", lambda folder: False)  # root, as which tests may run, writes everywhere
    _settle(tmp_path, monkeypatch)
    digest = HashCache(tmp_path / "run").tree(tmp_path / "run" / "w")
    assert not (tmp_path / "run" / ".hashes.json").exists()
    monkeypatch.setattr(hashes, "sha256_file", lambda path: "read again")
    assert HashCache(tmp_path / "run").tree(tmp_path / "run" / "w") == digest


def test_another_machines_device_number_of_a_shared_folder_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w"
    path.write_text("weights")
    _settle(tmp_path, monkeypatch)
    digest = HashCache(tmp_path).tree(path)
    real = Path.stat

    def elsewhere(self: Path, **options: bool) -> os.stat_result:
        seen = real(self, **options)
        named = {name: getattr(seen, name) for name in dir(seen) if name.startswith("st_")}
        return os.stat_result((*seen[:2], seen.st_dev + 1, *seen[3:]), named)

    monkeypatch.setattr(Path, "stat", elsewhere)
    assert path.stat().st_dev != os.stat(path).st_dev  # noqa: PTH116
    monkeypatch.setattr(hashes, "sha256_file", lambda path: "read again")
    assert HashCache(tmp_path).tree(path) == digest
