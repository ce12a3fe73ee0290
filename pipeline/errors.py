"""Every error this product raises on purpose.

    PipelineError                    exit code
    ├── VerificationFailed               1      what is served is not what was trained
    ├── InputError                       2      a file, row, flag or variable the user gave is wrong
    │   ├── DataError                           a dataset or one of its rows
    │   └── ModelError                          a model folder, id, GGUF or chat template
    ├── Interrupted                    130      the user stopped it; what was done is kept
    └── EnvironmentFailure               3      the machine or an engine is not able to
        ├── RunLocked                           another process works on the run
        ├── LeaseLost                           another process took the run over from this one
        ├── OutOfMemory                         a stage does not fit this machine's memory
        ├── MissingDependency                   a package or program is not installed
        ├── DiskFull                            not enough space for the next artefact
        └── EngineError                         an inference server did not start, answer or stay up
            └── StartFailure                    it ended or hung before its first token, or died later; classified

The message says what happened; ``evidence`` shows it (argv, exit code, last log lines, file:line); ``remedy`` says what to do.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class PipelineError(Exception):
    """Root of the tree; carries the exit code the command line ends with."""

    exit_code = 3

    def __init__(self, message: str, *, evidence: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.evidence = evidence
        self.remedy = remedy

    def __str__(self) -> str:
        parts = (self.message, self.evidence, self.remedy and f"What to do: {self.remedy}")
        return "\n".join(part for i, part in enumerate(parts) if part or i == 0)


class VerificationFailed(PipelineError):
    """The checks ran and at least one failed."""

    exit_code = 1


class InputError(PipelineError):
    """Something the user gave is wrong; nothing was changed."""

    exit_code = 2


class DataError(InputError):
    """A dataset cannot be read or a row is refused; the evidence names file:line."""


class ModelError(InputError):
    """A model id, folder, GGUF file or chat template cannot be used."""


class EnvironmentFailure(PipelineError):
    """The machine, a package or an engine cannot do what was asked."""


class Interrupted(PipelineError):
    """The user asked to stop; the message says what was kept and how to go on."""

    exit_code = 130


class RunLocked(EnvironmentFailure):
    """Another process holds the run; the evidence names it."""


class LeaseLost(EnvironmentFailure):
    """Another process took the run over while this one gave no sign of life; what was to be written was not."""


class OutOfMemory(EnvironmentFailure):
    """A stage needs more memory than the machine has free; the message has the numbers, the remedy the setting."""


class MissingDependency(EnvironmentFailure):
    """A package or program is not installed; the remedy is the command that installs it."""


class DiskFull(EnvironmentFailure):
    """The next artefact does not fit on the disk; the message has the numbers."""


class EngineError(EnvironmentFailure):
    """An inference engine did not start, answer or stay up."""


class StartFailure(EngineError):
    """A server that did not come up or did not stay: ``kind`` is its name in ``failures.json`` ("" when not recognised)."""

    def __init__(self, message: str, *, kind: str = "", cause: str = "", numbers: Sequence[float] = (), **told: str) -> None:
        super().__init__(message, **told)
        self.kind = kind
        self.cause = cause
        self.numbers = tuple(numbers)


@contextmanager
def at(where: str) -> Iterator[None]:
    """Say in any PipelineError raised inside what was being worked on: ``with at("rows.jsonl:3"):``.

    The error goes on as the same object, so its class, evidence and remedy stay; only its message begins with ``where``.
    """
    try:
        yield
    except PipelineError as error:
        error.message = f"{where}: {error.message}"
        error.args = (error.message, *error.args[1:])
        raise
