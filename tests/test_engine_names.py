"""Nothing outside the engines' room decides by an engine's name: an engine declares facts, and others read them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import engines

ROOT = Path(__file__).parents[1]
FILES = [
    file
    for top in ("pipeline", "training")
    for file in sorted((ROOT / top).rglob("*.py"))
    if not file.is_relative_to(ROOT / "pipeline/engines") and not file.is_relative_to(ROOT / "training/output")
]
# what is named there are packages: vllm is one of those whose import setup tries
PACKAGES = {"training/scripts/setup_environment.py"}


def _decided_by_name(tree: ast.AST) -> Iterator[int]:
    """Lines with a comparison, a match or the key of a table that is an engine's name."""
    for node in ast.walk(tree):
        looked_at: list[ast.AST | None] = []
        if isinstance(node, ast.Compare):
            looked_at = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            looked_at = [node.value]
        elif isinstance(node, ast.Dict):
            looked_at = list(node.keys)
        for part in looked_at:
            inside = part.elts if isinstance(part, ast.Tuple | ast.List | ast.Set) else [part]
            if any(isinstance(one, ast.Constant) and one.value in engines.NAMES for one in inside):
                yield node.lineno


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_decision_by_an_engine_s_name(file: Path) -> None:
    if file.relative_to(ROOT).as_posix() in PACKAGES:
        return
    assert list(_decided_by_name(ast.parse(file.read_text(encoding="utf-8")))) == []


def test_the_look_finds_what_it_is_for() -> None:
    cases = (
        'name == "vllm"',
        '"ollama" != name',
        'name in ("sglang", "x")',
        '{"llamacpp": 1}[name]',
        'f(x)\nnot (a < b == "openai")',
    )
    assert all(list(_decided_by_name(ast.parse(case))) for case in cases)
    assert not list(_decided_by_name(ast.parse('start("vllm", default="ollama")\nnames = ("vllm", "ollama")')))
