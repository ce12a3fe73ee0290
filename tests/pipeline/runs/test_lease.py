from __future__ import annotations

import json
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from machines import Machine, machine, require_machines

from pipeline.errors import Interrupted, LeaseLost, RunLocked
from pipeline.runs import lease, lock
from pipeline.runs.files import leftovers, staged, write_atomic
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_tree
from pipeline.runs.manifest import Manifest
from pipeline.runs.stages import Partial, run_stage

HOUR = 3600.0


def _record(run: RunFolder, token: str = "t", since: timedelta = timedelta(), **elsewhere: str | int) -> lock.Process:
    """A record of an owner that is, with ``elsewhere``, not this machine's."""
    run.path.mkdir(parents=True, exist_ok=True)
    owner = replace(lock.Process.me(), **elsewhere)
    there = lock.Holder("train", (datetime.now(UTC) + since).isoformat(timespec="seconds"), token, (owner,))
    (run.path / ".lock").touch()
    (run.path / "lock.json").write_text(there.to_json())
    return owner


def _silent(run: RunFolder, seconds: float) -> None:
    """The last sign of the owner is that long ago."""
    there = (run.path / ".lock").stat().st_mtime - seconds
    os.utime(run.path / "lock.json", (there, there))


ELSEWHERE = ({"host": "node-b"}, {"boot": "another machine's"}, {"namespace": "pid:[1]"}, {"host": "node-b", "pid": 2**22})


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_an_owner_that_cannot_be_asked_is_believed_while_it_gives_signs(elsewhere: dict[str, str], run: RunFolder) -> None:
    _record(run, **{"pid": 2**22 + 1, **elsewhere})
    _silent(run, 3)
    with pytest.raises(RunLocked) as caught, lock.held(run, "export"):
        pass
    assert re.search(r"renewed \d+ s ago$", caught.value.evidence)
    assert ("in another container or before a restart" in caught.value.evidence) == ("host" not in elsewhere)
    assert caught.value.remedy.endswith("it is taken over 60 s after the last sign of that machine")


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_one_without_a_sign_is_taken_over_and_swept(
    elsewhere: dict[str, str], run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "LEASE", 1.0)
    _record(run, **elsewhere)
    _silent(run, HOUR)
    (run.path / ".adapter.abcd1234").mkdir()
    (run.path / ".adapter.abcd1234" / "half").write_text("x" * 2**16)
    with caplog.at_level(logging.INFO), lock.held(run, "export"):
        there = lock.holder(run)
        assert there is not None
        assert (there.verb, len(there.owners), leftovers(run.path)) == ("export", 1, [])
    assert "looking whether it gives a sign" in caplog.text
    assert "taken over from train, process" in caplog.text
    assert "renewed 1.0 h ago, which is gone" in caplog.text


@pytest.mark.parametrize("hours", [-1, 1])
@pytest.mark.parametrize("silent", [3, HOUR])
def test_the_owners_clock_counts_for_nothing(hours: int, silent: float, run: RunFolder) -> None:
    """What it wrote from its clock is an hour wrong, what the file server stamped is not."""
    _record(run, since=timedelta(hours=hours), host="node-b")
    _silent(run, silent)
    there = lock.holder(run)
    assert there is not None
    assert there.alive == (silent < 60)
    assert re.search(r"renewed \d+ s ago" if silent == 3 else r"renewed 1\.0 h ago", there.describe())


class _Renewing:
    """Another machine's renewals, by a client that stamps files with its own clock, ``skew`` seconds from ours."""

    def __init__(self, run: RunFolder, skew: float, seconds: float) -> None:
        self.path, self.skew, self.seconds = run.path / "lock.json", skew, seconds
        self.thread = threading.Thread(target=self._renew)

    def _renew(self) -> None:
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            now = time.time() + self.skew
            os.utime(self.path, (now, now))
            time.sleep(0.1)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("skew", [-HOUR, HOUR])
