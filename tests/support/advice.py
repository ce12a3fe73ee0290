"""What the product tells people to do, text by text.

A text is a remedy (from the code or from JSON), help, a docstring of a verb, a document, a notebook's markdown or the
Makefile's own help. Words that an f-string fills in are ``HOLE``.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer

from pipeline.cli import app

ROOT = Path(__file__).parents[2]
HOLE = "\u2026"
VERBS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]

# names under which the code keeps what it advises, and the places of constructors that take it without a name
_NAMES = re.compile(r"remed|^_?install$|^lower$|^_RESERVED$|^advice$|^alternatives$|^drawback$|^tested$", re.IGNORECASE)
_PLACES = {"Finding": 3, "Mismatch": 2, "_room": 5, "_unknown": 1}
_JSON = {"pipeline/serve/failures.json": "remedy", "training/scripts/checks.json": "otherwise"}


class Text(NamedTuple):
    """One text, where it stands, and whether it is a remedy, which is judged more strictly."""

    where: str
    words: str
    remedy: bool = False


def texts() -> Iterator[Text]:
    """Everything the product says to people about how to use it."""
    for room in ("pipeline", "training", "benchmarks"):
        for path in sorted((ROOT / room).rglob("*.py")):
            yield from in_code(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    for name, key in _JSON.items():
        entries = json.loads((ROOT / name).read_text(encoding="utf-8"))
        for entry in entries.values() if isinstance(entries, dict) else entries:
            yield Text(f"{name}: {entry[key][:40]}", entry[key], remedy=True)
    for verb, command in VERBS.items():
        yield Text(f"{verb} --help", command.help)
        yield from (Text(f"{verb} {p.opts[0]}", p.help) for p in command.params if getattr(p, "help", None))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    yield from (Text("Makefile", line) for line in re.findall(r"^(?:[a-z-]+:.*## |\t@?echo )(.*)", makefile, re.MULTILINE))
    for path in (ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.[my]*"))):
        yield Text(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        yield from (Text(path.name, "".join(cell["source"])) for cell in cells if cell["cell_type"] == "markdown")


def in_code(source: str, where: str) -> Iterator[Text]:
    """The remedies in a module: ``remedy=...``, what is kept under a name of a remedy, and what stands in a remedy's place."""
    for node in ast.walk(ast.parse(source)):
        found: list[ast.expr | None] = []
        if isinstance(node, ast.keyword) and node.arg and _NAMES.search(node.arg):
            found = [node.value]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]
            found = [node.value] if any(map(_NAMES.search, names)) else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _PLACES:
            found = [*node.args[_PLACES[node.func.id] :]]
        elif isinstance(node, ast.FunctionDef) and _NAMES.search(node.name):
            found = [one.value for one in ast.walk(node) if isinstance(one, ast.Return)]
        for value in filter(None, found):
            yield from (Text(f"{where}:{value.lineno}", words, remedy=True) for words in _strings(value))


def _strings(value: ast.expr) -> Iterator[str]:
    """The strings of an expression, each f-string as one."""
    if isinstance(value, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in value.values)
    elif isinstance(value, ast.Constant):
        yield from [value.value] if isinstance(value.value, str) else []
    else:
        for child in value.values if isinstance(value, ast.Dict) else ast.iter_child_nodes(value):
            if isinstance(child, ast.expr):
                yield from _strings(child)
