"""lm-evaluation-harness tasks against an endpoint (``--tasks``), to see what the training made the model forget.

The harness is optional and fetches its tasks' data sets: pip install "lm-eval[api]".
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.report.check import Check, skipped
from pipeline.runs.folder import RunFolder
from pipeline.serve.start import Endpoint

_SECONDS = 3600


def command(endpoint: Endpoint, run: RunFolder, tasks: str, target: Path) -> list[str]:
    """The harness's argv: completions with log-probabilities, tokenised as the merged model does."""
    arguments = {
        "model": endpoint.model,
        "base_url": f"{endpoint.url}/v1/completions",
        "tokenizer": str(run.merged),
        "tokenizer_backend": "huggingface",
        "num_concurrent": "4",
    }
    joined = ",".join(f"{key}={value}" for key, value in arguments.items())
    harness = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", joined]
    return [*harness, "--tasks", tasks, "--output_path", str(target)]


def run_tasks(endpoint: Endpoint, run: RunFolder, tasks: str) -> Check:
    """Scores of the tasks; skipped, with the reason, when the harness is not installed or fails."""
    check_id = f"own.{endpoint.engine}_tasks"
    if importlib.util.find_spec("lm_eval") is None:
        return skipped(check_id, 'lm-evaluation-harness is not installed: pip install "lm-eval[api]"')
    with TemporaryDirectory(prefix="lm-eval-") as scratch:
        target = Path(scratch)
        try:
            done = subprocess.run(
                command(endpoint, run, tasks, target), capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return skipped(check_id, f"{tasks} took more than {_SECONDS} s")
        found = sorted(target.rglob("results*.json"))
        if done.returncode != 0 or not found:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return skipped(check_id, f"lm-eval ended with exit code {done.returncode}: {last[:300]}")
        return read_results(check_id, json.loads(found[-1].read_text(encoding="utf-8")))


def read_results(check_id: str, results: dict[str, Any]) -> Check:
    """The harness's results file as a finding; its scores are stated, not bounded."""
    scores = {
        f"{task} {metric.partition(',')[0]}": value
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric
    }
    figure = ", ".join(f"{name} {value:.4g}" for name, value in scores.items()) or "no score"
    return Check(check_id, "passed", figure, "stated, not bounded", "lm-evaluation-harness", scores)
