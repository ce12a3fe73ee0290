"""``serve ollama`` where Ollama already runs: its API is a small real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import make_run
from stub_server import serving
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.net.loopback import claim
from pipeline.operate.registry import check_ollama_models
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_file
from pipeline.runs.manifest import Manifest
from pipeline.serve import artefacts, backends, records

JSON = {"Content-Type": "application/json"}
SHAPE = {
    "general.architecture": "granite", "granite.block_count": 2, "granite.attention.head_count": 4, "granite.vocab_size": 64,
    "granite.embedding_length": 64, "granite.feed_forward_length": 128, "granite.context_length": 512,
}  # fmt: skip
OLLAMA: dict[str, Any] = {
    "/api/version": {"version": "0.12.0"},
    "/api/create": (200, JSON, {"status": "success"}),
    "/v1/chat/completions": {"choices": []},
    "/api/tags": {"models": [{"name": "soc:latest", "digest": "d1"}]},
    "/api/ps": {"models": []},
}


@pytest.fixture
def mine(tmp_path: Path, write_gguf: Callable[[Path, dict[str, Any]], None]) -> RunFolder:
    made = make_run(RunFolder("mine", tmp_path))
    write_gguf(made.gguf, SHAPE)
    made.modelfile.write_text(f'FROM ./{made.gguf.name}\nTEMPLATE """{{{{ .Prompt }}}}"""\n')
    manifest = Manifest(made.manifest)
    manifest.record("gguf", {"merged": manifest.artefact_sha256("merge", "merged_fp16")}, [made.gguf], {}, 1)
    return made


def test_a_running_ollama_is_given_the_model_and_left_running(mine: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["serve", "ollama", "--run", "mine", "--output", str(mine.output), "--served-model-name", "soc"]
    with serving({**OLLAMA, f"/api/blobs/sha256:{sha256_file(mine.gguf)}": {}}) as stub:
        monkeypatch.setenv("OLLAMA_BASE_URL", f"{stub.url}/v1")
        done = CliRunner().invoke(app, words)
        assert done.exception is None, done.exception
        assert f"made in the Ollama that already runs at {stub.url}; it goes on running" in done.output
        assert stub.bodies["/api/create"]["model"] == "soc"
        assert stub.bodies["/api/create"]["parameters"]["num_ctx"] == 512
        assert stub.bodies["/v1/chat/completions"]["model"] == "soc"
        seen = asyncio.run(check_ollama_models(stub.url, "soc", output=mine.output))
        assert seen[0].artefact is not None
        assert seen[0].artefact == artefacts.of_file(mine.gguf)
        # made again by someone else under the same name
        stub.routes["/api/tags"] = {"models": [{"name": "soc:latest", "digest": "d2"}]}
        assert asyncio.run(check_ollama_models(stub.url, "soc", output=mine.output))[0].artefact is None
        variable = CliRunner().invoke(app, [*words, "--set", "num-parallel=2"])
        assert "OLLAMA_NUM_PARALLEL is a setting of the server, and this Ollama already runs" in str(variable.exception)
    record = records.read(mine.servers, "ollama")
    assert record is not None and record.process is None and record.ready is not None and record.ready.digest == "d1"


def test_what_is_no_ollama_is_not_used() -> None:
    assert backends.find_service(f"http://127.0.0.1:{claim('127.0.0.1', 0)}") is None
    with serving({"/api/version": b"<html></html>"}) as stub:
        assert backends.find_service(stub.url) is None
        stub.routes["/api/version"] = {"version": "0.12.0"}
        assert backends.find_service(f"{stub.url}/v1") is not None
