"""The one class for something that was checked - by verify, by the certificate, as the report shows it - and its JUnit XML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AliasChoices, Field
from pydantic.dataclasses import dataclass

from pipeline.errors import Interrupted, PipelineError
from pipeline.runs.text import visible

if TYPE_CHECKING:
    from junitparser import TestCase

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


def junit_xml(name: str, suites: Iterable[tuple[str, str, Sequence[Check]]]) -> str:
    """Checks as JUnit XML, for CI: one suite a group, one test case a check; a warning passes and says so.

    ``suites``: a suite's name, the class name of its cases, its checks.
    """
    from junitparser import JUnitXml, TestSuite

    report = JUnitXml(visible(name))
    for title, classname, checks in suites:
        suite = TestSuite(visible(title))
        for check in checks:
            suite.add_testcase(_case(check, visible(classname)))
        report.add_testsuite(suite)
    report.update_statistics()
    text = report.tostring()
    body = text.decode("utf-8") if isinstance(text, bytes) else str(text)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{body}\n'


def _case(check: Check, classname: str) -> TestCase:
    from junitparser import Failure, Skipped, TestCase

    case, detail = TestCase(visible(check.id), classname=classname), visible(check.detail)
    if check.status == "failed":
        case.result = [Failure(detail)]
    elif check.status == "skipped":
        case.result = [Skipped(detail)]
    else:
        case.system_out = f"warning: {detail}" if check.status == "warning" else detail
    return case
