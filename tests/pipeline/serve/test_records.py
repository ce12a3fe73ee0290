"""One record a server; the pair of files of runs served before it is read as one."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.engines.base import Launch
from pipeline.errors import InputError
from pipeline.runs.files import read_json, write_json
from pipeline.runs.folder import RunFolder
from pipeline.serve import records, server, start
from pipeline.serve.artefacts import Artefact
from pipeline.serve.records import Ready, Record
from pipeline.serve.server import Server
from pipeline.serve.start import Target

LOADED = Artefact("mine", "f" * 64, "merged_fp16", "a" * 64)
READY = Ready("http://127.0.0.1:9", "m", "1.0", {"dtype": "float32"}, 2.5, "a" * 64, LOADED)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    made = RunFolder("mine", tmp_path)
    made.servers.mkdir(parents=True)
    return made


@pytest.fixture
def process(run: RunFolder) -> Iterator[Server]:
    launch = Launch("vllm", (sys.executable, "-c", "import time; time.sleep(600)"), {}, "http://127.0.0.1:9", "/health", "m")
    started = server.start(launch, run.logs / "vllm-1.log", owner=os.getpid())
    yield started
    server.stop(started)


def test_a_record_is_read_as_it_was_written(run: RunFolder, process: Server) -> None:
    for record in (Record("vllm", process), Record("vllm", process, READY), Record("vllm", None, READY)):
        records.save(run.servers, record)
        assert records.read(run.servers, "vllm") == record
    assert records.read(run.servers, "llamacpp") is None


@pytest.mark.parametrize("host", ["node-b", None], ids=["another machine", "before a restart of this one"])
def test_a_server_of_another_machine_is_neither_taken_for_one_here_nor_forgotten(
    host: str | None, run: RunFolder, process: Server
) -> None:
    """Its number may be a process here, which is no server and must not be ended."""
    there = replace(process, host=host or process.host, place="another boot")
    records.save(run.servers, Record("vllm", there, READY))
    assert records.running(run.servers) == []
    kept = records.read(run.servers, "vllm")
    assert kept is not None
    assert kept.process == (there if host else None)
    assert not records.stop(run.servers, "vllm")
    assert records.read(run.servers, "vllm") == kept
    assert process.alive
    records.require_none("vllm", run.servers, "")  # one may be started here


def test_what_was_served_last_is_known_when_the_server_is_gone(run: RunFolder, process: Server) -> None:
    records.save(run.servers, Record("vllm", process))
    assert records.of_run(run, "vllm") is None and not list(records.every(run.output))
    records.mark_ready(run.servers, "vllm", process, READY)
    assert list(records.every(run.output)) == [Record("vllm", process, READY)]
    assert records.up_since("http://localhost:9", records.every(run.output)) == process.started
    records.end(process, run.servers)
    assert records.running(run.servers) == []
    assert list(records.every(run.output)) == [Record("vllm", None, READY)]
    assert records.last_served("http://localhost:9", "m", records.every(run.output)) == LOADED


def test_a_server_that_took_the_place_meanwhile_keeps_its_record(run: RunFolder, process: Server) -> None:
    records.save(run.servers, Record("vllm", process))
    records.mark_ready(run.servers, "vllm", replace(process, pid=1), READY)
    assert records.read(run.servers, "vllm") == Record("vllm", process)


def test_the_pair_of_an_older_run_is_seen_attached_to_and_stopped(run: RunFolder, process: Server) -> None:
    write_json(run.servers / "vllm.json", process.to_json())
    assert records.running(run.servers) == [process]
    (run.servers / "vllm.endpoint").write_text("{")  # cut off: the server is seen all the same
    assert records.running(run.servers) == [process]
    assert start.attach("vllm", Target(run.merged, "m", run.path)) is None  # it still loads
    said = {"url": READY.url, "model": "m", "version": "1.0", "plan": {"dtype": "float32"}, "ready_seconds": 2.5}
    write_json(run.servers / "vllm.endpoint", {**said, "sha256": "a" * 64, "artefact": LOADED.to_json()})
    assert records.read(run.servers, "vllm") == Record("vllm", process, READY)
    endpoint = start.attach("vllm", Target(run.merged, "m", run.path))
    assert endpoint is not None and (endpoint.server, endpoint.sha256) == (process, "a" * 64)
    assert start.stop(run.path, "vllm") and not process.alive
    assert list(records.every(run.output)) == [Record("vllm", None, READY)]
    assert [path.name for path in run.servers.iterdir()] == ["vllm.json"]
    assert read_json(run.servers / "vllm.json")["process"] is None


def test_an_older_note_alone_is_what_was_served_last(run: RunFolder) -> None:
    said = {"url": "http://127.0.0.1:11434", "model": "soc", "plan": None, "ready_seconds": 1.0, "digest": "d1", "artefact": None}
    write_json(run.servers / "ollama.endpoint", said)
    ready = Ready("http://127.0.0.1:11434", "soc", ready_seconds=1.0, digest="d1")
    assert list(records.every(run.output)) == [Record("ollama", None, ready)]


@pytest.mark.parametrize("damaged", ["{", "[]", '{"engine": "vllm"}', '{"process": {}, "ready": null}', '{"process": null}'])
def test_a_damaged_record_is_said_but_no_gateway_stops_for_it(damaged: str, run: RunFolder) -> None:
    (run.servers / "vllm.json").write_text(damaged)
    (run.servers / "vllm.endpoint").write_text("{}")
    with pytest.raises(InputError):
        records.running(run.servers)
    assert records.of_run(run, "vllm") is None and list(records.every(run.output)) == []


def test_a_copied_run_leaves_the_server_of_the_first_alone_and_a_renamed_one_keeps_its_own(
    run: RunFolder, process: Server
) -> None:
    records.save(run.servers, Record("vllm", process, READY))
    copied = RunFolder("copied", run.output)
    shutil.copytree(run.path, copied.path)
    assert records.running(copied.servers) == [] and not records.stop(copied.servers, "vllm")
    assert process.alive and records.of_run(copied, "vllm") == Record("vllm", None, READY)
    renamed = RunFolder("renamed", run.output)
    run.path.rename(renamed.path)
    assert records.running(renamed.servers) == [process]
    assert records.stop(renamed.servers, "vllm") and not process.alive
