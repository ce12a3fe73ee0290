import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import InputError
from pipeline.report.write import paths_in

SAMPLE = Path(__file__).parents[1] / "sample_report.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "soc" / "report"
    found.mkdir(parents=True)
    (found / "report.json").write_bytes(SAMPLE.read_bytes())
    return found


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["report", *words], catch_exceptions=True)


def test_html_and_junit_are_drawn_again_and_json_is_left(folder: Path, tmp_path: Path) -> None:
    done = run("--run", "soc", "--output", str(tmp_path))
    assert done.exit_code == 0
    assert "Passed: what is served is what was trained" in done.stdout
    paths = paths_in(folder)
    assert "what was trained" in paths.html.read_text(encoding="utf-8")
    assert paths.junit.read_text(encoding="utf-8").startswith("<?xml")
    assert paths.json.read_bytes() == SAMPLE.read_bytes()


def test_json_for_scripts(folder: Path, tmp_path: Path) -> None:
    done = run("--run", "soc", "--output", str(tmp_path), "--json")
    assert json.loads(done.stdout) == {
        **{"run": "generic", "passed": True, "report": str(folder / "report.html")},
        **{"json": str(folder / "report.json"), "junit": str(folder / "junit.xml")},
    }


def test_no_report_yet_says_what_to_do(tmp_path: Path) -> None:
    error = run("--run", "nothing", "--output", str(tmp_path)).exception
    assert isinstance(error, InputError)
    assert error.exit_code == 2
    assert error.message == f"run 'nothing' has no report yet: {tmp_path}/nothing/report/report.json does not exist"
    assert error.remedy == "granite-pipeline verify --run nothing"


@pytest.mark.parametrize(
    ("text", "message"), [("[]", "not a JSON object"), ("{\n{", ":2: not valid JSON"), ("{}", "schema is missing")]
)
def test_an_unusable_report_is_refused(folder: Path, tmp_path: Path, text: str, message: str) -> None:
    (folder / "report.json").write_text(text, encoding="utf-8")
    error = run("--run", "soc", "--output", str(tmp_path)).exception
    assert isinstance(error, InputError)
    assert message in error.message
    assert [p.name for p in folder.iterdir()] == ["report.json"]
