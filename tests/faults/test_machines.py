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
import json, sys
from faults import line
from pipeline.runs import lease
lease.LEASE = 12.0
line.preload()
sys.exit(line.child(json.loads(sys.argv[1])))
"""
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def request_(tmp_path: Path) -> dict[str, object]:
    require_machines()
    rows = [{"prompt": f"alert {i}", "completion": "ok" if i % 2 else "bad"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = tiny.make("3.x-dense", tmp_path / "base")
    return {"base": str(base), "data": str(tmp_path / "rows.jsonl"), "steps": STEPS, "save": SAVE, "gguf": False}


def _checkpoints(run: RunFolder, step: int, on: Machine, seconds: float = 240) -> None:
    """Wait for a sealed checkpoint of that step or a later one."""
    deadline = time.monotonic() + seconds
    while newest_checkpoint(run) < step or not list(run.checkpoints.glob("*/sealed.json")):
        assert on.process.poll() is None, "training ended before its machine could be switched off"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.long
def test_three_machines_one_after_another_make_what_one_makes(request_: dict[str, object], tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'support'}"}
    whole, run = RunFolder("t", tmp_path / "whole"), RunFolder("t", tmp_path / "shared")
    with machine("node-a", CODE, [json.dumps({**request_, "output": str(whole.output)})], **environment) as a:
        assert a.end() == 0, a.said
    asked = [json.dumps({**request_, "output": str(run.output)})]
    for host, step in (("node-a", 6), ("node-b", 15)):
        with machine(host, CODE, asked, **environment) as cut:
            _checkpoints(run, step, cut)
            cut.off()
        there = lock.holder(run)
        assert there is not None
        assert there.owners[0].host == host
        time.sleep(12)  # the verb that is asked does not wait: it finds the lease over
    with machine("node-c", CODE, asked, **environment) as c:
        assert c.end() == 0, c.said
    assert "which is gone" in c.said
    assert "resuming from checkpoint-" in c.said
    assert artefacts(run) == artefacts(whole)
    require_tidy(run)
