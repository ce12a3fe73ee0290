"""``parity --start`` on a run of random weights: llama.cpp comes up, is compared over the whole suite, and goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import Settings
from pipeline.errors import EngineError, InputError
from pipeline.runs.folder import RunFolder
from pipeline.verify.sources import compare_here, read_source, run_servers


@pytest.fixture
def run(base: Path, gguf: Path, tmp_path: Path) -> RunFolder:
    folder = RunFolder("tiny", tmp_path)
    folder.path.mkdir()
    shutil.copytree(base, folder.merged)
    shutil.copyfile(gguf, folder.gguf)
    return folder


@pytest.mark.slow
def test_the_whole_suite_on_a_server_started_for_it(run):
    words = ["parity", "--run", run.name, "--output", str(run.output), "--engines", "merged,gguf,llamacpp", "--start", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exception is None, done.output
    found = json.loads(done.stdout[done.stdout.index('{"passed"') :])
    assert (found["passed"], found["problems"], found["skipped"]) == (True, [], {})
    assert found["counts"]["llamacpp"] == {"equal": 138, "listed": 3}
    assert found["counts"]["merged"] == found["counts"]["gguf"] == {"equal": 141}
    left = [p for p in psutil.process_iter(["cmdline"]) if str(run.path) in " ".join(p.info["cmdline"] or [])]
    assert left == []


@pytest.mark.slow
def test_a_server_that_does_not_start_is_an_error_with_its_words(run):
    # a whole file by its header, in which llama.cpp misses a tensor
    run.gguf.write_bytes(run.gguf.read_bytes().replace(b"output_norm.weight", b"output_gone.weight"))
    with pytest.raises(EngineError) as caught, run_servers(run, ["llamacpp"], Settings(), start=True):
        pass
    assert caught.value.message == "llamacpp did not start for the comparison"
    assert caught.value.evidence


def test_without_start_nothing_is_started(tmp_path, tokenizer_folder):
    run = RunFolder("r", tmp_path)
    shutil.copytree(tokenizer_folder, run.merged)
    with run_servers(run, ["llamacpp", "vllm"], Settings(), start=False) as running:
        assert running == ({}, {})
    found = compare_here(read_source("r", None, tmp_path, None), "chat", start=False)
    assert (found.to_json()["passed"], found.problems, found.absent) == (True, [], {})


def test_only_a_run_has_servers_to_start(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    done = CliRunner().invoke(app, ["parity", "--template", str(tmp_path / "t.jinja"), "--start"])
    assert isinstance(done.exception, InputError)
    assert "--start starts the servers of a run" in str(done.exception)
