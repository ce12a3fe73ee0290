"""The whole line on a small budget, with the real vLLM and the real llama.cpp server, through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.config import load
from pipeline.engines.ollama import Ollama
from pipeline.engines.vllm.engine import Vllm
from pipeline.runs.manifest import Manifest
from pipeline.serve import backends
from training.datasets.dataset import SOC_EVAL

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
HELD_OUT = 24
PLANTED = "planted-secret-0815"
BUDGET = ["-p", "MAX_ROWS=160", "-p", "BATCH_SIZE=4", "-p", "MAX_STEPS=40", "-p", "LEARNING_RATE=0.002"]
# fewer than there are held-out rows: some have no answer of the base
BUDGET += ["-p", "BASE_ANSWERS=8"]


def _cli(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False, env={**os.environ, **environment})


class _CommandLines:
    """Collects every command line that the process list shows while it is entered."""

    def __enter__(self) -> _CommandLines:
        self.lines: set[str] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(0.3):
            self.lines |= {" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])}

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


_command_lines: set[str] = set()


def _left_over(output: Path) -> list[str]:
    """Command lines of processes that still serve something below a folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(output) in line and ("vllm" in line or "llamacpp" in line):
            found.append(line)
    return found


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def words(output: Path) -> list[str]:
    held_out = output / "held_out.jsonl"
    held_out.write_text("".join(SOC_EVAL.read_text().splitlines(keepends=True)[:HELD_OUT]))
    return ["run", "--name", "e2e", "--output", str(output), "--eval-data", str(held_out), *BUDGET]


@pytest.fixture(scope="module")
def first(words: list[str]) -> subprocess.CompletedProcess[str]:
    with _CommandLines() as seen:
        done = _cli(*words, **dict.fromkeys(("HF_TOKEN", "OPENAI_COMPATIBLE_API_KEY", "SOME_PASSWORD"), PLANTED))
    _command_lines.update(seen.lines)
    return done


@pytest.fixture(scope="module")
def report(first: subprocess.CompletedProcess[str], output: Path) -> dict[str, Any]:
    assert first.returncode == 0, first.stderr[-4000:]
    return dict(json.loads((output / "e2e" / "report" / "report.json").read_text()))


def test_the_run_passes_and_keeps_the_contract(report: dict[str, Any]) -> None:
    assert {"schema", "run", "passed", "base_model", "eval", "backends", "checks"} <= set(report)
    assert (report["schema"], report["run"], report["passed"], report["base_model"]["id"]) == (1, "e2e", True, "embedded")
    assert {name: scores["n"] for name, scores in report["eval"].items()} == {"base": 8, "tuned": HELD_OUT}
    for scores in report["eval"].values():
        assert {"json_valid", "severity", "technique", "exact"} <= set(scores)
    assert report["eval"]["base"]["exact"] == 0
    assert report["eval"]["tuned"]["json_valid"] > 0.5


def test_the_run_is_certified_on_the_servers_it_started(report: dict[str, Any], output: Path) -> None:
    certificate = json.loads((output / "e2e" / "certificate" / "certificate.json").read_text())
    assert (certificate["broken"], certificate["unproven"]) == ([], [])
    assert certificate["id"] == report["certificate"]["id"]
    assert (output / "e2e" / "README.md").read_text().startswith("---\n")


@pytest.mark.parametrize("name", ["vllm", "llamacpp"])
def test_a_real_server_answers_as_the_trained_model_does(report: dict[str, Any], name: str) -> None:
    if name == "vllm" and not Vllm().available().usable:
        pytest.skip("vLLM is not installed")
    backend = next(entry for entry in report["backends"] if entry["name"] == name)
    assert backend["status"] == "passed", backend["reason"]
    assert backend["prompt_parity"] is True
    assert (backend["structured_output"]["result"], backend["tool_calls"]["result"]) == ("passed", "passed"), backend
    assert (backend["injection"]["raw"], backend["injection"]["neutralised"]) == (True, False)
    assert backend["prompts"]["total"] == HELD_OUT
    assert abs(backend["exact"] - report["eval"]["tuned"]["exact"]) <= 0.05
    assert backend["tokens_per_second"] > 0
    assert backend["ready_seconds"] > 0
    assert backend["argv"]
    assert backend["ttft_ms"]["p50"] <= backend["ttft_ms"]["p95"]


