"""Run the stage notebooks in order with papermill: parameters checked, copies kept, a failing cell shown."""

from __future__ import annotations

import ast
import inspect
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import errors
from pipeline.errors import EnvironmentFailure, InputError, MissingDependency, PipelineError
from pipeline.runs import RunFolder

log = logging.getLogger(__name__)
FOLDER = Path(__file__).parents[1] / "notebooks"
STAGES = ("01_finetune", "02_export", "03_serve", "04_verify")


@dataclass(frozen=True)
class Executed:
    """A notebook that ran: its copy with outputs, and the seconds it took."""

    name: str
    copy: Path
    seconds: float


def parameters_of(notebook: Path) -> dict[str, str]:
    """Names and default source text of a notebook's parameters; InputError when no cell is tagged ``parameters``."""
    import nbformat

    try:
        book = nbformat.read(str(notebook), as_version=4)
    except FileNotFoundError:
        raise EnvironmentFailure(f"{notebook}: no such notebook", remedy="run from a clone of the repository") from None
    except Exception as error:  # nbformat raises whatever its JSON reader and validator raise
        raise InputError(f"{notebook} is not a notebook: {error}") from None
    cells = [c for c in book.cells if c.cell_type == "code" and "parameters" in c.metadata.get("tags", [])]
    if not cells:
        raise InputError(f"{notebook} has no cell tagged 'parameters'", remedy="tag its first code cell")
    found: dict[str, str] = {}
    for node in ast.parse(cells[0].source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            # A, B = 1, 2 is two parameters
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            found |= {n.id: ast.unparse(v) for n, v in zip(names, values, strict=True) if isinstance(n, ast.Name)}
    return found


def run_notebooks(run: RunFolder, stages: Sequence[str], parameters: Mapping[str, Any]) -> list[Executed]:
    """Execute the notebooks; each gets the parameters it declares, and one that none declares is refused.

    Raises the error that a cell raised (with the cell shown), so that the exit code is the stage's own.
    """
    try:
        import papermill
    except ImportError:
        raise MissingDependency(
            "papermill is not installed", remedy="make setup, or pip install 'granite-pipeline[notebook]'"
        ) from None
    declared = {stage: parameters_of(FOLDER / f"{stage}.ipynb") for stage in stages}
    _refuse_unknown(parameters, declared)
    run.notebooks.mkdir(parents=True, exist_ok=True)
    done = []
    for stage in stages:
        copy, begun = run.notebooks / f"{stage}.ipynb", time.monotonic()
        log.info("notebook %s -> %s", stage, copy)
        wanted = {name: value for name, value in parameters.items() if name in declared[stage]}
        try:
            papermill.execute_notebook(
                str(FOLDER / f"{stage}.ipynb"),
                str(copy),
                parameters=wanted,
                kernel_name="python3",
                cwd=str(FOLDER),
                progress_bar=False,
                stderr_file=sys.stderr,
                stdout_file=sys.stderr,
            )
        except papermill.PapermillExecutionError as error:
            raise _as_ours(error, copy) from None
        done.append(Executed(stage, copy, time.monotonic() - begun))
    return done


def _refuse_unknown(parameters: Mapping[str, Any], declared: Mapping[str, Mapping[str, str]]) -> None:
    from difflib import get_close_matches

    known = {name for names in declared.values() for name in names}
    for name in parameters:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"no notebook has a parameter {name!r}", remedy=f"{hint}Known: {', '.join(sorted(known))}")


def _as_ours(error: Any, copy: Path) -> PipelineError:
    """The cell's own error when it is one of ours, else an EnvironmentFailure; both show the failing cell."""
    tree = {name: kind for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, PipelineError)}
    kind = tree.get(error.ename, EnvironmentFailure)
    source = "\n".join(f"    {line}" for line in str(error.source).strip().splitlines()[:12])
    text = str(error.evalue).strip()
    if error.ename not in tree:
        text = f"{error.ename}: {text}"
    return kind(text, evidence=f"in {copy}, cell {error.exec_count}:\n{source}")
