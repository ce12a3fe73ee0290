"""Engines that start in the background of other work: real llama.cpp servers."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import psutil
import pytest
from small_run import make_servable_run

from pipeline.config import load
from pipeline.runs.folder import RunFolder
from pipeline.serve import backends, records
from pipeline.serve import start as serving
from pipeline.serve.start import Options

OPTIONS = Options(purpose="verify", owner=os.getpid())


@pytest.fixture
def servable(run: RunFolder) -> Iterator[RunFolder]:
    yield make_servable_run(run)
    serving.stop(run.path, "llamacpp")


def test_what_started_beside_the_work_is_there_after_it(servable: RunFolder) -> None:
    with backends.meanwhile(servable, ["llamacpp", "openai"], OPTIONS, need_gib=0.1):
        begun = time.monotonic()
    found = backends.find(servable, "llamacpp", load())
    assert found is not None and found.server is not None and found.server.alive
    # whoever asks for it next starts no other
    again = backends.start(servable, "llamacpp", load(), OPTIONS)
    assert again.was_up and again.endpoint is not None and again.endpoint.url == found.url
    assert time.monotonic() - begun < 60


def test_when_the_work_fails_nothing_is_left(servable: RunFolder) -> None:
    with pytest.raises(KeyboardInterrupt), backends.meanwhile(servable, ["llamacpp"], OPTIONS, need_gib=0.1):
        deadline = time.monotonic() + 60
        while not records.running(servable.servers) and time.monotonic() < deadline:
            time.sleep(0.01)
        (process,) = records.running(servable.servers)
        raise KeyboardInterrupt
    assert not process.alive and not records.running(servable.servers)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(servable.gguf) in (p.info["cmdline"] or [])]


def test_work_that_fails_before_the_start_has_begun_leaves_nothing_either(servable: RunFolder) -> None:
    with pytest.raises(ZeroDivisionError), backends.meanwhile(servable, ["llamacpp"], OPTIONS, need_gib=0.1):
        raise ZeroDivisionError
    assert not records.running(servable.servers)


def test_a_server_that_was_up_before_outlives_work_that_fails(servable: RunFolder) -> None:
    up = backends.start(servable, "llamacpp", load(), OPTIONS).endpoint
    assert up is not None and up.server is not None
    with pytest.raises(ZeroDivisionError), backends.meanwhile(servable, ["llamacpp"], OPTIONS, need_gib=0.1):
        raise ZeroDivisionError
    assert up.server.alive


def test_without_memory_for_both_nothing_is_started(servable: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with backends.meanwhile(servable, ["llamacpp"], OPTIONS, need_gib=1e6):
        pass
    assert not records.running(servable.servers)
    assert "not started beside this" in caplog.text


def test_a_start_that_fails_is_reported_by_who_asks_next(servable: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    worked = False
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {"llamacpp": taken.getsockname()[1]}
        with backends.meanwhile(servable, ["llamacpp"], OPTIONS, 0.1, ports):
            worked = True
        assert worked and "llamacpp: failed: " in caplog.text
        (again,) = backends.start_backends(servable, ["llamacpp"], load(), OPTIONS, ports)
    assert again.status == "failed" and str(ports["llamacpp"]) in again.reason


def test_nothing_is_read_or_started_when_none_is_named(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", "not a URL")  # settings that cannot be read
    with backends.meanwhile(run, [], OPTIONS, need_gib=0.1):
        pass