def test_an_engine_that_is_absent_is_skipped_with_the_way_to_have_it(report: dict[str, Any]) -> None:
    if Ollama().available().usable or backends.look(Ollama(), load())[0]:
        pytest.skip("an Ollama is installed or runs here")
    backend = next(entry for entry in report["backends"] if entry["name"] == "ollama")
    assert backend["status"] == "skipped"
    assert "ollama is not on PATH, and nothing listens at" in backend["reason"]
    assert "install" in backend["install"]


def test_artefacts_notebooks_and_report_are_there_and_no_server_is_left(report: dict[str, Any], output: Path) -> None:
    run = output / "e2e"
    for name in ("adapter", "merged_fp16", "unsloth.Q8_0.gguf", "Modelfile", "manifest.json", "logs"):
        assert (run / name).exists(), name
    assert sorted(p.name for p in (run / "notebooks").iterdir()) == [
        f"{s}.ipynb" for s in ("01_finetune", "02_export", "03_serve", "04_verify")
    ]
    assert {p.name for p in (run / "report").iterdir()} == {"report.html", "report.json", "junit.xml", "evidence.json"}
    assert not (run / "checkpoints").exists()
    assert _left_over(output) == []


def test_a_second_run_skips_training_and_export(report: dict[str, Any], words: list[str], output: Path) -> None:
    before = Manifest(output / "e2e" / "manifest.json").data["stages"]
    again = _cli(*words, "--backends", "llamacpp")
    assert again.returncode == 0, again.stderr[-4000:]
    after = Manifest(output / "e2e" / "manifest.json").data["stages"]
    for stage in ("finetune", "merge", "gguf", "modelfile", "evaluate_base", "evaluate_tuned"):
        assert f"{stage}: nothing changed" in again.stderr
        assert after[stage] == before[stage]


def test_a_finished_run_does_nothing(report: dict[str, Any], words: list[str], output: Path) -> None:
    before = (output / "e2e" / "report" / "report.json").stat().st_mtime_ns
    again = _cli(*words, "--backends", "llamacpp")
    assert again.returncode == 0, again.stderr[-4000:]
    assert "nothing changed since it was verified at" in " ".join(again.stderr.split())
    assert (output / "e2e" / "report" / "report.json").stat().st_mtime_ns == before


def test_a_planted_secret_is_found_nowhere(report: dict[str, Any], first: subprocess.CompletedProcess[str], output: Path) -> None:
    assert PLANTED not in first.stdout + first.stderr
    assert not [line for line in _command_lines if PLANTED in line]
    assert any("ipykernel" in line for line in _command_lines)  # the watch saw the run
    files = [path for path in output.rglob("*") if path.is_file()]
    assert not [path for path in files if PLANTED.encode() in path.read_bytes()]


def test_executed_notebooks_run_again_under_nbval(report: dict[str, Any], output: Path) -> None:
    copies = [str(output / "e2e" / "notebooks" / f"{name}.ipynb") for name in ("01_finetune", "02_export")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-cell-timeout=600", *copies]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=output)
    assert done.returncode == 0, done.stdout[-4000:]
    assert _left_over(output) == []


def test_a_changed_artefact_fails_verification_with_exit_code_1(report: dict[str, Any], output: Path) -> None:
    run = output / "e2e"
    reference = run / "reference" / "tuned.jsonl"
    kept = reference.read_text()
    # a reference that is always right: the served model is then too far from it
    rows = [json.loads(line) for line in (run / "heldout.jsonl").read_text().splitlines()]
    reference.write_text(
        "".join(json.dumps({"text": row["messages"][-1]["content"], "finish_reason": "stop"}) + "\n" for row in rows)
    )
    try:
        done = _cli("verify", "--run", "e2e", "--output", str(output), "--backends", "llamacpp")
    finally:
        reference.write_text(kept)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "llamacpp.exact" in done.stderr
    assert _left_over(output) == []
