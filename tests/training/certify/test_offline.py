"""Certifying beside another process that changes the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import Settings
from pipeline.errors import RunLocked
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from training.certify.certify import Scope, certify
from training.certify.offline import certify_offline
from training.parameters import FinetuneParameters

_HOLD = """import sys; from pathlib import Path; from pipeline.runs import lock; from pipeline.runs.folder import RunFolder
with lock.held(RunFolder(sys.argv[1], Path(sys.argv[2])), "train"):
    print(flush=True)
    sys.stdin.read()"""


def test_a_run_that_another_process_holds_is_not_certified(run: RunFolder, tmp_path: Path) -> None:
    parameters = FinetuneParameters(base=str(tmp_path / "gone"), data=str(tmp_path / "gone.jsonl")).to_json()
    inputs = {"parameters": parameters, "base": {"id": parameters["base"], "revision": None}, "data": {}}
    Manifest(run.manifest).record("finetune", inputs, [], {}, 1)
    command = [sys.executable, "-c", _HOLD, run.name, str(run.output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        for certifying in (lambda: certify_offline(run), lambda: certify(run, Settings(), Scope(()))):
            with pytest.raises(RunLocked):
                certifying()
    assert not run.certificate.exists()
