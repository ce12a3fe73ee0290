"""A model that answers with markup, in a real browser: nothing it says becomes an element, a script or a request."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.write import write_report

pytestmark = pytest.mark.slow
SAMPLE = Path(__file__).parents[1] / "sample_report.json"
HOSTILE = [
    "<script>document.title = 'PWNED'</script>",
    "<img src=x onerror=\"document.body.id = 'pwned'\">",
    '"><svg onload="document.title = \'PWNED\'">',
    "' onmouseover='document.title = 1' x='",
    "</pre></textarea></style></title></script><script>document.title = 'PWNED'</script>",
    "<!-- --><iframe srcdoc=\"<script>parent.document.title = 'PWNED'</script>\"></iframe>",
    "{{ 7 * 7 }}{% raise %}${7*7}<%= 7 * 7 %>",
    "&lt;script&gt; &#x3c;b&#x3e; ]]> \u202e\u2066gnirts",
    "[click](javascript:alert(1)) <a href='javascript:alert(1)'>x</a>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'><link rel=stylesheet href=http://127.0.0.1:9/x>",
]


def _browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium here")
    return found


def _hostile(value: Any, text: str) -> Any:
    """Every free text of the report's untrusted parts, replaced."""
    if isinstance(value, str):
        return text
    if isinstance(value, dict):
        return {key: _hostile(item, text) for key, item in value.items()}
    return [_hostile(item, text) for item in value] if isinstance(value, list) else value


def _page(folder: Path) -> str:
    report = json.loads(SAMPLE.read_text())
    examples = report["examples"]
    assert examples
    report["examples"] = [_hostile(examples[i % len(examples)], text) for i, text in enumerate(HOSTILE)]
    for i, check in enumerate(report["checks"]):
        check["detail"] = HOSTILE[i % len(HOSTILE)]
    report["base_model"]["note"] = HOSTILE[0]
    return write_report(report, folder).html.as_uri()


def test_nothing_a_model_says_becomes_markup(tmp_path: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=3000",
    ]
    command = [_browser(), *flags, "--dump-dom", _page(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    dom = done.stdout
    assert "document.title" in dom  # it is there, as text
    assert re.search(r"<title>[^<]*PWNED", dom) is None
    assert 'id="pwned"' not in dom
    assert not re.findall(r"<(?:iframe|object|embed|base)\b", dom)
    assert not [tag for tag in re.findall(r"<[a-z][^>]*>", dom) if re.search(r"\son[a-z]+\s*=|javascript:|127\.0\.0\.1:9", tag)]
    assert not [body for body in re.findall(r"<script\b[^>]*>(.*?)</script>", dom, re.DOTALL) if "document.title" in body]
    assert "{{ 7 * 7 }}" in dom
