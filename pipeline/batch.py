"""Run the stage notebooks in order with papermill: parameters checked, copies kept, a failing cell shown."""

import ast
import contextlib
import inspect
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from pipeline import config, errors
from pipeline.errors import EnvironmentFailure, InputError, MissingDependency, PipelineError
from pipeline.runs import interrupt, lock
from pipeline.runs.files import matches, write_atomic
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import HashCache, sha256_json
from pipeline.runs.stages import product
from pipeline.runs.text import MaskingWriter, mask

log = logging.getLogger(__name__)
FOLDER = Path(__file__).parents[1] / "notebooks"
STAGES = ("01_finetune", "02_export", "03_serve", "04_verify")
_LOCAL = ("BASE", "DATA", "EVAL_DATA")
_SOCKET_PATH = 80  # characters: the system takes 107 (104 on a Mac) with the file's name
_ASIDE = ("NAME", "OUTPUT", "FORCE", "SAVE_STEPS", "PROCESSES")


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
    try:
        body = ast.parse(cells[0].source).body
    except (SyntaxError, ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None) or 1
        raise InputError(f"{notebook}, parameters cell, line {line}: not Python ({error})") from None
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            # A, B = 1, 2 is two parameters
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            if len(names) != len(values):
                raise InputError(f"{notebook}, parameters cell, line {node.lineno}: {len(names)} names for {len(values)} values")
            found |= {n.id: ast.unparse(v) for n, v in zip(names, values, strict=True) if isinstance(n, ast.Name)}
    return found


def declared_by(stages: Sequence[str], parameters: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What each notebook declares; InputError for a given parameter that none of them does."""
    from difflib import get_close_matches

    declared = {stage: parameters_of(FOLDER / f"{stage}.ipynb") for stage in stages}
    known = {name for names in declared.values() for name in names}
    for name in parameters:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"no notebook has a parameter {name!r}", remedy=f"{hint}Known: {', '.join(sorted(known))}")
    return declared


def run_notebooks(run: RunFolder, stages: Sequence[str], parameters: Mapping[str, Any]) -> list[Executed]:
    """Execute the notebooks; each gets the parameters it declares, and one that none declares is refused.

    A run that another machine works on is waited for. Raises the error that a cell raised (with the cell shown), so that the exit code is the stage's own.
    """
    try:
        import papermill
    except ImportError:
        remedy = "make setup, or pip install 'granite-pipeline[notebook]'"
        raise MissingDependency("papermill is not installed", remedy=remedy) from None
    declared, done = declared_by(stages, parameters), []
    with lock.held(run, "run", wait=True), _interrupts_kernel(), tempfile.TemporaryDirectory(prefix="granite-") as scratch:
        run.notebooks.mkdir(parents=True, exist_ok=True)
        for stage in stages:
            copy, begun = run.notebooks / f"{stage}.ipynb", time.monotonic()
            log.info("notebook %s -> %s", stage, copy)
            wanted = {name: value for name, value in parameters.items() if name in declared[stage]} | _ahead(
                stage, declared, parameters
            )
            # where no other machine can write: whoever takes the run over writes its own
            running = Path(scratch) / copy.name
            try:
                _execute(FOLDER / f"{stage}.ipynb", running, wanted)
            except papermill.PapermillExecutionError as error:
                raise _as_ours(error, copy) from None
            finally:
                if running.is_file():  # a cell may have printed a secret
                    write_atomic(copy, mask(running.read_text(encoding="utf-8")))
            done.append(Executed(stage, copy, time.monotonic() - begun))
            interrupt.leave_if_asked(f"notebook {stage} is finished, what it made is kept")
    return done


def _ahead(stage: str, declared: Mapping[str, Mapping[str, str]], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a notebook before the one that serves is told to start for it."""
    following = declared.get("03_serve", {})
    if "SERVE" not in declared[stage] or "SERVE" in parameters or not following:
        return {}
    return {"SERVE": parameters.get("BACKENDS", ast.literal_eval(following["BACKENDS"]))}


def _execute(notebook: Path, copy: Path, parameters: Mapping[str, Any]) -> None:
    """Execute one notebook; what its cells print goes to stderr, or with ``--quiet`` only into the copy."""
    import papermill

    # the terminal's handler is asked to be quiet, the run's own log never is
    terminal = [handler for handler in logging.getLogger().handlers if not isinstance(handler, logging.FileHandler)]
    loud = log.isEnabledFor(logging.INFO) and any(handler.level < logging.WARNING for handler in terminal)
    shown = MaskingWriter(sys.stderr) if loud else None
    told: dict[str, Any] = {"progress_bar": False, "stderr_file": shown, "stdout_file": shown}
    with tempfile.TemporaryDirectory(prefix="granite-") as scratch:
        told |= {"kernel_name": "python3", "kernel_manager_class": _own_kernel(Path(scratch))}
        papermill.execute_notebook(str(notebook), str(copy), dict(parameters), cwd=str(FOLDER), **told)


def _own_kernel(scratch: Path) -> type:
    """A manager of kernels that are this very Python, whatever kernelspecs, start-up files and profiles this user has.

    It finds the modules that this process finds, and is spoken to through sockets below ``scratch``: no port, no proxy.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    found = list(dict.fromkeys([str(FOLDER.parent), *(os.path.abspath(path) for path in sys.path if path)]))  # noqa: PTH100
    begin = f"import sys; sys.path[:] = {found!r}; from ipykernel.kernelapp import launch_new_instance as begin; begin()"
    argv = [sys.executable, "-c", begin, "-f", "{connection_file}", "--InteractiveShellApp.exec_PYTHONSTARTUP=False"]
    # the kernel works in another folder, and so does what it starts
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    environment = {"IPYTHONDIR": str(scratch / "ipython")}
    if whole := os.pathsep.join(os.path.abspath(path) for path in given):  # noqa: PTH100
        environment["PYTHONPATH"] = whole
    spec = KernelSpec(argv=argv, display_name="Python 3", language="python", env=environment)
    spoken = {"connection_file": str(scratch / "kernel.json")}
    if len(str(scratch)) < _SOCKET_PATH:
        spoken["transport"] = "ipc"

    class OwnKernel(AsyncKernelManager):  # type: ignore[misc,unused-ignore]
        def __init__(self, **traits: Any) -> None:
            super().__init__(**{**traits, **spoken})

        @property
        def kernel_spec(self) -> KernelSpec:
            return spec

    return OwnKernel


@contextmanager
def _interrupts_kernel() -> Iterator[None]:
    """Pass the first Ctrl-C on to the kernel, which lives in a session of its own; the second leaves at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with interrupt.graceful(log):
        inner = signal.getsignal(signal.SIGINT)

        def both(number: int, frame: FrameType | None) -> None:
            if callable(inner):
                inner(number, frame)
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if any("ipykernel" in word for word in child.cmdline()):
                        child.send_signal(signal.SIGINT)

        signal.signal(signal.SIGINT, both)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, inner)


