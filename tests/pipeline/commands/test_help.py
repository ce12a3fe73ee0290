"""What the command line says of itself: the overview, the verbs' own help, and every phrase that names a verb or an option."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pipeline import commands
from pipeline.cli import app, first_words

ROOT = Path(__file__).parents[3]
VERBS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
OPTIONS = {verb: {word for p in command.params for word in p.opts} | {"--help", "-h"} for verb, command in VERBS.items()}
TEXTS = [
    *(ROOT / "README.md", ROOT / "Makefile"),
    *(path for room in ("docs", "notebooks", "pipeline", "training", "benchmarks") for path in sorted((ROOT / room).rglob("*"))),
]


def _phrases() -> Iterator[tuple[str, str, str]]:
    for path in TEXTS:
        if path.suffix in (".py", ".md", ".ipynb", ".json", ".yml", ".yaml", "") and path.is_file():
            text = path.read_text(encoding="utf-8")
            for verb, rest in re.findall(r"granite-pipeline ([a-z][a-z-]*)((?:(?!granite-pipeline|, )[^\n\"'`;|#)\\.])*)", text):
                yield path.relative_to(ROOT).as_posix(), verb, rest


def test_every_phrase_of_the_command_names_a_verb_and_its_options() -> None:
    phrases, wrong = list(_phrases()), []
    for path, verb, rest in phrases:
        unknown = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest)) - OPTIONS.get(verb, set())
        if verb not in VERBS or unknown:
            wrong.append(f"{path}: granite-pipeline {verb}{rest}")
    assert len(phrases) > 100
    assert wrong == []


@pytest.mark.parametrize("verb", list(VERBS))
def test_the_overview_says_what_the_verbs_own_help_begins_with(verb: str) -> None:
    assert first_words(verb) == inspect.cleandoc(VERBS[verb].help).partition("\n\n")[0]
    assert f"granite-pipeline {verb}" in VERBS[verb].help  # an example


def test_the_overview_groups_every_verb() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout
    panels = re.split(r"╭─ ", shown)[2:]
    listed = {p.partition(" ─")[0]: re.findall(r"^│ ([a-z-]+) ", p, re.MULTILINE) for p in panels}
    assert listed == {panel: list(verbs) for panel, verbs in commands.PANELS.items()}


def test_a_misspelt_verb_is_refused_with_the_nearest() -> None:
    refused = CliRunner().invoke(app, ["verfy"])
    assert (refused.exit_code, "'verify'" in refused.output) == (2, True)


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import pipeline", {"torch", "transformers", "numpy", "rich", "httpx", "pydantic"}),
        (
            "import sys; sys.argv = ['granite-pipeline', '--help']\nfrom pipeline.cli import main\ntry: main()\nexcept SystemExit: pass",
            {
                *("torch", "transformers", "numpy", "matplotlib", "litellm", "pydantic", "httpx", "training"),
                "pipeline.commands.serve",
            },
        ),
        (
            "import sys; sys.argv = ['granite-pipeline', 'data', '--help']\nfrom pipeline.cli import main\ntry: main()\nexcept SystemExit: pass",
            {"torch", "transformers", "numpy", "matplotlib", "litellm", "pipeline.commands.serve"},
        ),
    ],
    ids=["import pipeline", "the overview", "data --help"],
)
def test_help_imports_no_more_than_it_shows(code: str, unwanted: set[str], tmp_path: Path) -> None:
    program = f"{code}\nimport sys\nprint('imported', *sorted({unwanted!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.splitlines()[-1].strip() == "imported"
