from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.runs.folder import RunFolder


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-x", "a b", ".base", "x" * 65, "a\n"])
def test_names_that_could_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="is not usable"):
        RunFolder(name)


def test_documented_paths() -> None:
    run = RunFolder("generic", Path("training/output"))
    assert [str(p) for p in (run.adapter, run.merged, run.gguf, run.modelfile, run.manifest)] == [
        "training/output/generic/adapter",
        "training/output/generic/merged_fp16",
        "training/output/generic/unsloth.Q8_0.gguf",
        "training/output/generic/Modelfile",
        "training/output/generic/manifest.json",
    ]


@pytest.mark.parametrize("name", ["certificate", "servers", "reference", "manifest.json", "unsloth.Q8_0.gguf"])
def test_a_part_of_a_run_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    run = RunFolder("t", tmp_path / "out")
    run.path.mkdir(parents=True)
    run.require_inside()
    (run.path / name).symlink_to(tmp_path)
    with pytest.raises(InputError, match=f"{name} is a symbolic link"):
        run.require_inside()
