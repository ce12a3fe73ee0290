from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.errors import InputError, RunLocked
from pipeline.runs import lock
from pipeline.runs.folder import RunFolder

_HOLD = """
import sys, time
from pathlib import Path
from pipeline.runs import lock
from pipeline.runs.folder import RunFolder
with lock.held(RunFolder("test", Path(sys.argv[1])), "train"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def _holder(run: RunFolder, seconds: float = 60, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _HOLD, str(run.output), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout
    process.stdout.close()


def _record(run: RunFolder, *owners: lock.Process, token: str = "t") -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    since = datetime.now(UTC).isoformat(timespec="seconds")
    record = lock.Holder("train", since, token, owners)
    (run.path / "lock.json").write_text(json.dumps(asdict(record)))


def test_a_held_run_names_its_owner_and_a_killed_owner_is_taken_over(run: RunFolder) -> None:
    other = _holder(run)
    try:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match="run test is in use") as caught, lock.held(run, "export"):
            pass
        assert f"held by: train, process {other.pid} on " in caught.value.evidence
        assert caught.value.exit_code == 3
    finally:
        _end(other)
    with lock.held(run, "export"):
        there = lock.holder(run)
        assert there is not None
        assert (there.verb, there.owners[0].pid) == ("export", os.getpid())
    assert lock.holder(run) is None


def test_a_pid_that_is_used_again_is_not_the_owner(run: RunFolder) -> None:
    me = lock.Process.me()
    _record(run, replace(me, started=me.started - 3600))
    with lock.held(run, "export"):
        pass
    # a record of an older version says nothing of namespaces
    _record(run, replace(me, started=me.started - 3600, namespace=""))
    with lock.held(run, "export"):
        pass


@pytest.mark.parametrize(
    "broken", ["", "{", "[]", '{"owners": []}', '{"verb": "x", "since": "never", "token": "", "owners": [{}]}']
)
def test_a_damaged_record_locks_no_one_out(broken: str, run: RunFolder) -> None:
    run.path.mkdir()
    (run.path / "lock.json").write_text(broken)
    with lock.held(run, "train"):
        assert lock.holder(run) is not None


def test_entering_again_joins_and_leaves_in_order(run: RunFolder) -> None:
    with lock.held(run, "run"):
        with lock.held(run, "train"):
            there = lock.holder(run)
            assert there is not None
            assert (there.verb, len(there.owners)) == ("run", 1)
        assert lock.holder(run) is not None
    assert lock.holder(run) is None
    assert lock.VARIABLE not in os.environ


def test_a_process_started_by_the_holder_joins(run: RunFolder) -> None:
    with lock.held(run, "run"):
        child = _holder(run, seconds=0)
        assert child.stdout
        assert child.stdout.readline() == "held\n"
        assert child.wait() == 0
        child.stdout.close()
        assert lock.holder(run) is not None
    assert lock.holder(run) is None


def test_scratch_of_a_killed_writer_is_removed_when_the_run_is_taken(run: RunFolder) -> None:
    scratch = run.path / ".merged_fp16.abcd1234"
    (scratch / "previous").mkdir(parents=True)
    (scratch / "previous" / "weights").write_text("old")
    (run.path / ".manifest.json.x1y2z3_4").write_text("half")
    (run.path / ".keep").write_text("no scratch")
    with lock.held(run, "export"):
        assert sorted(p.name for p in run.path.iterdir()) == [".keep", ".lock", "lock.json", "merged_fp16"]
    assert (run.merged / "weights").read_text() == "old"


def test_of_many_that_find_a_stale_lock_one_takes_it(run: RunFolder) -> None:
    me = lock.Process.me()
    _record(run, replace(me, started=me.started - 3600))
    others = [_holder(run, seconds=3) for _ in range(4)]
    said = [other.communicate()[0] for other in others]
    assert sorted(other.returncode for other in others) == [0, 1, 1, 1]
    assert sorted(said) == ["", "", "", "held\n"]


def test_two_names_do_not_wait_for_each_other(tmp_path: Path) -> None:
    with lock.held(RunFolder("a", tmp_path), "train"), lock.held(RunFolder("b", tmp_path), "train"):
        assert lock.holder(RunFolder("a", tmp_path)) is not None


@pytest.mark.parametrize("part", ["", "adapter", "merged_fp16", "manifest.json", "logs", "checkpoints"])
def test_a_link_that_leads_out_of_the_output_folder_is_refused(part: str, run: RunFolder, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    link = run.path / part if part else run.path
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside)
    with pytest.raises(InputError, match="is a symbolic link"), lock.held(run, "train"):
        pass
    assert list(outside.iterdir()) == []


def test_a_record_of_ours_that_could_not_be_removed_does_not_lock_us_out(run: RunFolder) -> None:
    _record(run, lock.Process.me(), lock.Process.me())
    with lock.held(run, "train"):
        there = lock.holder(run)
        assert there is not None
        assert len(there.owners) == 1
    assert lock.holder(run) is None


def test_threads_of_one_process_share_the_lock(run: RunFolder) -> None:
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            with lock.held(run, "verify"):
                pass
        except BaseException as error:
            errors.append(error)

    with lock.held(run, "run"):
        threads = [threading.Thread(target=enter) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert lock.holder(run) is None
