"""A training whose machine is switched off goes on on another one that shares the folder, and ends as if nothing had been."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import tiny
from faults.harness import artefacts, newest_checkpoint, require_tidy
from machines import Machine, machine, require_machines

from pipeline.runs import lock
from pipeline.runs.folder import RunFolder

STEPS, SAVE = 24, 3
CODE = """
import json, logging, sys
from pathlib import Path
from pipeline.runs import lease
from pipeline.runs.folder import RunFolder
from training.export import merge
from training.parameters import FinetuneParameters
from training.tuning.finetune import finetune
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
lease.LEASE = 12.0
run = RunFolder("t", Path(sys.argv[1]))
finetune(run, FinetuneParameters(**json.loads(sys.argv[2])))
merge.merge(run)
"""
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def request_(tmp_path: Path) -> dict[str, object]:
    require_machines()
    rows = [{"prompt": f"alert {i}", "completion": "ok" if i % 2 else "bad"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = tiny.make("3.x-dense", tmp_path / "base")
    given = {"trainer": "hf", "max_steps": STEPS, "save_steps": SAVE, "rank": 4}
    return {"base": str(base), "data": str(tmp_path / "rows.jsonl"), **given}


def _checkpoints(run: RunFolder, step: int, on: Machine, seconds: float = 900) -> None:
    """Wait for a sealed checkpoint of that step or a later one."""
    deadline = time.monotonic() + seconds
    while newest_checkpoint(run) < step or not list(run.checkpoints.glob("*/sealed.json")):
        assert on.process.poll() is None, "training ended before its machine could be switched off"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.long
def test_two_machines_one_after_another_make_what_one_makes(request_: dict[str, object], tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    whole, run = RunFolder("t", tmp_path / "whole"), RunFolder("t", tmp_path / "shared")
    with machine("node-a", CODE, [run.output, json.dumps(request_)], **environment) as a:
        _checkpoints(run, 6, a)
        a.off()
    there = lock.holder(run)
    assert there is not None
    assert there.owners[0].host == "node-a"
    time.sleep(12)  # a verb that does not wait finds the lease over
    with machine("node-b", CODE, [run.output, json.dumps(request_)], **environment) as b:
        assert b.end() == 0, b.said
    assert "which is gone" in b.said
    assert "resuming from checkpoint-" in b.said
    with machine("node-a", CODE, [whole.output, json.dumps(request_)], **environment) as a:
        assert a.end() == 0, a.said
    assert artefacts(run) == artefacts(whole) != {}
    require_tidy(run)
