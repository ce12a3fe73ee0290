"""What ``run`` makes of its flags and of -p."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.commands import run
from pipeline.errors import InputError


@pytest.mark.parametrize(("given", "instead"), [("NAME=b", "--name b"), ("OUTPUT=x/y", "--output x/y")])
def test_another_run_than_the_reported_one_is_refused(given: str, instead: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        run.run(name="a", output=tmp_path, parameter=[given])
    assert caught.value.remedy == f"use {instead}"
    assert not list(tmp_path.iterdir())


def test_local_paths_reach_the_notebooks_absolute_by_flag_and_by_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "soc"):  # a file named as the built-in data is not meant by it
        (tmp_path / name).touch()
    seen: dict[str, Any] = {}

    def noted(_run: object, _stages: object, given: dict[str, Any]) -> list[object]:
        seen.update(given)
        return []

    monkeypatch.setattr("pipeline.batch.inputs", lambda *_: None)
    monkeypatch.setattr(run, "run_notebooks", noted)
    monkeypatch.setattr("pipeline.serve.start.stop", lambda *_: False)
    run.run(data="a.jsonl", base="owner/name", parameter=["EVAL_DATA=b.jsonl"], stages="01_finetune", output=tmp_path / "out")
    assert {key: seen[key] for key in ("DATA", "EVAL_DATA", "BASE")} == {
        "DATA": str(tmp_path / "a.jsonl"),
        "EVAL_DATA": str(tmp_path / "b.jsonl"),
        "BASE": "owner/name",
    }
    run.run(data="soc", stages="01_finetune", output=tmp_path / "out")
    assert seen["DATA"] == "soc"