@pytest.mark.parametrize("wait", [True, False])
def test_clocks_an_hour_apart_change_nothing_where_clients_stamp_the_files(
    skew: float, wait: bool, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE", 4.5)
    _record(run, host="node-b")
    begun = time.monotonic()
    with _Renewing(run, skew, seconds=2.5):
        time.sleep(0.3)
        if wait or skew < 0:  # silent for an hour, as it seems: it is looked at, and seen to live
            with lock.held(run, "export", wait=wait):
                assert time.monotonic() - begun > 2.5
        else:
            with pytest.raises(RunLocked), lock.held(run, "export"):
                pass


def test_a_waiting_run_says_so_and_goes_on_when_the_other_ends(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_TOLD_SECONDS", 0.5)
    _record(run, host="node-b")
    told: list[str] = []

    def tell(words: str, *named: object) -> None:
        told.append(words % named)
        if len(told) == 2:  # at once, and each minute
            (run.path / "lock.json").unlink()

    monkeypatch.setattr(lock.log, "warning", tell)
    with lock.held(run, "run", wait=True):
        assert len(told) == 2
    assert re.fullmatch(r"run test is held by: train, process \d+ on node-b, since .*; waiting for it; Ctrl-C ends that", told[0])


def test_ctrl_c_ends_the_waiting(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    _record(run, host="node-b")
    monkeypatch.setattr(lock.log, "warning", lambda *_: os.kill(os.getpid(), signal.SIGINT))  # while it says that it waits
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who started these tests may have had it ignored
    try:
        with pytest.raises(KeyboardInterrupt), lock.held(run, "run", wait=True):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert json.loads((run.path / "lock.json").read_text())["token"] == "t"


def test_one_that_can_be_asked_is_not_waited_for(run: RunFolder) -> None:
    _record(run, pid=os.getppid(), started=psutil.Process(os.getppid()).create_time())
    with pytest.raises(RunLocked) as caught, lock.held(run, "run", wait=True):
        pass
    assert "renewed" not in caught.value.evidence
    assert "taken over" not in caught.value.remedy


def _until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_holder_renews_until_it_leaves(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE", 0.6)
    with lock.held(run, "train"):
        seen = [lease.sign(run.path).at]
        for _ in range(3):
            _until(lambda: lease.sign(run.path).at > seen[-1])
            seen.append(lease.sign(run.path).at)
    _until(lambda: not any(thread.name == "lease of test" for thread in threading.enumerate()))


def test_renewals_that_fail_are_told_and_end_nothing(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "LEASE", 0.6)
    away = run.path.with_name("unmounted")
    with caplog.at_level(logging.WARNING), lock.held(run, "train"):
        run.path.rename(away)  # the share is gone for a while
        _until(lambda: "its lock cannot be renewed (No such file or directory); after 1 s without" in caplog.text)
        time.sleep(0.5)
        with pytest.raises(LeaseLost):
            write_atomic(run.manifest, "{}")
        assert not run.path.exists()  # nothing is written in its place on this machine's own disk
        away.rename(run.path)
        _until(lambda: "its lock is renewed again" in caplog.text)
        write_atomic(run.manifest, "{}")
    assert len(caplog.records) == 2
    assert lock.holder(run) is None


def _stage(run: RunFolder) -> None:
    run_stage(run, "merge", {}, [], dict)


def _staged(run: RunFolder) -> None:
    with staged(run.adapter) as target:
        target.mkdir()
        (target / "w").write_text("late")


def _partial(run: RunFolder) -> None:
    Partial(run.path / "x.part", "k")


DOORS: dict[str, Callable[[RunFolder], None]] = {
    "manifest": lambda run: Manifest(run.manifest).record("gguf", {}, [], {}, 1),
    "list in the manifest": lambda run: Manifest(run.manifest).append("launches", {}),
    "staged folder": _staged,
    "written file": lambda run: write_atomic(run.report_file, "late"),
    "partial results": _partial,
    "next stage": _stage,
}


@pytest.mark.parametrize("finished", [False, True], ids=["the other works", "the other is done"])
@pytest.mark.parametrize("door", DOORS)
def test_who_lost_the_lease_publishes_nothing(door: str, finished: bool, run: RunFolder) -> None:
    with pytest.raises(LeaseLost) as caught, lock.held(run, "export"):
        run.adapter.mkdir()
        (run.adapter / "w").write_text("the other's")
        Manifest(run.manifest).record("finetune", {}, [run.adapter], {}, 1)
        run.report.mkdir()
        _record(run, token="the other's", host="node-b")
        if finished:
            (run.path / "lock.json").unlink()
        before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
        try:
            DOORS[door](run)
        finally:
            assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    error = caught.value
    assert error.exit_code == 3
    assert error.message == "run test was taken over by another process while this one gave no sign of life"
    assert ("is left as it is" in error.evidence) or door == "next stage"
    assert ("now held by: train, process" in error.evidence) != finished
    there = lock.holder(run)  # leaving does not end the other's lock
    assert (there.token if there else None) == (None if finished else "the other's")


def test_partial_results_of_the_other_are_not_mixed_with_ours(run: RunFolder) -> None:
    with pytest.raises(LeaseLost), lock.held(run, "export"):
        partial = Partial(run.path / "x.part", "k")
        partial.add({"a": 1})
        before = partial.path.read_text()
        _record(run, token="the other's", host="node-b")
        for late in (lambda: partial.add({"b": 2}), partial.remove):
            with pytest.raises(LeaseLost):
                late()
            assert partial.path.read_text() == before
        raise LeaseLost("as the first of them")


def test_an_error_that_comes_of_a_lost_lease_is_named_so(run: RunFolder) -> None:
    with pytest.raises(LeaseLost) as caught, lock.held(run, "run"), lock.held(run, "merge"):
        _record(run, token="the other's", host="node-b")
        raise FileNotFoundError("its scratch was swept")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    (run.path / "lock.json").unlink()
    with pytest.raises(Interrupted), lock.held(run, "run"):
        _record(run, token="the other's", host="node-b")
        raise Interrupted("as asked")
    with pytest.raises(ZeroDivisionError), lock.held(RunFolder("another", run.output), "run"):
        raise ZeroDivisionError


def test_who_serves_is_noted_by_whoever_ends_a_server(run: RunFolder) -> None:
    with lock.held(run, "verify"):
        _record(run, token="the other's", host="node-b")
        write_atomic(run.servers / "vllm.json", "{}")
    assert (run.servers / "vllm.json").is_file()


def test_another_runs_files_are_not_this_ones(run: RunFolder) -> None:
    with lock.held(run, "train"):
        _record(run, token="the other's", host="node-b")
        write_atomic(run.output / "test-2" / "manifest.json", "{}")
        write_atomic(run.output / "agents.yaml", "")


def test_a_guard_is_entered_again_by_its_thread_alone(run: RunFolder) -> None:
    run.path.mkdir()
    order: list[str] = []

    def other() -> None:
        with lease.guarded(run.path):
            order.append("other")

    thread = threading.Thread(target=other)
    with lease.guarded(run.path), lease.guarded(run.path.parent / "." / run.name):
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


WORK = """
import json, sys, time
from pathlib import Path
from pipeline.errors import PipelineError
from pipeline.runs import lease, lock
from pipeline.runs.files import staged
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_json
from pipeline.runs.stages import Partial, run_stage
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
output, wait, stands, key = Path(sys.argv[1]), sys.argv[2] == "wait", sys.argv[3], Path(sys.argv[4])
lease.LEASE = 5.0
def at(place):
    print(place, flush=True)
    while place == stands and not key.exists():
        time.sleep(0.05)
run = RunFolder("test", output)
def work():
    partial = Partial(run.path / "steps.part", "k")
    for step in range(len(partial.done), 8):
        at(f"step {step}")
        partial.add({str(step): sha256_json([step])})
    with staged(run.adapter) as target:
        target.mkdir()
        (target / "w").write_text(json.dumps(partial.done))
        at("staging")
    partial.remove()
    return {}
try:
    with lock.held(run, "run", wait=wait):
        run_stage(run, "finetune", {"data": 1}, [run.adapter], work)
        print("done", flush=True)
except PipelineError as error:
    print(type(error).__name__, error, flush=True)
    sys.exit(error.exit_code)
"""


def _machine(host: str | None, run: RunFolder, stands: str = "", wait: str = "wait") -> AbstractContextManager[Machine]:
    """A machine that does the run's eight steps; it ``stands`` at one of them until :func:`_go`."""
    return machine(host, WORK, [run.output, wait, stands, run.output / f"go-{host}"], PYTHONPATH=str(Path(__file__).parents[3]))


def _go(host: str | None, run: RunFolder) -> None:
    (run.output / f"go-{host}").touch()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Hash of what an uninterrupted run leaves."""
    require_machines()
    run = RunFolder("test", tmp_path_factory.mktemp("whole"))
    with _machine("node-a", run) as a:
        assert a.end() == 0, a.said
    return sha256_tree(run.adapter)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["step 3", pytest.param("staging", marks=pytest.mark.wide)])
def test_a_run_whose_machine_was_switched_off_goes_on_on_another(when: str, whole: str, run: RunFolder) -> None:
    with _machine("node-a", run, when) as a:
        a.until(when)
        with pytest.raises(RunLocked, match="run test is in use") as caught, lock.held(run, "export"):
            pass
        assert "on node-a, since" in caught.value.evidence
        a.off()
    with _machine("node-b", run) as b:
        assert b.end() == 0, b.said
    assert "on node-a, since" in b.said
    assert "which is gone" in b.said
    assert "step 2" not in b.said.splitlines()
    assert (sha256_tree(run.adapter), leftovers(run.path), lock.holder(run)) == (whole, [], None)


@pytest.mark.slow
def test_a_living_container_of_the_same_host_name_is_not_taken_over(whole: str, run: RunFolder) -> None:
    with _machine(None, run, "staging") as a:
        a.until("staging")
        with pytest.raises(RunLocked) as caught, lock.held(run, "export"):
            pass
        assert "in another container or before a restart, renewed" in caught.value.evidence
        with _machine(None, run) as b:  # it waits for the end of the first, and has nothing left to do
            b.until("waiting for it")
            _go(None, run)
            assert (a.end(), b.end()) == (0, 0), (a.said, b.said)
    assert "skipped" in b.said
    assert "step 0" not in b.said
    assert sha256_tree(run.adapter) == whole


@pytest.fixture
def suspended(whole: str, run: RunFolder) -> Iterator[Machine]:
    """A machine that stands still in the middle of its work."""
    with _machine("node-a", run, "step 3") as a:
        a.until("step 3")
        a.send(signal.SIGSTOP)
        _go("node-a", run)
        yield a


@pytest.mark.slow
@pytest.mark.parametrize("finished", [False, pytest.param(True, marks=pytest.mark.wide)], ids=["the other works", "it is done"])
def test_a_suspended_owner_that_was_taken_over_ends_at_its_next_publication(
    finished: bool, suspended: Machine, whole: str, run: RunFolder
) -> None:
    with _machine("node-b", run, "" if finished else "step 5") as b:
        if finished:
            assert b.end() == 0, b.said
        else:
            b.until("step 5")
        suspended.send(signal.SIGCONT)
        assert suspended.end() == 3, suspended.said
        if not finished:
            _go("node-b", run)
            assert b.end() == 0, b.said
    assert "LeaseLost run test was taken over by another process" in suspended.said
    assert "is left as it is" in suspended.said
    assert "Traceback" not in suspended.said
    assert ("now held by: run, process" in suspended.said) != finished
    assert (sha256_tree(run.adapter), leftovers(run.path), lock.holder(run)) == (whole, [], None)
    assert Manifest(run.manifest).changed() == []


@pytest.mark.slow
@pytest.mark.wide
def test_a_suspended_owner_that_nobody_missed_goes_on(suspended: Machine, whole: str, run: RunFolder) -> None:
    time.sleep(5.5)
    suspended.send(signal.SIGCONT)
    assert suspended.end() == 0, suspended.said
    assert sha256_tree(run.adapter) == whole
