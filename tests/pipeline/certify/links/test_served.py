"""Link 4's file: what the server loaded when it started, not what lies at the path it names now."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest

from pipeline import engines
from pipeline.certify.certificate import Data, Subject, hashes
from pipeline.certify.links.served import _file
from pipeline.runs.files import read_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_file
from pipeline.runs.manifest import Manifest
from pipeline.serve import start
from pipeline.serve.start import Endpoint, Target
from pipeline.verify.evidence import Evidence, _loaded, written_since


@pytest.fixture
def subject(line: RunFolder) -> Subject:
    return Subject(line, Manifest(line.manifest), None, "b", Data({}), {}, hashes(line))


def evidence(subject: Subject) -> Evidence:
    """llama.cpp that names the run's GGUF, which is the exported one now."""
    file = subject.run.gguf
    return Evidence("llamacpp", "1", "Q8_0", (), (), file=str(file), file_sha256=subject.sha256[file.name])


def test_the_exported_file_loaded_and_unchanged_passes(subject: Subject) -> None:
    assert _file(replace(evidence(subject), loaded_sha256=subject.sha256[subject.run.gguf.name]), subject).status == "passed"
    assert _file(evidence(subject), subject).status == "passed"


def test_a_file_swapped_back_after_the_start_is_caught(subject: Subject) -> None:
    found = _file(replace(evidence(subject), loaded_sha256="0" * 64), subject)
    assert (found.status, "when it started, the file was another one" in found.figure) == ("failed", True)


def test_a_server_from_before_the_export_is_caught(subject: Subject) -> None:
    assert _file(replace(evidence(subject), file_newer=True), subject).status == "failed"
    file, started = subject.run.gguf, datetime.now(UTC)
    before, after = ((started + timedelta(seconds=s)).timestamp() for s in (-5, 5))
    os.utime(file, (before, before))
    assert not written_since(file, started.isoformat(timespec="seconds"))
    os.utime(file, (after, after))
    assert written_since(file, started.isoformat(timespec="seconds"))
    assert written_since(file.parent, started.isoformat(timespec="seconds"))
    assert not written_since(file.parent / "gone", started.isoformat(timespec="seconds"))


def test_the_hash_is_noted_from_the_file_itself_when_the_server_has_started(line: RunFolder) -> None:
    told = line.gguf.read_bytes()
    line.gguf.write_bytes(told[::-1])  # the same size: the manifest's word would not show it
    noted = start.note_ready(Endpoint("llamacpp", "http://x", line.name), Target.of_run(line, "llamacpp"), 0.0)
    assert noted.sha256 == sha256_file(line.gguf) != Manifest(line.manifest).artefact_sha256("gguf", line.gguf.name)
    assert read_json(line.servers / "llamacpp.json")["ready"]["sha256"] == noted.sha256


def _of_ollama(subject: Subject, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """What is found of the file that an Ollama here names; the blob is a copy of the run's GGUF unless told otherwise."""
    content = changes.get("content", subject.run.gguf.read_bytes())
    blob = tmp_path / f"sha256-{changes.get('named', hashlib.sha256(content).hexdigest())}"
    if changes.get("there", True):
        blob.write_bytes(content)
    url = changes.get("url", "http://127.0.0.1:11434")
    return _loaded(blob, Endpoint("ollama", url, "m"), engines.get("ollama"), subject.run)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"url": "http://gpu.example:11434"}, "Ollama runs on another machine"),
        ({"there": False}, "no such file"),
        ({"named": "0" * 64}, "the file of that name here is another one"),
    ],
    ids=["another machine", "not in this container", "another store's"],
)
def test_a_copy_that_cannot_be_compared_proves_nothing_and_says_why(
    subject: Subject, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    said = _of_ollama(subject, tmp_path, **changes)
    assert why in said["unread"]
    found = _file(Evidence("ollama", "1", "Q8_0", (), (), file="/blobs/sha256-ab", **said), subject)
    assert (found.status, found.figure.startswith("not compared: "), "/blobs/sha256-ab" in found.figure) == (
        "skipped",
        True,
        True,
    )


def test_ollama_s_copy_is_held_by_its_content(subject: Subject, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(subject.run.gguf, "granite")
    writer.add_tensor("a", numpy.zeros((3, 64), "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    subject = replace(subject, sha256=hashes(subject.run))
    want = subject.sha256[subject.run.gguf.name]
    said = _of_ollama(subject, tmp_path)
    evidence = Evidence("ollama", "1", "Q8_0", (), (), file="b", loaded_sha256=want, **said)
    assert _file(evidence, subject).status == "passed"
    assert _file(replace(evidence, loaded_sha256="0" * 64), subject).status == "failed"
    other = bytearray(subject.run.gguf.read_bytes())
    other[-1] ^= 1
    changed = Evidence("ollama", "1", "Q8_0", (), (), file="b", **_of_ollama(subject, tmp_path, content=bytes(other)))
    assert (_file(changed, subject).status, "differ" in _file(changed, subject).figure) == ("failed", True)


def _unmerged(subject: Subject, **changes: Any) -> Evidence:
    """vLLM that names the run's adapter, over the base that the run was trained on."""
    seen: dict[str, Any] = {"file_sha256": subject.sha256[subject.run.adapter.name], "base_sha256": subject.training.base.sha256}
    return Evidence("vllm", "1", "float32", (), (), file="adapter", **{**seen, **changes})


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, "passed", "unmerged: base "),
        ({"file_sha256": "0" * 64}, "failed", "the adapter is not this run's"),
        ({"base_sha256": "0" * 64}, "failed", "the base is not this run's"),
        ({"file_sha256": "0" * 64, "base_sha256": "0" * 64}, "failed", "the adapter and the base is not this run's"),
        ({"file_newer": True}, "failed", "written after the server had started"),
        ({"base_sha256": ""}, "skipped", "adapter and base cannot both be read here"),
        ({"file_sha256": None, "unread": "vLLM runs on another machine"}, "skipped", "vLLM runs on another machine"),
    ],
)
def test_an_adapter_on_its_base_is_held_by_both_files(line: RunFolder, changes: dict[str, Any], status: str, words: str) -> None:
    manifest = Manifest(line.manifest)
    inputs = {"parameters": {}, "base": {"id": "b", "sha256": "b" * 64}, "data": {}}
    manifest.record("finetune", inputs, [line.adapter], {}, 1)
    subject = Subject(line, Manifest(line.manifest), None, "b" * 64, Data({}), {}, hashes(line))
    found = _file(_unmerged(subject, **changes), subject)
    assert (found.status, words in found.figure) == (status, True)
