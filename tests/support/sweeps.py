"""A sweep in miniature: a random Granite of a few megabytes, three dozen rows, and a spec over both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import tiny
import yaml

from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest

ROOT = Path(__file__).parents[2]
# small enough to train in seconds, long enough to be killed after a checkpoint
SHORT = {"TRAINER": "hf", "RANK": 4, "BATCH_SIZE": 2, "MAX_STEPS": 30, "SAVE_STEPS": 2}
_ANSWERS = {"BASE_ANSWERS": 2, "TUNED_ANSWERS": 4}


def write_spec(folder: Path, **more: Any) -> Path:
    """``sweep.yaml`` with its base and data beside it; ``more`` are keys of the spec."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").is_dir():
        tiny.make("4.1", folder / "base")
    for part, first in (("train", 0), ("heldout", 100)):
        rows = [_row(number) for number in range(first, first + 24)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parameters = SHORT | ({} if "stages" in more else _ANSWERS)  # the export's
    spec = {"base": "base", "data": "train.jsonl", "eval_data": "heldout.jsonl", "parameters": parameters, **more}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def _row(number: int) -> dict[str, Any]:
    asked, said = f"Which severity has alert {number}?", json.dumps({"severity": ("low", "high")[number % 2]})
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def environment(home: Path, **more: str) -> dict[str, str]:
    """Of a user of their own, whose home is an empty folder."""
    home.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GRANITE_PIPELINE", "XDG_"))}
    found = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    fixed = {
        "HOME": str(home),
        "MPLCONFIGDIR": str(home.parent / "fonts"),  # a list of the fonts there are, which it would keep in the home
        "PYTHONPATH": found,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**kept, **fixed, **more}


def start(words: list[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """``granite-pipeline`` with these words, in a session of its own."""
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", *words], stdout=out, stderr=out, env=env, cwd=ROOT, start_new_session=True
        )


def wait_for_checkpoint(run: RunFolder, step: int, process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    """Wait until a run has a sealed checkpoint of at least that step."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        steps = [int(path.parent.name.rpartition("-")[2]) for path in run.checkpoints.glob("checkpoint-*/sealed.json")]
        if max(steps, default=0) >= step:
            return
        assert process.poll() is None, f"ended with {process.returncode} before step {step}"
        time.sleep(0.05)
    raise TimeoutError(f"{run.name} never got to step {step}")


def working_on(folder: Path) -> list[psutil.Process]:
    """The processes that have something to do with a folder: its path is among their words or in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                words = [*process.cmdline(), *process.environ().values()]
                found += [process] if any(str(folder) in word for word in words) else []
        except psutil.Error:
            continue
    return found


def gone(folder: Path, seconds: float = 30) -> list[psutil.Process]:
    """Those that still work on a folder after a while; empty when all ended."""
    deadline = time.monotonic() + seconds
    while (left := working_on(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def hashes(run: RunFolder) -> dict[str, str]:
    """Of what a run made that does not name the run: adapter and merged weights."""
    stages = Manifest(run.manifest).stages
    made = (("finetune", "adapter"), ("merge", "merged_fp16"))
    return {name: stages[stage].artefacts[name].sha256 for stage, name in made if stage in stages}
