"""What the command line says of itself: the overview, the verbs' own help, and every remedy that names a verb or an option."""

from __future__ import annotations

import ast
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


def test_every_option_that_a_remedy_names_exists() -> None:
    known = set().union(*OPTIONS.values())
    advised = [(path.name, flag) for path in TEXTS if path.suffix == ".py" for flag in _advised(path)]
    assert len(advised) > 20
    assert [(name, flag) for name, flag in advised if flag not in known] == []


def _advised(path: Path) -> Iterator[str]:
    """The flags of remedies, and those that a table says to use."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        remedy = isinstance(node, ast.keyword) and node.arg == "remedy"
        for part in ast.walk(node) if remedy or isinstance(node, ast.Dict) else ():
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield from re.findall(r"(?<![\w-])--[a-z][a-z-]+" if remedy else r"\buse (--[a-z-]+)", part.value)


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
