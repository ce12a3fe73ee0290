"""The certificate's verdict, id, files and view, and what the report makes of it."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest

from pipeline.certify import certificate as made
from pipeline.certify import hub
from pipeline.certify.certificate import by_link
from pipeline.certify.publish import rows, table, with_certificate
from pipeline.errors import VerificationFailed
from pipeline.report import certificate as certificate_module
from pipeline.report.check import held, skipped
from pipeline.report.write import render_html
from pipeline.runs.folder import RunFolder

GOOD = [
    held("adapter.moved", True, "28 of 28 modules moved", "> 0", "definition"),
    held("merge.tensors", True, "all equal", "1", "IEEE 754", errors=[["a", 0.5], ["b", math.inf]]),
    skipped("served.ollama", "ollama is not on PATH"),
]
WHOLE = [held(f"{key}.x", True, "", "", "") for key in ("adapter", "merge", "gguf", "served", "tuned", "stops", "custody")]
BAD = held("gguf.tensors", False, "1 tensors differ, first <b>blk.1</b>", "1", "Q8_0")
REPORT = Path(__file__).parents[1] / "sample_report.json"


def test_links_are_in_the_chain_s_order_and_sum_up_their_findings() -> None:
    links = by_link([BAD, *GOOD])
    assert [(link.number, link.key, link.status) for link in links] == [
        (1, "adapter", "passed"), (2, "merge", "passed"), (3, "gguf", "failed"), (4, "served", "skipped"),
    ]  # fmt: skip


def test_the_id_depends_on_the_evidence_and_not_on_the_time(run: RunFolder) -> None:
    first, again = (made.make(run, GOOD, {"base": "x"}, offline=True) for _ in range(2))
    assert first.id == again.id
    assert first.id != made.make(run, [*GOOD, BAD], {"base": "x"}, offline=True).id
    assert first.id != made.make(run, GOOD, {"base": "y"}, offline=True).id


def test_a_failed_finding_names_its_link(run: RunFolder) -> None:
    certificate = made.make(run, [*GOOD, BAD], {}, offline=False)
    assert not certificate.passed
    with pytest.raises(VerificationFailed, match="link 3, gguf = merged, is broken") as caught:
        made.require_certified(certificate)
    assert "gguf.tensors: 1 tensors differ" in str(caught.value)
    made.require_certified(made.make(run, WHOLE, {}, offline=False))


def test_a_link_that_nothing_was_proven_for_is_no_certificate_but_offline_says_so_only(run: RunFolder) -> None:
    online = made.make(run, GOOD, {}, offline=False)
    assert (online.passed, online.state) == (False, "incomplete")
    with pytest.raises(VerificationFailed, match="nothing is proven for link 3, gguf = merged, link 4") as caught:
        made.require_certified(online)
    assert "served.ollama: ollama is not on PATH" in str(caught.value)
    offline = made.make(run, GOOD, {}, offline=True)
    assert (offline.passed, offline.state) == (True, "incomplete")
    made.require_certified(offline)
    assert "nothing is proven for link 3" in str(table(offline).title)
    assert made.make(run, WHOLE, {}, offline=False).state == "certified"


def test_what_was_not_measured_is_unproven_not_passed(run: RunFolder) -> None:
    assert made.make(run, GOOD, {}, offline=False).unproven == ["gguf", "served", "tuned", "stops", "custody"]


def test_the_files_are_json_and_junit(run: RunFolder) -> None:
    certificate = made.make(run, [*GOOD, BAD], {}, offline=False)
    assert certificate_module.summary(run) is None
    made.save(certificate, run.certificate)
    seen = certificate_module.summary(run)
    assert seen is not None
    assert (seen["id"], seen["passed"], seen["broken"]) == (certificate.id, False, ["gguf.tensors"])
    (run.output / "broken" / "certificate").mkdir(parents=True)
    (run.output / "broken" / "certificate" / "certificate.json").write_text("{")
    assert certificate_module.summaries(run.output) == {run.name: seen}
    # no number that JSON cannot hold
    json.loads((run.certificate / "certificate.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    junit = (run.certificate / "junit.xml").read_text()
    assert 'tests="4"' in junit
    assert "first &lt;b&gt;blk.1&lt;/b&gt; (bound: 1)" in junit
    assert junit.count("<skipped") == 1


def test_the_report_has_it_on_top_escaped_and_fails_with_it(run: RunFolder) -> None:
    report = json.loads(REPORT.read_text())
    passed = with_certificate({**report, "passed": True}, made.make(run, GOOD, {}, offline=False))
    failed = with_certificate(passed, made.make(run, [*GOOD, BAD], {}, offline=False))
    ids = [check["id"] for check in failed["checks"] if check["id"].startswith("certificate.")]
    assert ids == ["certificate.adapter", "certificate.merge", "certificate.gguf", "certificate.served"]
    assert failed["passed"] is False
    page = render_html(failed)
    assert page.index('id="certificate"') < page.index('id="checks"')
    assert "first &lt;b&gt;blk.1&lt;/b&gt;" in page
    assert "<b>blk.1" not in page
    assert "Bound from" in page
    assert 'aria-label="Largest error by tensor' in page


def test_rows_for_a_table(run: RunFolder) -> None:
    assert rows(made.make(run, GOOD, {}, offline=False))[0] == {
        "link": "1 The adapter moved", "check": "adapter.moved", "status": "passed", "figure": "28 of 28 modules moved", "bound": "> 0",
    }  # fmt: skip


def test_a_signed_certificate_is_checked_with_the_public_key(run: RunFolder, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private)], check=True)
    subprocess.run(["openssl", "ec", "-in", str(private), "-pubout", "-out", str(public)], check=True, capture_output=True)
    made.save(made.make(run, GOOD, {"artefacts": {}}, offline=False), run.certificate)
    assert hub.check_signed(run, public).status == "failed"
    hub.sign(run, private)
    assert hub.check_signed(run, public).status == "passed"
    path = run.certificate / "certificate.json"
    path.write_text(path.read_text().replace('"passed": true', '"passed": false'))
    assert "does not fit" in hub.check_signed(run, public).figure
