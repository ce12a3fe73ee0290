"""Every malformed input of the corpus: the documented error, exit code 2, in less than 5 s and 1 GiB."""

from __future__ import annotations

import inspect
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_inputs import datasets, headers, models, others
from bad_inputs.case import Case
from typer.testing import CliRunner

from pipeline import config, errors
from pipeline.batch import parameters_of
from pipeline.cli import app
from pipeline.errors import PipelineError
from pipeline.modelfile.modelfile import read_modelfile
from pipeline.verify.score import read_held_out

CORPUS = [*datasets.CASES, *headers.CASES, *models.CASES, *others.CASES]
FUNCTIONS: dict[str, Callable[[Path], object]] = {
    "env": lambda folder: config.load(folder / ".env"),
    "modelfile": lambda folder: read_modelfile(folder / "Modelfile"),
    "notebook": lambda folder: parameters_of(folder / "n.ipynb"),
    "heldout": lambda folder: read_held_out(folder / "h.jsonl"),
}
KINDS = dict(inspect.getmembers(errors, inspect.isclass))
SECONDS, BYTES = 5.0, 2**30
# through a real process too: one of each kind
REAL = (
    "dataset: NaN",
    "gguf: 2^40 tensors",
    "base model: tokenizer.json is {}",
    "chat template: loops for ever",
    "manifest: cut",
)


def _write(case: Case, folder: Path) -> None:
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert isinstance(content, bytes)
        path.write_bytes(content)


def _error(case: Case, folder: Path) -> BaseException | None:
    """What the verb (or the function behind it) ends with."""
    if len(case.verb) == 1:
        with pytest.raises(PipelineError) as caught:
            FUNCTIONS[case.verb[0]](folder)
        return caught.value
    words = [word.replace("{folder}", str(folder)) for word in case.verb]
    return CliRunner().invoke(app, words).exception


def _peak() -> int:
    """Peak resident bytes since :func:`_forget`; 0 where the kernel does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _forget() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not reset the peak here")


def test_the_corpus_is_large_and_its_names_differ() -> None:
    assert len({case.name for case in CORPUS}) == len(CORPUS) >= 80


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_bad_input_gives_its_documented_error(case: Case, tmp_path: Path) -> None:
    _write(case, tmp_path)
    _forget()
    before, begun = _peak(), time.process_time()  # of this process: a busy machine is not our slowness
    error = _error(case, tmp_path)
    seconds, grown = time.process_time() - begun, _peak() - before
    assert isinstance(error, KINDS[case.kind]), repr(error)
    assert error.exit_code == 2
    for word in case.words:
        assert word in str(error), str(error)[:2000]
    assert seconds < SECONDS
    assert grown < BYTES


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CORPUS if case.name in REAL], ids=lambda case: case.name)
def test_a_real_process_says_it_without_a_traceback(case: Case, tmp_path: Path) -> None:
    _write(case, tmp_path)
    words = [word.replace("{folder}", str(tmp_path)) for word in case.verb]
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    for word in case.words:
        assert word in done.stderr.replace("\n", " "), done.stderr
