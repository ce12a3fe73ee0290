"""Which servers ``run`` stops when it ends: those that it started, and no others."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from pipeline import batch
from pipeline.commands import run as line
from pipeline.engines.base import Launch
from pipeline.errors import InputError, MissingDependency, RunLocked
from pipeline.runs import lock
from pipeline.runs.folder import RunFolder
from pipeline.serve import records, server
from pipeline.serve.records import Record
from pipeline.serve.server import Server

# a process of its own that holds the run, as a first `make run` does
HOLDER = """
import sys, time
from pathlib import Path
from pipeline.runs import lock
from pipeline.runs.folder import RunFolder
with lock.held(RunFolder("test", Path(sys.argv[1])), "run"):
    time.sleep(600)
"""
STARTS_A_SERVER = """
import os, sys
from pathlib import Path
from pipeline.serve import records, server
from pipeline.serve.records import Record
from pipeline.engines.base import Launch
folder = Path({folder!r})
launch = Launch("ollama", (sys.executable, "-c", "import time; time.sleep(600)"), {{}}, "http://127.0.0.1:9", "/health", "m")
process = server.start(launch, folder / "logs" / "ollama-2.log", owner=None)
records.save(folder / "servers", records.Record("ollama", process))
"""


@pytest.fixture
def there(run: RunFolder) -> Iterator[Server]:
    """A llama.cpp server of the run that somebody else started."""
    launch = Launch("llamacpp", (sys.executable, "-c", "import time; time.sleep(600)"), {}, "http://127.0.0.1:9", "/health", "m")
    process = server.start(launch, run.logs / "llamacpp-1.log", owner=os.getpid())
    records.save(run.path / "servers", Record(process.engine, process))
    yield process
    server.stop(process)


@pytest.fixture(autouse=True)
def _owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(line.OWNER_VARIABLE, "")


def test_a_refused_run_leaves_the_first_runs_servers(run: RunFolder, there: Server) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run.output)])
    try:
        deadline = time.monotonic() + 30
        while lock.holder(run) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(RunLocked):
            line._execute(run, ["01_finetune"], {})
    finally:
        holder.kill()
        holder.wait()
    assert records.running(run.path / "servers") == [there]


def test_a_run_that_ends_leaves_the_servers_that_ran_before_it(run: RunFolder, there: Server) -> None:
    with pytest.raises(InputError, match="no notebook has a parameter 'NONSENSE'"):
        line._execute(run, ["01_finetune"], {"NONSENSE": 1})
    assert records.running(run.path / "servers") == [there]


def test_what_export_needs_is_missed_before_training(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[list[str]] = []
    monkeypatch.setattr(line, "_execute", lambda _, chosen, given: begun.append(chosen) or ([], []))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "xllamacpp" else real(name, *a))
    with pytest.raises(MissingDependency, match="xllamacpp is not installed"):
        line._work(run, ["01_finetune", "02_export"], {})
    assert begun == []
    # training alone does not need it, nor does a run that has its GGUF
    line._work(run, ["01_finetune"], {})
    run.path.mkdir(parents=True)
    run.gguf.touch()
    line._work(run, ["01_finetune", "02_export"], {})
    assert len(begun) == 2


@pytest.mark.slow
def test_a_run_stops_what_its_notebooks_started_and_asks_them_to_keep_the_rest(
    run: RunFolder, there: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = nbformat.v4.new_notebook()
    book.cells = [
        nbformat.v4.new_code_cell("KEEP_SERVERS = False", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(STARTS_A_SERVER.format(folder=str(run.path)) + "assert KEEP_SERVERS"),
    ]
    book.metadata["language_info"] = {"name": "python"}
    nbformat.write(book, tmp_path / "04_verify.ipynb")
    monkeypatch.setattr(batch, "FOLDER", tmp_path)
    executed, stopped = line._execute(run, ["04_verify"], {})
    assert ([entry.name for entry in executed], stopped) == (["04_verify"], ["ollama"])
    assert records.running(run.path / "servers") == [there]
