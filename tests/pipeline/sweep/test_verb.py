"""``granite-pipeline sweep`` as a process: what its exit code says, what it shows, what Ctrl-C does; the runs are stand-ins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
# a package named pipeline: the run's name says how it ends
STAND_IN = """
import os, pathlib, signal, sys, time
words = sys.argv
name, output = words[words.index("--name") + 1], pathlib.Path(words[words.index("--output") + 1])
with (output / "started").open("a") as out:
    out.write(f"{name} {os.getpid()} {words[words.index('--stages') + 1]}\\n")
if name == "sleep":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    (output / "ready").touch()
    time.sleep(600)
print(f"error: {name} <b>said</b> why", flush=True)
sys.exit(int(name[-1]))
"""
_VERB = """
import sys
from pathlib import Path
from pipeline.sweep import guarded
guarded._ROOT, guarded.PAUSE_SECONDS = Path(sys.argv.pop(1)), 0.05
from pipeline.cli import main
main()
"""


class Verb:
    def __init__(self, folder: Path) -> None:
        self.folder, self.output, self.spec = folder, folder / "out", ""
        (folder / "stand-in" / "pipeline").mkdir(parents=True)
        (folder / "stand-in" / "pipeline" / "__init__.py").touch()
        (folder / "stand-in" / "pipeline" / "__main__.py").write_text(STAND_IN)
        self.output.mkdir()

    def start(self, *names: str, more: tuple[str, ...] = (), path: str = "") -> subprocess.Popen[str]:
        (self.folder / "sweep.yaml").write_text(self.spec + "runs:\n" + "".join(f"  {name}: {{}}\n" for name in names))
        words = [sys.executable, "-c", _VERB, str(self.folder / "stand-in"), "sweep", str(self.folder / "sweep.yaml")]
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}", "HOME": str(self.folder)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*words, "--output", str(self.output), *more], text=True, env=env, cwd=ROOT, **pipes)

    def done(self, *names: str, more: tuple[str, ...] = (), path: str = "") -> tuple[int, str, str]:
        process = self.start(*names, more=more, path=path)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    @property
    def started(self) -> list[list[str]]:
        path = self.output / "started"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def verb(tmp_path: Path) -> Verb:
    return Verb(tmp_path)


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_index_becomes_the_run(verb: Verb, code: int) -> None:
    """The scheduler's own process is the run: its signals reach it, and its exit code is the run's."""
    process = verb.start("exit0", "exit1", "exit2", "exit3", more=("--index", str(code)))
    process.communicate(timeout=120)
    assert process.returncode == code
    assert verb.started == [[f"exit{code}", str(process.pid), "01_finetune,02_export"]]
    assert not (verb.output / "sweep.html").exists()


@pytest.mark.parametrize(
    ("names", "code", "said"),
    [
        (("a0", "b0"), 0, ""),
        (("a0", "b1"), 1, "1 of 2 runs did not pass their verification: b1"),
        (("a1", "b2"), 2, "1 of 2 runs were given what cannot be: b2"),
        (("a2", "b3", "c1"), 3, "1 of 3 runs could not be done here: b3"),
    ],
)
def test_the_sweeps_exit_code_is_the_worst_of_its_runs(verb: Verb, names: tuple[str, ...], code: int, said: str) -> None:
    ended, out, err = verb.done(*names, more=("--jobs", "2", "--json"))
    assert (ended, said in err) == (code, True)
    told = json.loads(out)
    assert told == json.loads((verb.output / "sweep.json").read_text())
    assert told["exit_code"] == code
    assert {run["name"]: run["exit_code"] for run in told["runs"]} == {name: int(name[-1]) for name in names}
    assert [run["tries"] for run in told["runs"]] == [4 if name[-1] == "3" else 1 for name in names]
    # one line an event, however long, where there is no terminal; what a run said never becomes markup
    for name in names:
        assert [line for line in err.splitlines() if f" {name}: " in line and f"of {len(names)})" in line]
    page = (verb.output / "sweep.html").read_text()
    assert "<b>said" not in page
    assert ("&lt;b&gt;said&lt;/b&gt;" in page) == (code > 0)


def test_ctrl_c_ends_the_runs_and_the_same_command_goes_on(verb: Verb) -> None:
    process = verb.start("a0", "sleep", "c0")
    deadline = time.monotonic() + 100
    while not (verb.output / "ready").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "run the same command again to go on" in err) == (130, True)
    assert [name for name, *_ in verb.started] == ["a0", "sleep"]
    assert not Path(f"/proc/{verb.started[1][1]}").exists()
    assert [run["state"] for run in json.loads((verb.output / "sweep.json").read_text())["runs"]] == [
        "done",
        "stopped",
        "waiting",
    ]


def test_the_best_run_is_exported_where_the_stages_do_not(verb: Verb) -> None:
    verb.spec = "stages: [01_finetune]\n"
    for name, loss in (("a0", 2.0), ("b0", 1.0)):
        run = RunFolder(name, verb.output)
        run.adapter.mkdir(parents=True)
        (run.adapter / "w").touch()
        Manifest(run.manifest).record("finetune", {"parameters": {}}, [run.adapter], {"eval_loss": {"after": loss}}, 1)
    code, _, err = verb.done("a0", "b0", more=("--export", "best"))
    assert code == 0, err
    assert [(name, stages) for name, _, stages in verb.started] == [
        ("a0", "01_finetune"),
        ("b0", "01_finetune"),
        ("b0", "01_finetune,02_export"),
    ]
    told = json.loads((verb.output / "sweep.json").read_text())
    assert (told["best"], told["metric"], told["lower_is_better"]) == ("b0", "eval_loss", True)


def test_without_ray_it_says_what_to_install(verb: Verb, tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('no ray')")
    code, _, err = verb.done("a0", more=("--on", "ray"), path=str(tmp_path))
    assert (code, verb.started) == (3, [])
    assert "pip install 'granite-pipeline[scale]'" in err
