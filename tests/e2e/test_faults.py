"""Faults caused on purpose in a real llama.cpp server: each is named, mended or refused, and leaves no process and no port."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from serving_faults import Watched, cli, copy_of, embedded_gguf, nothing_left, processes_of, request_of, starts, target_of, until

from pipeline.errors import EnvironmentFailure, StartFailure
from pipeline.operate.services import listing
from pipeline.planning.plan import Setting
from pipeline.serve import records, server
from pipeline.serve import start as serving
from pipeline.serve.start import Options, Target

pytestmark = [pytest.mark.slow]
# holds Python, the weights and a KV cache of 32k tokens, not of 64k (23 KB a token)
ADDRESS_SPACE = 1_500_000_000


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    yield target_of(copy_of(embedded_gguf(), tmp_path / "run"), tmp_path / "run")
    serving.stop(tmp_path / "run", "llamacpp")


def _ports(engine: Watched) -> list[int]:
    return [int(urlsplit(launch.url).port or 0) for launch in engine.launches]


def _start(engine: Watched, target: Target, said: list[str], context: int | None = None, **overrides: str) -> serving.Endpoint:
    request = request_of(target, **overrides)
    plan = engine.plan(request)
    if context is not None:
        flags = tuple(Setting("-c", str(context), s.reason, s.source) if s.name == "-c" else s for s in plan.flags)
        plan = replace(plan, flags=flags)
    return serving.start_planned(engine, request, target, Options(owner=os.getpid()), said.append, plan)


def test_a_context_that_does_not_fit_is_halved_until_it_does(target: Target, said: list[str]) -> None:
    engine = Watched(prefix=("prlimit", f"--as={ADDRESS_SPACE}"))
    endpoint = _start(engine, target, said, context=1 << 16)
    served = [launch.argv[launch.argv.index("-c") + 1] for launch in engine.launches]
    assert served in (["65536", "32768"], ["65536", "32768", "16384"])
    assert any("retry 1 of 3" in line and "half the context" in line for line in said)
    attempts = starts(target)[-1]["attempts"]
    assert [attempt.get("kind") for attempt in attempts] == ["out-of-memory"] * (len(served) - 1) + [None]
    assert attempts[0]["retry"]["settings"] == {"-c": "32768", "--parallel": "8"}
    reasons = {row["flag"]: row["source"] for row in (endpoint.plan or {})["reasons"]}
    assert reasons["-c"] == "retry"
    assert serving.stop(target.folder, "llamacpp")
    nothing_left(target.folder, _ports(engine))


def test_a_context_the_user_set_is_never_changed(target: Target, said: list[str]) -> None:
    engine = Watched(prefix=("prlimit", f"--as={1_000_000_000}"))
    with pytest.raises(StartFailure, match=r"your --set c=32768 is not changed by a retry") as caught:
        _start(engine, target, said, c="32768", parallel="4")
    assert (caught.value.kind, "--set c=16384" in caught.value.remedy, len(engine.launches)) == ("out-of-memory", True, 1)
    nothing_left(target.folder, _ports(engine))


def test_retries_end_after_three(target: Target, said: list[str]) -> None:
    # a context of 8 x 512 tokens needs more than this machine has only if the machine says so
    engine = Watched(prefix=("sh", "-c", "echo failed to allocate buffer; exit 1"))
    with pytest.raises(StartFailure, match="out of memory") as caught:
        _start(engine, target, said, context=1 << 16)
    assert len(engine.launches) == 4
    assert caught.value.evidence.count("retried:") == 3
    assert "last lines:" in caught.value.evidence
    assert starts(target)[-1]["ready_seconds"] is None
    nothing_left(target.folder, _ports(engine))


def test_a_port_lost_in_a_race_is_followed_by_the_next(target: Target, said: list[str]) -> None:
    thief = socket.socket()

    def steal(start: int, port: int) -> None:
        if start == 0:
            thief.bind(("127.0.0.1", port))
            thief.listen()

    engine = Watched(before=steal)
    with thief:
        endpoint = _start(engine, target, said)
        first, second = _ports(engine)
        assert first != second
        assert endpoint.url.endswith(str(second))
        assert any("another process took the port first" in line for line in said)
        assert serving.stop(target.folder, "llamacpp")
    nothing_left(target.folder, [first, second])


def test_a_port_the_user_named_is_not_exchanged_and_its_holder_is(target: Target) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(EnvironmentFailure, match=f"port {port} on 127.0.0.1 is not free") as caught:
            serving.serve("llamacpp", target, Options("verify", port=port, owner=os.getpid()), lambda _: None)
    assert f"held by process {os.getpid()}" in caught.value.evidence
    nothing_left(target.folder, [port])


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _no_magic(data: bytes) -> bytes:
    return b"XXXX" + data[4:]


def _no_tokenizer(data: bytes) -> bytes:
    return data.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.nodel", 1)


def _other_architecture(data: bytes) -> bytes:
    at = data.index(b"general.architecture") + len(b"general.architecture") + 4 + 8
    return data[:at] + b"zzzzz" + data[at + 5 :]


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (_cut, "corrupt-weights"),
        (_no_magic, "corrupt-weights"),
        (_no_tokenizer, "no-tokenizer"),
        (_other_architecture, "unknown-architecture"),
    ],
)
def test_a_damaged_file_is_refused_at_once(spoil: object, kind: str, target: Target, said: list[str]) -> None:
    engine = Watched()
    request = request_of(target)
    plan = engine.plan(request)
    target.model.write_bytes(spoil(target.model.read_bytes()))  # type: ignore[operator]
    with pytest.raises(StartFailure) as caught:
        serving.start_planned(engine, request, target, Options(owner=os.getpid()), said.append, plan)
    assert (caught.value.kind, len(engine.launches)) == (kind, 1)
    assert caught.value.remedy
    assert "last lines:" in caught.value.evidence
    nothing_left(target.folder, _ports(engine))


def test_a_server_killed_while_loading_is_not_started_again(target: Target, said: list[str]) -> None:
    engine = Watched()

    def kill() -> None:
        guard = until(lambda: [p for p in processes_of(str(target.model)) if "guard" in " ".join(psutil.Process(p).cmdline())])[0]
        child = until(lambda: psutil.Process(guard).children())[0]
        child.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(
        StartFailure, match=r"ended before it was ready: a process outside this pipeline killed it \(SIGKILL\)"
    ) as caught:
        _start(engine, target, said)
    killer.join()
    assert (caught.value.kind, len(engine.launches)) == ("killed", 1)
    nothing_left(target.folder, _ports(engine))


@pytest.mark.parametrize("victim", ["server", pytest.param("guard", marks=pytest.mark.wide)])
def test_a_server_killed_while_serving_is_noticed_and_swept_up(victim: str, target: Target, said: list[str]) -> None:
    engine = Watched()
    process = _start(engine, target, said).server
    assert process is not None
    guard = psutil.Process(process.pid)
    (guard if victim == "guard" else guard.children()[0]).kill()
    until(lambda: not process.alive, 5)
    assert server.failure(process, "died while serving").kind == "killed"
    server.stop(process)
    assert records.running(target.servers) == []
    nothing_left(target.folder, _ports(engine), [process.pid])


@pytest.mark.parametrize(
    ("number", "code", "state"),
    [
        (signal.SIGTERM, 0, "ready"),
        pytest.param(signal.SIGINT, 0, "ready", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, 130, "loading", marks=pytest.mark.long),
        (signal.SIGKILL, -9, "loading"),
        pytest.param(signal.SIGKILL, -9, "ready", marks=pytest.mark.long),
    ],
)
def test_however_the_command_line_ends_its_server_ends_too(number: int, code: int, state: str, tmp_path: Path) -> None:
    gguf = copy_of(embedded_gguf(), tmp_path / "mine")
    command = cli("serve", "llamacpp", "--gguf", str(gguf), "--port", "0", "--output", str(tmp_path), "--purpose", "verify")
    found = until(lambda: [entry for entry in listing(tmp_path) if entry.state == state], 60)[0]
    assert (found.run, found.server.engine) == ("mine", "llamacpp")
    command.send_signal(number)
    command.communicate(timeout=30)
    assert command.returncode == code
    until(lambda: listing(tmp_path) == [])
    nothing_left(tmp_path, [found.port or 0], [found.server.pid])


def test_a_server_that_dies_ends_the_command_with_its_reason(tmp_path: Path) -> None:
    gguf = copy_of(embedded_gguf(), tmp_path / "mine")
    command = cli("serve", "llamacpp", "--gguf", str(gguf), "--port", "0", "--output", str(tmp_path), "--purpose", "verify")
    found = until(lambda: [entry for entry in listing(tmp_path) if entry.state == "ready"], 60)[0]
    psutil.Process(found.server.pid).children()[0].kill()
    _, err = command.communicate(timeout=30)
    assert command.returncode == 3
    assert "llamacpp died while serving: a process outside this pipeline killed it (SIGKILL)" in err
    nothing_left(tmp_path, [found.port or 0], [found.server.pid])


def test_ps_logs_and_stop_see_a_detached_server(tmp_path: Path) -> None:
    gguf = copy_of(embedded_gguf(), tmp_path / "mine")
    words = [
        "serve",
        "llamacpp",
        "--gguf",
        str(gguf),
        "--port",
        "0",
        "--output",
        str(tmp_path),
        "--detach",
        "--purpose",
        "verify",
    ]
    assert _run(*words).returncode == 0
    second = _run(*words)
    assert (second.returncode, "llamacpp already serves" in second.stderr) == (3, True)
    row = json.loads(_run("ps", "--json", "--output", str(tmp_path)).stdout)["servers"][0]
    assert (row["run"], row["engine"], row["state"]) == ("mine", "llamacpp", "ready")
    assert row["rss_gib"] > 0.05
    assert f":{row['port']}" in row["url"]
    shown = _run("logs", "--run", "mine", "--output", str(tmp_path), "-n", "3").stdout
    assert len(shown.splitlines()) == 3
    follower = cli("logs", "--run", "mine", "--output", str(tmp_path), "--follow")
    until(lambda: processes_of("--follow"))
    assert "llamacpp of mine" in _run("stop", "--all", "--output", str(tmp_path)).stderr
    assert "listening on" in follower.communicate(timeout=20)[0]
    nothing_left(tmp_path, [row["port"]], [row["pid"]])


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    process = cli(*words)
    out, err = process.communicate(timeout=90)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
