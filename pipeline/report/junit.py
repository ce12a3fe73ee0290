"""Checks as JUnit XML, for CI: one suite a group, one test case a check."""

from collections.abc import Iterable, Sequence

from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

from pipeline.report.check import Check
from pipeline.runs.text import visible

# a suite's name, the class name of its cases, its checks
Suite = tuple[str, str, Sequence[Check]]


def junit_xml(name: str, suites: Iterable[Suite]) -> str:
    """The document; a warning passes and says so."""
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
    case, detail = TestCase(visible(check.id), classname=classname), visible(check.detail)
    if check.status == "failed":
        case.result = [Failure(detail)]
    elif check.status == "skipped":
        case.result = [Skipped(detail)]
    else:
        case.system_out = f"warning: {detail}" if check.status == "warning" else detail
    return case
