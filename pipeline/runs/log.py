"""What is logged: to the terminal or notebook, and for a run with date and time in a file of its folder; secrets masked."""

import io
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from pipeline.runs.folder import RunFolder
from pipeline.runs.text import MaskingFilter

_TIMED = "%(asctime)s %(message)s"
# libraries of which only errors are told
_NOISY = ["httpx", "papermill", "torchao", "transformers", "asyncio", "matplotlib", "torch.utils._pytree"]
_NOISY += ["IPKernelApp", "traitlets", "datasets", "bitsandbytes", "tensorflow", "unsloth", "unsloth_zoo", "huggingface_hub"]
# tqdm's bars, whichever library draws them; read when that is imported
_BARS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def begin(handler: logging.Handler, level: int = logging.INFO, *, words: str = _TIMED, again: bool = False) -> None:
    """Show what is logged through a handler, with the time of day; ``again`` replaces the handlers that are there."""
    handler.addFilter(MaskingFilter())
    logging.basicConfig(level=level, format=words, datefmt="%H:%M:%S", handlers=[handler], force=again)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)


def without_bars() -> None:
    """Keep libraries, here and in what is started from here, from drawing bars: in a file each step of one is a line's worth."""
    for name, value in _BARS.items():
        os.environ.setdefault(name, value)


@contextmanager
def unheard(of: logging.Logger) -> Iterator[None]:
    """What a library prints inside is not for the user: it goes to the log at DEBUG."""
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            yield
    finally:
        for line in filter(str.strip, said.getvalue().splitlines()):
            of.debug("%s", line)


class _Quiet(logging.FileHandler):
    """A log that a full disk cuts short must not hide the error that says so."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Say nothing."""


@contextmanager
def written(run: RunFolder, verb: str) -> Iterator[Path]:
    """Write everything logged inside (from INFO up, ``--quiet`` or not) to ``logs/<verb>-<date>-<time>.log``.

    An error that ends the block is logged with its traceback.
    """
    run.logs.mkdir(parents=True, exist_ok=True)
    path = run.logs / f"{verb}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    handler = _Quiet(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(MaskingFilter())
    handler.setLevel(logging.INFO)
    root = logging.getLogger()
    level, others = root.level, {other: other.level for other in root.handlers}
    for other in others:  # the root's level is lowered for the file alone
        other.setLevel(max(other.level, level))
    root.setLevel(min(level, logging.INFO) if level else logging.INFO)
    root.addHandler(handler)
    try:
        yield path
    except BaseException as error:
        exc = (type(error), error, error.__traceback__)
        handler.handle(root.makeRecord(root.name, logging.ERROR, __file__, 0, f"ended by {error!r}", (), exc))
        raise
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        for other, was in others.items():
            other.setLevel(was)
        handler.close()
