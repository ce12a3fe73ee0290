"""SIGKILL at random moments of every stage: the same artefacts as an undisturbed run, and nothing half-written on the way.

The seeds are fixed, so a failure can be repeated; what was killed when is printed. CI does one round; ``-m long`` at least 60 kills.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from faults.harness import FINAL, STAGES, Line, Watcher, artefacts, require_tidy, round_of_kills

from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from training.tuning import checkpoints

STEPS, SAVE = 24, 3
SHORT = ["finetune", "finetune", "merge", "gguf", "evaluate_base", "evaluate_tuned"]
LONG = [
    "finetune",
    "finetune",
    "finetune",
    "finetune",
    "merge",
    "merge",
    "gguf",
    "gguf",
    "modelfile",
    "evaluate_base",
    "evaluate_tuned",
]
ROUNDS = int(os.environ.get("KILL_ROUNDS", "8"))
FIRST_SEED = int(os.environ.get("KILL_SEED", "100"))


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    running = Line(tmp_path_factory.mktemp("line") / "line.log")
    yield running
    running.close()


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"prompt": f"alert {i}", "completion": "ok" if i % 2 else "bad"} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = tiny.make("3.x-dense", folder / "base")
    return {"base": str(base), "data": str(folder / "rows.jsonl"), "steps": STEPS, "save": SAVE}


@pytest.fixture(scope="module")
def reference(line: Line, request_: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An undisturbed run: the hash of each artefact, and the seconds of each stage."""
    request = {**request_, "output": str(tmp_path_factory.mktemp("undisturbed"))}
    line.start(request)
    assert line.wait() == 0, line.log.read_text()[-4000:]
    run = RunFolder("t", Path(request["output"]))
    stages = Manifest(run.manifest).data["stages"]
    return {"artefacts": artefacts(run), "seconds": {name: stages[name]["seconds"] + 0.05 for name in STAGES}}


def _round(line: Line, request: dict[str, Any], reference: dict[str, Any], seed: int, plan: list[str]) -> int:
    run = RunFolder("t", Path(request["output"]))
    begun = time.monotonic()
    with Watcher(run, reference["artefacts"]) as watcher:
        kills = round_of_kills(line, request, seed, plan, reference["seconds"])
    print(f"seed {seed}, {time.monotonic() - begun:.0f} s: {[(k.stage, k.after, k.newest, k.resumed) for k in kills]}")
    assert watcher.wrong == []
    assert artefacts(run) == reference["artefacts"]
    require_tidy(run)
    # what a kill costs: training goes on at most one interval before the newest checkpoint, which may be a torn one
    for kill in kills:
        if kill.stage == "finetune":
            assert kill.resumed >= kill.newest - SAVE, kill
    return len(kills)


@pytest.mark.slow
def test_a_killed_line_ends_with_the_artefacts_of_an_undisturbed_one(
    line: Line, request_: dict[str, Any], reference: dict[str, Any], tmp_path: Path
) -> None:
    assert set(reference["artefacts"]) == set(FINAL)
    assert _round(line, {**request_, "output": str(tmp_path)}, reference, seed=1, plan=SHORT) >= 4


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + ROUNDS))
def test_many_kills(seed: int, line: Line, request_: dict[str, Any], reference: dict[str, Any], tmp_path: Path) -> None:
    assert _round(line, {**request_, "output": str(tmp_path)}, reference, seed, LONG) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, pytest.param(2, marks=pytest.mark.wide)])
def test_ctrl_c_keeps_what_is_done(
    presses: int, line: Line, request_: dict[str, Any], reference: dict[str, Any], tmp_path: Path
) -> None:
    request, run = {**request_, "output": str(tmp_path)}, RunFolder("t", tmp_path)
    pid = line.start(request)
    assert line.seen(pid, "finetune") == "finetune"
    deadline = time.monotonic() + 120
    while not (run.checkpoints / f"checkpoint-{SAVE}" / "sealed.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for _ in range(presses):
        os.kill(pid, signal.SIGINT)
        time.sleep(0.001)
    assert line.wait() == 130
    if presses == 1:
        said = line.log.read_text()
        step = int(re.findall(rf"stopped as asked; the checkpoint of step (\d+) of {STEPS} is kept", said)[-1])
        assert checkpoints.problem(run.checkpoints / f"checkpoint-{step}") is None
    line.start({**request, "gguf": False})
    assert line.wait() == 0
    expected = {name: digest for name, digest in reference["artefacts"].items() if name not in ("unsloth.Q8_0.gguf", "Modelfile")}
    assert artefacts(run) == expected
