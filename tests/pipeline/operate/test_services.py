"""Services as supervised processes: a small web server stands in for the gateway."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.commands.runs import stop
from pipeline.engines.base import Launch
from pipeline.errors import EnvironmentFailure
from pipeline.net.loopback import claim
from pipeline.operate import services
from pipeline.operate.services import listing
from pipeline.serve import records
from pipeline.serve.server import Server

WEB = (
    "from http.server import *; import sys; HTTPServer(('127.0.0.1', int(sys.argv[1])), SimpleHTTPRequestHandler).serve_forever()"
)


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for name in services.NAMES:
        services.stop(name, tmp_path)


def _start(output: Path, name: str = "gateway") -> Server:
    port = claim("127.0.0.1", 0)
    launch = Launch(name, (sys.executable, "-c", WEB, str(port)), {}, f"http://127.0.0.1:{port}", "/", name, 60)
    return services.start(launch, output, os.getpid(), lambda _: None)


def test_a_second_service_is_refused_and_the_first_keeps_record_and_log(output: Path) -> None:
    first = _start(output)
    said = first.log.read_bytes()
    with pytest.raises(EnvironmentFailure, match="gateway already serves") as caught:
        _start(output)
    assert f"process {first.pid}" in caught.value.evidence
    assert caught.value.remedy.endswith("granite-pipeline gateway --stop")
    assert records.running(services.folder(output)) == [first]
    assert said
    assert first.log.read_bytes().startswith(said)


def test_of_two_that_start_at_once_one_is_refused(output: Path) -> None:
    started: list[Server] = []
    refused: list[EnvironmentFailure] = []

    def attempt() -> None:
        try:
            started.append(_start(output))
        except EnvironmentFailure as error:
            refused.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(started), len(refused)) == (1, 1)
    assert records.running(services.folder(output)) == started


def test_ps_shows_a_service_as_ready_and_stop_all_stops_it(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = _start(output, "status-api")
    assert [(entry.run, entry.server, entry.state) for entry in listing(output)] == [("-", first, "ready")]
    stop("", output=output, every=True)
    assert not first.alive
    assert capsys.readouterr().err == "stopped: status-api\n"
    assert records.running(services.folder(output)) == []
