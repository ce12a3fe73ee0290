"""Tool calls and documents through the whole line on a small budget, on the real vLLM and the real llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.agent_data import generate
from pipeline.engines.vllm.engine import Vllm
from pipeline.verify.score import read_held_out, read_reference, said

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.wide]
BUDGET = ["-p", "BATCH_SIZE=4", "-p", "MAX_STEPS=50", "-p", "LEARNING_RATE=0.002"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was trained on both kinds of rows and verified."""
    output = tmp_path_factory.mktemp("agents")
    sets = [generate("tools", 120, 12), generate("documents", 80, 6)]
    for name, parts in zip(("train", "heldout"), zip(*sets, strict=True), strict=True):
        (output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for part in parts for row in part))
    words = ["run", "--name", "agents", "--output", str(output), "--backends", "vllm,llamacpp", *BUDGET]
    files = ["--data", str(output / "train.jsonl"), "--eval-data", str(output / "heldout.jsonl")]
    command = [sys.executable, "-m", "pipeline", *words, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "used: documents" in done.stderr + done.stdout
    return output / "agents"


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "report" / "report.json").read_text()))


def test_the_model_learns_to_call(report: dict[str, Any]) -> None:
    base, tuned = report["eval"]["base"], report["eval"]["tuned"]
    assert base["calls"] <= 0.1
    assert tuned["calls"] >= 0.5
    assert tuned["exact"] > base["exact"] + 0.3


@pytest.mark.parametrize("name", ["vllm", "llamacpp"])
def test_each_backend_is_fed_tools_and_documents_and_calls_as_in_process(report: dict[str, Any], name: str) -> None:
    if name == "vllm" and not Vllm().available().usable:
        pytest.skip("vLLM is not installed")
    backend = next(entry for entry in report["backends"] if entry["name"] == name)
    assert backend["status"] == "passed", backend["reason"]
    assert backend["prompt_parity"] is True
    parity = next(check for check in backend["checks"] if check["id"] == f"{name}.prompt_parity")
    assert "rendered prompt" not in parity["detail"]  # every row went through the API that a user would use
    assert abs(backend["exact"] - report["eval"]["tuned"]["exact"]) <= 0.06
    # of nine rows with calls one may tip
    assert abs(backend["fields"]["calls"] - report["eval"]["tuned"]["calls"]) <= 0.12


def test_calls_are_recorded_as_calls_and_documents_stand_in_the_prompts(run: Path) -> None:
    rows, answers = read_held_out(run / "heldout.jsonl"), list(read_reference(run / "reference" / "tuned.jsonl").values())
    calls = [said(row, answer).calls for row, answer in zip(rows, answers, strict=True)]
    assert any(calls)
    assert all(call["name"] in ("block_ip", "isolate_host", "lookup_ioc") for each in calls for call in each)
    assert sum(bool(row.documents) for row in rows) == 6
    table = json.loads((run / "report" / "report.json").read_text())["training"]["account"]["table"]
    assert {"documents", "messages[].tool_calls", "tools"} <= {row["what"] for row in table if row["became"] == "used"}
