"""A user's own check that cannot be asked fails by itself; the other evidence of its backend stands."""

from __future__ import annotations

import socket
from pathlib import Path

from pipeline.runs.folder import RunFolder
from pipeline.serve.start import Endpoint
from training.certify.certify import Scope, _own


def test_a_question_that_errors_fails_by_itself(tmp_path: Path) -> None:
    checks = tmp_path / "checks.yaml"
    checks.write_text("prompts:\n  - prompt: hello\n    check:\n      contains: hello\n", encoding="utf-8")
    with socket.socket() as closed:  # bound, not listening: every connection is refused
        closed.bind(("127.0.0.1", 0))
        endpoint = Endpoint("openai", f"http://127.0.0.1:{closed.getsockname()[1]}", "m")
        found = _own(endpoint, RunFolder("none", tmp_path), Scope((), own=(str(checks), str(checks))))
    assert [(one.id, one.status) for one in found] == [("own.openai", "failed")] * 2
    assert "a question of --eval failed" in found[0].figure
