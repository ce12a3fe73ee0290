"""One backend that fails must not hide what the others do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import stub_server
from small_run import make_run

from pipeline import engines
from pipeline.config import Settings
from pipeline.engines import Availability
from pipeline.engines.llamacpp import LlamaCpp
from pipeline.errors import StartFailure
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.serve.backends import _adapter_there, borrowed_adapter
from pipeline.serve.start import Endpoint
from pipeline.verify import prober, verify
from pipeline.verify.material import Material
from pipeline.verify.score import HeldOut

NOBODY = "http://127.0.0.1:9"  # no server listens on the discard port
ROW = HeldOut(({"role": "user", "content": "hi"},), "x")


def _verified(run: RunFolder, name: str, settings: Settings) -> dict[str, Any]:
    material: Any = Material([ROW], [("hi", [1])], [], [], {}, 8, None)  # type: ignore[arg-type]
    outcome, _ = verify._backend(run, name, settings, material, keep=False)
    assert [check.status for check in outcome.checks] == ["failed"]
    return outcome.entry.model_dump()


def test_an_endpoint_that_does_not_answer_is_a_row_with_its_error_and_then_a_failed_check(run: RunFolder) -> None:
    run.path.mkdir(parents=True)
    run.heldout.write_text(json.dumps({"messages": [*ROW.messages, {"role": "assistant", "content": "x"}]}) + "\n")
    asked = prober.ask_once(run, Endpoint("openai", NOBODY, "m"), None)
    assert (asked["prompt"], "/v1/chat/completions does not answer" in asked["error"]) == ("hi", True), asked
    settings = Settings(openai_compatible_base_url=f"{NOBODY}/v1", openai_compatible_model="m")
    assert _verified(run, "openai", settings)["status"] == "failed"


def test_a_backend_that_does_not_start_is_a_failed_check(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Endpoint:
        raise StartFailure("it ended with exit code 1")

    make_run(run)
    monkeypatch.setattr(LlamaCpp, "available", lambda _: Availability(True))
    monkeypatch.setattr("pipeline.serve.start.serve", refuse)
    entry = _verified(run, "llamacpp", Settings())
    assert (entry["status"], entry["reason"]) == ("failed", "it ended with exit code 1")


def test_an_engine_without_adapters_is_no_backend_for_one(run: RunFolder, tmp_path: Path) -> None:
    with borrowed_adapter(run, "llamacpp", Settings(), tmp_path) as started:
        assert (started.status, "serves the merged model" in started.reason) == ("skipped", True)


def test_a_server_that_lists_the_run_s_adapter_is_asked_for_it(run: RunFolder, tmp_path: Path) -> None:
    make_run(run)
    adapter, base = {"root": str(run.adapter), "parent": "b"}, {"id": "b", "root": "/bases/b"}
    foreign = {"id": "other", "root": "/runs/other/adapter", "parent": "b"}
    with stub_server.serving({"/v1/models": {"data": [base, foreign, {"id": "triage", **adapter}]}, "/health": {}}) as stub:
        with borrowed_adapter(run, "vllm", Settings(vllm_base_url=f"{stub.url}/v1"), tmp_path) as started:
            there = started.endpoint
        assert there is not None
        assert (there.url, there.model, there.base, started.was_up) == (stub.url, "triage", "b", True)
    # a folder of that name that is no longer what the run recorded is another adapter
    (run.adapter / "model.safetensors").write_bytes(b"x")
    assert Manifest(run.manifest).artefact_sha256("finetune", "adapter")
    with stub_server.serving({"/v1/models": {"data": [base, {"id": "triage", **adapter}]}, "/health": {}}) as stub:
        assert _adapter_there(engines.get("vllm"), run, Settings(vllm_base_url=f"{stub.url}/v1")) is None