def _as_ours(error: Any, copy: Path) -> PipelineError:
    """The cell's own error when it is one of ours, else an EnvironmentFailure; both show the failing cell."""
    tree = {name: kind for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, PipelineError)}
    if error.ename == "KeyboardInterrupt":
        return errors.Interrupted("stopped; finished stages and sealed checkpoints are kept", remedy="run it again to go on")
    source = "\n".join(f"    {line}" for line in str(error.source).strip().splitlines()[:12])
    text = ("" if error.ename in tree else f"{error.ename}: ") + str(error.evalue).strip()
    return tree.get(error.ename, EnvironmentFailure)(text, evidence=f"in {copy}, cell {error.exec_count}:\n{source}")


def inputs(run: RunFolder, stages: Sequence[str], parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the outcome of a run depends on: files count by content, and neither the run's name nor how often it is saved does.

    None when that cannot be told, as for a hub id that may have moved on.
    """
    hashes, named = HashCache(run.base_cache), {}
    for name in _LOCAL:
        value = parameters.get(name)
        if value is None or (name, value) in (("BASE", "embedded"), ("DATA", "soc")):
            continue
        path = Path(str(value))
        paths = [path] if path.exists() else matches(str(value))
        if not paths:
            return None
        named[name] = hashes.tree(path) if path.exists() else [hashes.tree(found) for found in paths]
    return {
        "stages": list(stages),
        "parameters": {k: v for k, v in parameters.items() if k not in (*_ASIDE, *named)},
        "files": named,
        **product(),
        "settings": sha256_json([asdict(setting) for setting in config.resolved()]),
    }
