"""benchmarks/line.py against two stand-ins for a checkout: what it runs, what it reads, what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import line

_MAIN = """
import json, sys
from pathlib import Path
given = sys.argv[1:]
run = Path(given[given.index("--output") + 1]) / given[given.index("--name") + 1]
(run / "report").mkdir(parents=True, exist_ok=True)
(run / "notebooks").mkdir(exist_ok=True)
(run / "asked.json").write_text(json.dumps(given))
(run / "notebooks/03_serve.ipynb").write_text(json.dumps({"metadata": {"papermill": {"duration": SECONDS}}}))
starts = [{"engine": "vllm", "ready_seconds": 2 * SECONDS}, {"engine": "llamacpp", "ready_seconds": None}]
stages = {"probes": {"seconds": 3 * SECONDS}, "run": {"seconds": 99}}
(run / "manifest.json").write_text(json.dumps({"stages": stages, "starts": starts}))
report = {"passed": True, "eval": {"tuned": {"exact": 0.9}}, "backends": [{"name": "vllm", "exact": 0.8}]}
if SECONDS:
    (run / "report/report.json").write_text(json.dumps(report))
sys.exit(0 if SECONDS else 1)
"""


def _checkout(folder: Path, seconds: float) -> Path:
    (folder / "pipeline").mkdir(parents=True)
    (folder / "pipeline/__init__.py").touch()
    (folder / "pipeline/__main__.py").write_text(_MAIN.replace("SECONDS", str(seconds)))
    return folder


def test_two_checkouts_are_run_in_turn_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = _checkout(tmp_path / "before", 10.0), _checkout(tmp_path / "after", 4.0)
    monkeypatch.setattr(line, "HERE", after)
    out, runs = tmp_path / "line.json", tmp_path / "runs"
    assert line.main(["--against", str(before), "--quick", "--out", str(out), "--keep", str(runs)]) == 0
    said = capsys.readouterr().out
    for row in (
        "| notebook 03_serve | 10.0 | 4.0 | 0.40 |",
        "| probes | 30.0 | 12.0 | 0.40 |",
        "| start of vllm | 20.0 | 8.0 | 0.40 |",
    ):
        assert row in said
    assert "99" not in said and "llamacpp" not in said
    first, second = json.loads(out.read_text())
    assert (first["checkout"], second["checkout"]) == (str(before), str(after))
    assert first["unchanged"] is not None and first["exact"] == {"in process": 0.9, "vllm": 0.8}
    assert "MAX_STEPS=20" in json.loads((runs / "0/line/asked.json").read_text())


def test_a_run_without_a_report_is_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "HERE", _checkout(tmp_path / "broken", 0))
    out = tmp_path / "line.json"
    assert line.main(["--out", str(out), "--keep", str(tmp_path / "runs")]) == 3
    (only,) = json.loads(out.read_text())
    assert (only["code"], only["passed"], only["unchanged"]) == (1, False, None)
