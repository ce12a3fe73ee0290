"""The certificate itself: links, verdict, an id made of its content; written as JSON and JUnit, read by report and status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

from pipeline import __version__
from pipeline.certify.finding import TITLES, Finding, Link, by_link
from pipeline.errors import InputError, VerificationFailed
from pipeline.runs.files import read_json, write_atomic, write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_json
from pipeline.runs.text import clean, visible

SCHEMA = 1
_AGAIN = "granite-pipeline certify"
_ESSENTIAL = ("adapter", "merge", "gguf", "served", "tuned", "stops", "custody")


@dataclass(frozen=True)
class Certificate:
    """What was certified, how each link held, and when."""

    run: str
    links: tuple[Link, ...]
    subject: Mapping[str, Any]
    offline: bool
    created_at: str

    @property
    def passed(self) -> bool:
        """No finding failed and, unless only files were looked at, every link is proven."""
        return not self.broken and (self.offline or not self.unproven)

    @property
    def state(self) -> str:
        """``broken``, ``incomplete`` (nothing failed, but a link is unproven) or ``certified``."""
        return "broken" if self.broken else "incomplete" if self.unproven else "certified"

    @property
    def broken(self) -> list[Finding]:
        """Failed findings, in the chain's order: the first one names the broken link."""
        return [finding for link in self.links for finding in link.findings if finding.status == "failed"]

    @property
    def unproven(self) -> list[str]:
        """Titles of links that nothing was measured for."""
        known = {link.key: link for link in self.links}
        return [key for key in _ESSENTIAL if key not in known or known[key].status == "skipped"]

    @property
    def id(self) -> str:
        """SHA-256 of the content (without the time), so that equal evidence gives an equal id."""
        return sha256_json(
            {"subject": dict(self.subject), "links": [link.to_json() for link in self.links], "offline": self.offline}
        )

    def to_json(self) -> dict[str, Any]:
        """``certificate.json``."""
        return {
            "schema": SCHEMA,
            "id": self.id,
            "run": self.run,
            "passed": self.passed,
            "state": self.state,
            "offline": self.offline,
            "unproven": self.unproven,
            "broken": [finding.id for finding in self.broken],
            "created_at": self.created_at,
            "made_by": f"granite-pipeline {__version__}",
            "subject": dict(self.subject),
            "links": [link.to_json() for link in self.links],
        }


def make(run: RunFolder, findings: Sequence[Finding], subject: Mapping[str, Any], *, offline: bool) -> Certificate:
    """Assemble a certificate; text and numbers are made fit for JSON first, so that its id can be checked on the file."""
    cleaned = [Finding(**clean(finding.to_json())) for finding in findings]
    return Certificate(run.name, by_link(cleaned), clean(subject), offline, datetime.now(UTC).isoformat(timespec="seconds"))


def read(path: Path) -> tuple[Certificate, str]:
    """A certificate as its file says, verdict and id to be made anew from the content, and the id that the file claims."""
    held = read_json(path)
    try:
        findings = [Finding(**finding) for link in held["links"] for finding in link["findings"]]
        found = Certificate(held["run"], by_link(findings), held["subject"], held["offline"] is not False, held["created_at"])
        return found, str(held["id"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a certificate ({error!r})", remedy=f"{_AGAIN} makes one") from None


def save(certificate: Certificate, folder: Path) -> Path:
    """Write ``certificate.json`` and ``junit.xml`` (see :func:`place` for ``offline.json``); returns the first."""
    path = place(certificate, folder)
    write_atomic(folder / ("offline.xml" if path.stem == "offline" else "junit.xml"), junit_xml(certificate))
    write_json(path, certificate.to_json())
    return path


def place(certificate: Certificate, folder: Path) -> Path:
    """Where a certificate is written: an offline one stands beside a fuller one, which may be signed, and not in its place."""
    path = folder / "certificate.json"
    try:
        fuller = certificate.offline and path.is_file() and read_json(path)["offline"] is False
    except (InputError, KeyError, TypeError):
        fuller = False
    return folder / "offline.json" if fuller else path


def junit_xml(certificate: Certificate) -> str:
    """One suite a link, one test case a finding."""
    report = JUnitXml(visible(f"certificate of {certificate.run}"))
    for link in certificate.links:
        suite = TestSuite(visible(f"{link.number} {link.title}"))
        for finding in link.findings:
            suite.add_testcase(_case(certificate.run, finding))
        report.add_testsuite(suite)
    report.update_statistics()
    text = report.tostring()
    body = text.decode("utf-8") if isinstance(text, bytes) else str(text)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{body}\n'


def _case(run: str, finding: Finding) -> TestCase:
    case = TestCase(visible(finding.id), classname=visible(f"{run}.certificate.{finding.link}"))
    detail = visible(f"{finding.figure} (bound: {finding.bound})" if finding.bound else finding.figure)
    if finding.status == "failed":
        case.result = [Failure(detail)]
    elif finding.status == "skipped":
        case.result = [Skipped(detail)]
    else:
        case.system_out = detail if finding.status == "passed" else f"warning: {detail}"
    return case


def require_certified(certificate: Certificate) -> None:
    """Raise VerificationFailed, naming the first broken link or those that nothing was proven for."""
    if certificate.broken:
        first = certificate.broken[0]
        title = next(link for link in certificate.links if link.key == first.link)
        raise VerificationFailed(
            f"not certified: link {title.number}, {title.title.lower()}, is broken",
            evidence="\n".join(f"{finding.id}: {finding.figure}" for finding in certificate.broken),
            remedy="export again from an untouched adapter (granite-pipeline export --force), or see the run's report",
        )
    if not certificate.passed:
        raise VerificationFailed(
            f"not certified: nothing is proven for {not_proven(certificate)}",
            evidence="\n".join(
                f"{finding.id}: {finding.figure}"
                for link in certificate.links
                for finding in link.findings
                if finding.status == "skipped"
            ),
            remedy=f"make available what was skipped, then {_AGAIN}; --offline certifies what files alone prove",
        )


def not_proven(certificate: Certificate) -> str:
    """The links that nothing was measured for, in words."""
    return ", ".join(f"link {list(TITLES).index(key) + 1}, {TITLES[key].lower()}" for key in certificate.unproven)
