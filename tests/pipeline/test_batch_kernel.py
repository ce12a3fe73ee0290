"""A batch run's notebooks run in this very Python, and without a terminal their log is plain lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat

_RUN = """import sys; from pathlib import Path; from pipeline import batch; from pipeline.commands import show
from pipeline.runs.folder import RunFolder
show.log_to_stderr(20)
batch.FOLDER = Path(sys.argv[1])
batch.run_notebooks(RunFolder("test", Path(sys.argv[2])), ["01_finetune"], {})"""
_CELL = """import json, logging, os, sys
import beside
from tqdm.auto import tqdm
for _ in tqdm(range(3), desc="Loading weights"):
    pass
seen = {name: os.environ.get(name) for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONPATH")}
Path = __import__("pathlib").Path
Path(X).write_text(json.dumps({"python": sys.executable, "beside": beside.__file__, **seen}))
print("notebook done")"""


def test_another_python3_kernelspec_start_up_file_and_profile_are_not_ours(tmp_path: Path) -> None:
    foreign = {"argv": ["/bin/false", "{connection_file}"], "display_name": "Python 3", "language": "python"}
    for place in ("path", "home/.local/share/jupyter"):
        spec = tmp_path / place / "kernels" / "python3" / "kernel.json"
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps(foreign))
    profile = tmp_path / "home" / ".ipython" / "profile_default" / "startup" / "00.py"
    profile.parent.mkdir(parents=True)
    broken = "import os\nos._exit(7)\n"
    profile.write_text(broken)
    (tmp_path / "start.py").write_text(broken)
    (tmp_path / "relative").mkdir()
    (tmp_path / "relative" / "beside.py").write_text("")
    books = tmp_path / "books"
    books.mkdir()
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(f"X = {str(tmp_path / 'seen.json')!r}"), nbformat.v4.new_code_cell(_CELL)]
    book.cells[0].metadata["tags"] = ["parameters"]
    book.metadata["language_info"] = {"name": "python"}
    nbformat.write(book, books / "01_finetune.ipynb")

    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "JUPYTER_PATH": str(tmp_path / "path")}
    environment |= {"PYTHONSTARTUP": str(tmp_path / "start.py"), "PYTHONPATH": os.pathsep.join(["relative", root])}
    environment |= {"LD_LIBRARY_PATH": "/nowhere/lib", "DYLD_LIBRARY_PATH": "/nowhere/dyld"}
    command = [sys.executable, "-c", _RUN, str(books), str(tmp_path / "output")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=100, check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert (seen["python"], seen["beside"]) == (sys.executable, str(tmp_path / "relative" / "beside.py"))
    assert (seen["LD_LIBRARY_PATH"], seen["DYLD_LIBRARY_PATH"]) == ("/nowhere/lib", "/nowhere/dyld")
    assert seen["PYTHONPATH"] == os.pathsep.join([str(tmp_path / "relative"), root])
    assert "notebook done" in said
    for foreign_words in ("\r", "it/s", "Loading weights", "TCP", "WARNING"):
        assert foreign_words not in said, said
