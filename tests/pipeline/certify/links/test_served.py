"""Link 4's file: what the server loaded when it started, not what lies at the path it names now."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.certify.certificate import Data, Subject, hashes
from pipeline.certify.links.served import _file
from pipeline.runs.files import read_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_file
from pipeline.runs.manifest import Manifest
from pipeline.serve import start
from pipeline.serve.start import Endpoint, Target
from pipeline.verify.evidence import Evidence, written_since


@pytest.fixture
def subject(line: RunFolder) -> Subject:
    return Subject(line, Manifest(line.manifest), None, "b", Data({}), {}, hashes(line))


def evidence(subject: Subject) -> Evidence:
    """llama.cpp that names the run's GGUF, which is the exported one now."""
    gguf = subject.run.gguf
    return Evidence("llamacpp", "1", "Q8_0", (), (), file=str(gguf), file_sha256=subject.sha256[gguf.name])


def test_the_exported_file_loaded_and_unchanged_passes(subject: Subject) -> None:
    assert _file(replace(evidence(subject), loaded_sha256=subject.sha256[subject.run.gguf.name]), subject).status == "passed"
    assert _file(evidence(subject), subject).status == "passed"


def test_a_file_swapped_back_after_the_start_is_caught(subject: Subject) -> None:
    found = _file(replace(evidence(subject), loaded_sha256="0" * 64), subject)
    assert (found.status, "when it started, the file was another one" in found.figure) == ("failed", True)


def test_a_server_from_before_the_export_is_caught(subject: Subject) -> None:
    assert _file(replace(evidence(subject), file_newer=True), subject).status == "failed"
    gguf, started = subject.run.gguf, datetime.now(UTC)
    before, after = ((started + timedelta(seconds=s)).timestamp() for s in (-5, 5))
    os.utime(gguf, (before, before))
    assert not written_since(gguf, started.isoformat(timespec="seconds"))
    os.utime(gguf, (after, after))
    assert written_since(gguf, started.isoformat(timespec="seconds"))
    assert written_since(gguf.parent, started.isoformat(timespec="seconds"))
    assert not written_since(gguf.parent / "gone", started.isoformat(timespec="seconds"))


def test_the_hash_is_noted_from_the_file_itself_when_the_server_has_started(line: RunFolder) -> None:
    told = line.gguf.read_bytes()
    line.gguf.write_bytes(told[::-1])  # the same size: the manifest's word would not show it
    noted = start.note_ready(Endpoint("llamacpp", "http://x", line.name), Target.of_run(line, "llamacpp"), 0.0)
    assert noted.sha256 == sha256_file(line.gguf) != Manifest(line.manifest).artefact_sha256("gguf", line.gguf.name)
    assert read_json(line.servers / "llamacpp.json")["ready"]["sha256"] == noted.sha256
