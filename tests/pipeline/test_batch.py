from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from pipeline import batch
from pipeline.errors import DataError, EngineError, EnvironmentFailure, InputError
from pipeline.runs.folder import RunFolder
from pipeline.serve.backends import Started
from pipeline.serve.start import Endpoint


def _book(path: Path, *cells: str, tag: str = "parameters") -> None:
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    book.cells[0].metadata["tags"] = [tag]
    book.metadata["language_info"] = {"name": "python"}
    nbformat.write(book, path)


@pytest.mark.parametrize("stage", batch.STAGES)
def test_committed_notebooks_keep_the_rules(stage: str) -> None:
    book = nbformat.read(batch.FOLDER / f"{stage}.ipynb", as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert book.cells[0].cell_type == "markdown"
    assert code[0].metadata.tags == ["parameters"]
    assert len(code) <= 12
    assert all(cell.source.count("\n") < 8 for cell in code[1:])
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert not any(line.lstrip().startswith(("def ", "class ")) for cell in code for line in cell.source.splitlines())
    assert "assert" in code[-1].source or "require" in code[-1].source


def _last_cell(stage: str, **names: Any) -> None:
    book = nbformat.read(batch.FOLDER / f"{stage}.ipynb", as_version=4)
    exec([cell for cell in book.cells if cell.cell_type == "code"][-1].source, names)


def test_a_check_that_failed_does_not_keep_the_run_from_its_report(run: RunFolder) -> None:
    for folder in (run.adapter, run.merged):
        folder.mkdir(parents=True)
    for file in (run.heldout, run.gguf):
        file.touch()
    _last_cell("01_finetune", run=run, result=SimpleNamespace(result={"eval_loss": {"before": 1.0, "after": 2.0}}))
    _last_cell("02_export", run=run, scores={"base": {"exact": 1.0}, "tuned": {"exact": 0.0}})
    up = Started("llamacpp", "ready", endpoint=Endpoint("llamacpp", "http://127.0.0.1:9", "m"))
    _last_cell("03_serve", started=[Started("vllm", "failed", "no memory"), up])


def test_nothing_to_serve_with_is_an_error_that_has_every_reason() -> None:
    with pytest.raises(EngineError, match="no backend could be started") as caught:
        _last_cell("03_serve", started=[Started("vllm", "failed", "no memory"), Started("ollama", "skipped", "not installed")])
    assert caught.value.evidence == "vllm failed: no memory\nollama skipped: not installed"


@pytest.mark.parametrize(
    ("stages", "given", "told"),
    [
        (batch.STAGES, {}, {"SERVE": ["vllm", "llamacpp", "ollama"]}),
        (batch.STAGES, {"BACKENDS": ["llamacpp"]}, {"SERVE": ["llamacpp"]}),
        (batch.STAGES, {"SERVE": []}, {}),
        (("01_finetune", "02_export"), {}, {}),
        (("02_export", "04_verify"), {"BACKENDS": ["llamacpp"]}, {}),
    ],
)
def test_the_export_is_told_what_is_served_next(stages: tuple[str, ...], given: dict[str, Any], told: dict[str, Any]) -> None:
    declared = batch.declared_by(stages, given)
    assert batch._ahead("02_export", declared, given) == told
    assert not any(batch._ahead(stage, declared, given) for stage in stages if stage != "02_export")


def test_parameters_are_read_with_their_defaults(tmp_path: Path) -> None:
    _book(tmp_path / "a.ipynb", 'NAME = "x"\nA, B = 1, None\nC: float = 0.5')
    assert batch.parameters_of(tmp_path / "a.ipynb") == {"NAME": "'x'", "A": "1", "B": "None", "C": "0.5"}


def test_a_notebook_without_the_tag_is_refused(tmp_path: Path) -> None:
    _book(tmp_path / "a.ipynb", "NAME = 1", tag="other")
    with pytest.raises(InputError, match="no cell tagged 'parameters'"):
        batch.parameters_of(tmp_path / "a.ipynb")


def test_an_unknown_parameter_is_refused_with_the_near_name(run: RunFolder) -> None:
    with pytest.raises(InputError, match="no notebook has a parameter 'EPOCH'") as caught:
        batch.run_notebooks(run, ["01_finetune"], {"EPOCH": 1})
    assert "did you mean EPOCHS?" in caught.value.remedy
    assert not run.path.exists()


@pytest.mark.slow
def test_a_failing_cell_ends_the_run_as_its_own_error_and_is_shown(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "FOLDER", tmp_path)
    _book(
        tmp_path / "01_finetune.ipynb",
        "X = 1",
        "from pipeline.errors import DataError\nraise DataError(f'bad row {X}', remedy='mend it')",
    )
    with pytest.raises(DataError, match="bad row 2") as caught:
        batch.run_notebooks(run, ["01_finetune"], {"X": 2})
    assert "raise DataError" in caught.value.evidence
    assert (run.notebooks / "01_finetune.ipynb").is_file()
    _book(tmp_path / "01_finetune.ipynb", "X = 1", "1 / 0")
    with pytest.raises(EnvironmentFailure, match="ZeroDivisionError"):
        batch.run_notebooks(run, ["01_finetune"], {})
