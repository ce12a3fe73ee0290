"""The layers of README: a file imports from its own folder or from a line above; folders of one line do not import each other."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = """
pipeline/errors.py
pipeline/runs
pipeline/machine pipeline/model pipeline/net pipeline/report
pipeline/prompts pipeline/planning pipeline/notebook.py
pipeline/modelfile pipeline/engines
pipeline/config.py
pipeline/serve
pipeline/verify pipeline/operate pipeline/deploy.py pipeline/batch.py
pipeline/certify pipeline/doctor pipeline/integrations
training
pipeline/commands
pipeline/cli.py pipeline/__main__.py
"""
ROOMS = {room: level for level, line in enumerate(LAYERS.split("\n")) for room in line.split()}
FILES = [p.relative_to(ROOT).as_posix() for top in ("pipeline", "training") for p in sorted((ROOT / top).rglob("*.py"))]
FILES = [file for file in FILES if not file.startswith("training/output/")]
MODULES = {file.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): file for file in FILES}


def room_of(file: str) -> str | None:
    """The room a file is in; None for the package's own face."""
    return next((room for room in ROOMS if file == room or file.startswith(f"{room}/")), None)


def imported(file: str) -> set[str]:
    """The files of this project that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {MODULES.get(f"{node.module}.{name.name}") or MODULES.get(node.module) for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {MODULES.get(name.name) for name in node.names}
    return {there for there in found if there and there != file}


IMPORTS = {file: imported(file) for file in FILES}


def test_every_file_is_in_a_room() -> None:
    assert [file for file in FILES if room_of(file) is None] == ["pipeline/__init__.py"]


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file)])
def test_imports_go_down(file: str) -> None:
    here = room_of(file)
    assert here
    for there in IMPORTS[file]:
        room = room_of(there)
        # python -m pipeline is another name of the command line
        down = room is None or room == here or ROOMS[room] < ROOMS[here] or file == "pipeline/__main__.py"
        assert down, f"{file} imports {there}"


def test_only_the_commands_name_training_and_only_inside_functions() -> None:
    outside = [f for f in FILES if not f.startswith("training/") and any(t.startswith("training/") for t in IMPORTS[f])]
    assert all(file.startswith("pipeline/commands/") for file in outside)
    for file in outside:
        top = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        names = [node.module or "" for node in top if isinstance(node, ast.ImportFrom)]
        assert not [name for name in names if name.split(".")[0] == "training"], file


def test_twelve_floors() -> None:
    assert len(set(ROOMS.values())) <= 12


def test_no_circles() -> None:
    done: set[str] = set()

    def visit(file: str, above: tuple[str, ...]) -> None:
        assert file not in above, " -> ".join((*above[above.index(file) :], file))
        if file not in done:
            for there in IMPORTS[file]:
                visit(there, (*above, file))
            done.add(file)

    for file in FILES:
        visit(file, ())


def test_folders_stay_small() -> None:
    folders = {Path(file).parent.as_posix() for file in FILES}
    count = {folder: len([f for f in (ROOT / folder).glob("*.py") if f.name != "__init__.py"]) for folder in folders}
    assert {folder: n for folder, n in count.items() if n > (16 if folder == "pipeline/commands" else 12)} == {}
    assert len([file for file in FILES if not file.endswith("__init__.py")]) <= 166


@pytest.mark.parametrize("page", ["README.md", *(p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "docs").glob("*.md")))])
def test_files_named_in_the_docs_exist(page: str) -> None:
    named = re.findall(r"`((?:pipeline|training|tests|benchmarks|docs)/[\w./-]+)`", (ROOT / page).read_text(encoding="utf-8"))
    gone = [path for path in named if not (ROOT / path).exists() and not path.startswith("training/output")]
    assert gone == []
