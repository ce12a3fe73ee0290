"""Real sweeps of papermill runs, killed: every run ends with the adapter of one that nobody disturbed, and nothing is left behind.

On this machine, and on a Ray cluster of two machines (namespaces), of which one is switched off. The driver is killed in both.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import sweeps

from pipeline.commands.sweep import _check
from pipeline.runs import lock
from pipeline.runs.files import leftovers
from pipeline.runs.folder import RunFolder
from pipeline.sweep import spec

pytestmark = [pytest.mark.slow, pytest.mark.wide]
_RESUMED = re.compile(r"resuming from checkpoint-(\d+)")
# the fine-tune alone, in a process that is no notebook and that nobody disturbs
_UNDISTURBED = """
import json, sys
from pathlib import Path
from pipeline.runs.folder import RunFolder
from training.export import merge
from training.parameters import FinetuneParameters
from training.tuning.finetune import finetune
run = RunFolder("undisturbed", Path(sys.argv[1]))
finetune(run, FinetuneParameters.from_notebook(json.loads(sys.argv[2])))
if sys.argv[3] == "merge":
    merge.merge(run)
"""


def _undisturbed(folder: Path, file: Path, *, merged: bool) -> dict[str, str]:
    """Hashes of what the first run of a spec makes in one go."""
    first = spec.load(file, _check).runs[0]
    output = folder / "reference"
    words = [sys.executable, "-c", _UNDISTURBED, str(output), json.dumps(dict(first.parameters)), "merge" if merged else ""]
    subprocess.run(words, check=True, env=sweeps.environment(folder / "home"), capture_output=True)
    return sweeps.hashes(RunFolder("undisturbed", output))


def _require_whole(output: Path, names: Sequence[str], expected: dict[str, str]) -> None:
    """Every run is done, as the undisturbed one, and no scratch, checkpoint or lock is left of those that were killed."""
    told = json.loads((output / "sweep.json").read_text())
    assert [(run["name"], run["state"], run["exit_code"]) for run in told["runs"]] == [(name, "done", 0) for name in names]
    for name in names:
        run = RunFolder(name, output)
        assert sweeps.hashes(run) == expected, name
        assert leftovers(run.path) == []
        assert not run.checkpoints.exists()
        assert lock.holder(run) is None
    assert (output / "sweep.html").is_file()


def _resumed(run: RunFolder) -> list[int]:
    return [int(step) for step in _RESUMED.findall((run.logs / "sweep.log").read_text())]


def _files(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file()]


def test_a_run_and_the_driver_are_killed_and_the_same_command_goes_on(tmp_path: Path) -> None:
    names, output = ("a", "b"), tmp_path / "out"
    file = sweeps.write_spec(tmp_path, runs={name: {} for name in names}, stages=["01_finetune"])
    env, words = sweeps.environment(tmp_path / "home"), ["sweep", str(file), "--output", str(output), "--jobs", "2"]
    one, other = (RunFolder(name, output) for name in names)
    driver = sweeps.start(words, env, tmp_path / "driver.log")
    try:
        sweeps.wait_for_checkpoint(one, 2, driver)
        holder = lock.holder(one)
        assert holder
        os.kill(holder.owners[0].pid, signal.SIGKILL)
        sweeps.wait_for_checkpoint(other, 4, driver)
    finally:
        driver.kill()
        driver.wait()
    assert sweeps.gone(output) == []
    again = sweeps.start(words, env, tmp_path / "driver.log")
    assert again.wait(600) == 0, (tmp_path / "driver.log").read_text()
    assert sweeps.gone(output) == []
    assert all(_resumed(run) for run in (one, other))
    _require_whole(output, names, _undisturbed(tmp_path, file, merged=False))
    assert _files(tmp_path / "home") == []


def _on_two_nodes(tmp_path: Path, names: Sequence[str], **more: Any) -> None:
    """A sweep on two machines: one of them is switched off, then the driver is killed, then the same command again."""
    import clusters
    import machines

    machines.require_machines()
    if importlib.util.find_spec("ray") is None:
        pytest.fail("ray is not installed: make setup brings it")
    output = tmp_path / "out"
    file = sweeps.write_spec(tmp_path, runs={name: {} for name in names}, resources={"cpus": 1}, **more)
    runs = [RunFolder(name, output) for name in names]
    words = [sys.executable, "-m", "pipeline", "sweep", str(file), "--on", "ray", "--output", str(output)]
    with clusters.two_nodes(tmp_path) as (head, other):

        def started() -> subprocess.Popen[bytes]:
            with (tmp_path / "driver.log").open("ab") as out:
                command = [*head.inside, *words]
                return subprocess.Popen(command, stdout=out, stderr=out, env=dict(head.env), cwd=sweeps.ROOT)

        driver = started()
        lost = _first_on(other.name, runs, driver)
        sweeps.wait_for_checkpoint(lost, 2, driver)
        other.off()
        left = next(run for run in runs if run != lost and (there := lock.holder(run)) and there.owners[0].host == head.name)
        sweeps.wait_for_checkpoint(left, 4, driver)
        for inner in psutil.Process(driver.pid).children(recursive=True):
            inner.kill()
        driver.kill()
        driver.wait()
        assert sweeps.gone(output) == [], "a run outlived the driver"
        again = started()
        assert again.wait(1800) == 0, (tmp_path / "driver.log").read_text()
        assert sweeps.gone(output) == []
    # a line an event, and none of Ray's own
    said = (tmp_path / "driver.log").read_text()
    assert all(re.match(r"\d\d:\d\d:\d\d |sweep: |best of|[a-z]\d*: |[┏┃┡│└]", line) for line in said.splitlines()), said
    assert _resumed(lost) and _resumed(left)
    _require_whole(output, names, _undisturbed(tmp_path, file, merged="stages" not in more))
    assert _files(tmp_path / "home") == []


def _first_on(host: str, runs: Sequence[RunFolder], driver: subprocess.Popen[bytes], seconds: float = 300) -> RunFolder:
    """The first run that a machine works on."""
    import time

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for run in runs:
            if (there := lock.holder(run)) and there.owners[0].host == host:
                return run
        assert driver.poll() is None, f"the driver ended with {driver.returncode}"
        time.sleep(0.2)
    raise TimeoutError(f"no run got to {host}")


def test_a_machine_of_two_and_the_driver_are_lost(tmp_path: Path) -> None:
    _on_two_nodes(tmp_path, ("a", "b", "c"), stages=["01_finetune"])


@pytest.mark.long
def test_a_machine_whose_network_is_cut_finishes_its_run_and_no_other_does_it_again(tmp_path: Path) -> None:
    """Ray gives the run to the other machine, after minutes; which finds it done, by the one that was cut off but sees the folder."""
    import clusters
    import machines

    machines.require_machines()
    output, names = tmp_path / "out", ("a", "b")
    file = sweeps.write_spec(tmp_path, runs={name: {} for name in names}, resources={"cpus": 1}, stages=["01_finetune"])
    runs = [RunFolder(name, output) for name in names]
    with clusters.two_nodes(tmp_path) as (head, other), (tmp_path / "driver.log").open("ab") as out:
        command = [*head.inside, sys.executable, "-m", "pipeline", "sweep", str(file), "--on", "ray", "--output", str(output)]
        driver = subprocess.Popen(command, stdout=out, stderr=out, env=dict(head.env), cwd=sweeps.ROOT)
        cut = _first_on(other.name, runs, driver)
        sweeps.wait_for_checkpoint(cut, 2, driver)
        other.cut_off()
        assert driver.wait(1200) == 0, (tmp_path / "driver.log").read_text()
        assert _resumed(cut) == []
        _require_whole(output, names, _undisturbed(tmp_path, file, merged=False))


@pytest.mark.long
def test_twenty_whole_runs_on_two_machines(tmp_path: Path) -> None:
    _on_two_nodes(tmp_path, [f"r{number}" for number in range(20)])
