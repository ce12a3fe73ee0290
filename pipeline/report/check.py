"""The one class for something that was checked: by verify, by the certificate, and as the report shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from pydantic import AliasChoices, Field
from pydantic.dataclasses import dataclass

from pipeline.errors import Interrupted, PipelineError

Status = Literal["passed", "failed", "skipped", "warning"]
# of each status on a terminal
STYLES = {"passed": "green", "failed": "bold red", "skipped": "dim", "warning": "yellow"}


@dataclass(frozen=True)
class Check:
    """One thing checked. ``figure`` and ``bound`` are for people; ``data`` holds the numbers, for plots and other tools.

    ``id`` starts with what it is about and a dot: a backend's name in report.json, the key of a link in certificate.json.
    report.json calls the figure ``detail``.
    """

    id: str
    status: Status
    figure: str = Field(validation_alias=AliasChoices("detail", "figure"))
    bound: str = ""
    source: str = ""
    data: Mapping[str, Any] = Field(default_factory=dict)

    @property
    def about(self) -> str:
        """The link or backend it belongs to."""
        return self.id.partition(".")[0]

    @property
    def detail(self) -> str:
        """The figure, with the bound where there is one."""
        return f"{self.figure} (bound: {self.bound})" if self.bound else self.figure

    def to_json(self) -> dict[str, Any]:
        """As in certificate.json."""
        return asdict(self)


def held(check_id: str, ok: bool, figure: str, bound: str = "", source: str = "", **data: Any) -> Check:
    """A check that can only pass or fail."""
    return Check(check_id, "passed" if ok else "failed", figure, bound, source, data)


def skipped(check_id: str, why: str) -> Check:
    """A check that could not be made here, with the reason."""
    return Check(check_id, "skipped", why)


def guarded(
    check_id: str, work: Callable[[], Sequence[Check]], *, fatal: tuple[type[PipelineError], ...] = (Interrupted,)
) -> list[Check]:
    """What ``work`` finds; when the files or the server it looks at are too damaged for that, one failed check that says so.

    An error of a ``fatal`` kind is nobody's damage, and raised.
    """
    try:
        return list(work())
    except fatal:
        raise
    except (PipelineError, OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        lines = str(error).splitlines() or ["no message"]
        return [Check(check_id, "failed", f"{type(error).__name__}: {lines[0]}")]
