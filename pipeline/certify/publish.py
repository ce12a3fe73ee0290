"""The certificate in the run's report, and on the terminal."""

from typing import Any

from rich.table import Table
from rich.text import Text

from pipeline.certify.card import write_card
from pipeline.certify.certificate import Certificate, Link, not_proven, place
from pipeline.report.check import STYLES
from pipeline.report.write import ReportPaths, paths_in, write_report
from pipeline.runs import lock
from pipeline.runs.files import read_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.text import visible
from pipeline.verify.assemble import titled

PREFIX = "certificate."


def add_to_report(run: RunFolder, certificate: Certificate) -> ReportPaths | None:
    """Put the certificate into the run's report, one check a link; None when the run has no report yet."""
    path = paths_in(run.report).json
    if not path.is_file():
        return None
    return write_report(with_certificate(titled(read_json(path)), certificate), run.report)


def publish(run: RunFolder, certificate: Certificate) -> ReportPaths | None:
    """Write the run's model card and put the certificate into its report, where it does not stand beside a fuller one."""
    with lock.held(run, "certify"):
        write_card(run)
        return add_to_report(run, certificate) if place(certificate, run.certificate).stem == "certificate" else None


def rows(certificate: Certificate) -> list[dict[str, Any]]:
    """One row a finding, for a table."""
    return [
        {"link": f"{link.number} {link.title}", "check": f.id, "status": f.status, "figure": f.figure, "bound": f.bound}
        for link in certificate.links
        for f in link.findings
    ]


def with_certificate(report: dict[str, Any], certificate: Certificate) -> dict[str, Any]:
    """The report with this certificate instead of an earlier one; it passes when both do."""
    others = [check for check in report["checks"] if not check["id"].startswith(PREFIX)]
    checks = [*others, *(_check(link) for link in certificate.links)]
    passed = all(check["status"] != "failed" for check in checks)
    return {**report, "checks": checks, "passed": passed, "certificate": certificate.to_json()}


def _check(link: Link) -> dict[str, str]:
    telling = [finding for finding in link.findings if finding.status == link.status] or list(link.findings)
    detail = "; ".join(f"{finding.id}: {finding.figure}" for finding in telling[:3])
    return {"id": f"{PREFIX}{link.key}", "status": link.status, "detail": detail}


def table(certificate: Certificate) -> Table:
    """One line a finding, for the terminal, with the bound where it did not hold; untrusted text cannot style or control it."""
    title = Text(f"{certificate.state}: run {certificate.run}, certificate {certificate.id[:12]}")
    if certificate.unproven:
        title.append(f"; nothing is proven for {not_proven(certificate)}")
    title.stylize({"certified": "bold green", "incomplete": "bold yellow"}.get(certificate.state, "bold red"))
    shown = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for column in ("", "", ""):
        shown.add_column(column, overflow="fold")
    for link in certificate.links:
        shown.add_row(Text(f"{link.number}"), Text(link.title, style="bold"), Text(link.status, style=STYLES[link.status]))
        for finding in link.findings:
            detail = (
                f"{finding.figure} (bound: {finding.bound})" if finding.status == "failed" and finding.bound else finding.figure
            )
            name = Text(f"  {finding.id.partition('.')[2]}", style=STYLES[finding.status])
            shown.add_row("", name, Text(visible(detail)))
    return shown
