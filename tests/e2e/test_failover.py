"""``benchmarks/failover.py`` for real: the primary is killed under load, the fallback answers, the primary is used again."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import make_servable_run

from pipeline.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]
needs_gateway = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("litellm", "apscheduler"))), reason="the gateway extra is not installed"
)


def _scenario(*words: str, timeout: float) -> dict[str, object]:
    command = [sys.executable, str(ROOT / "benchmarks" / "failover.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return dict(json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.wide
@needs_gateway
def test_two_llamacpp_servers_stand_in_for_each_other(tmp_path: Path) -> None:
    run = make_servable_run(RunFolder("generic", tmp_path))
    words = ["--output", str(run.output), "--primary", "llamacpp", "--ports", "free", "--requests", "48", "--max-tokens", "8"]
    found = _scenario(*words, timeout=600)
    assert found["requests"] == 48
    assert found["answered"] == {"answered": 36}
    assert len(found["by_artefact"]) == 1  # type: ignore[arg-type]


@pytest.mark.long
@pytest.mark.slow
@needs_gateway
def test_vllm_and_llamacpp_on_their_documented_ports() -> None:
    if not (ROOT / "training/output/generic/merged_fp16").is_dir():
        pytest.skip("needs a finished run: granite-pipeline run")
    found = _scenario("--output", str(ROOT / "training/output"), timeout=1200)
    assert found["requests"] == 200
    assert len(found["by_artefact"]) == 2  # type: ignore[arg-type]
