"""Every parameter of a fine-tune has a type and a range, and an error that names it."""

from __future__ import annotations

import inspect
import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from pipeline.commands.train import train
from pipeline.errors import InputError
from training.export.merge import _same_training
from training.parameters import FinetuneParameters, content

_WHOLE = ("rank", "alpha", "batch_size", "gradient_accumulation", "max_length", "save_steps", "max_rows", "max_steps")
_WRONG: list[tuple[str, Any]] = [
    *((name, value) for name in _WHOLE for value in (0, -5, 1.5, "3", True)),
    *((name, None) for name in ("rank", "seed", "epochs", "dropout", "base", "data", "eval_share")),
    *((name, value) for name in ("warmup_steps", "seed") for value in (-1, 0.5)),
    *((name, value) for name in ("epochs", "learning_rate") for value in (0, -1.0, math.nan, math.inf, "abc")),
    *(("dropout", value) for value in (7, 1, -0.1, math.nan)),
    *(("eval_share", value) for value in (0, 1, "0.1")),
    *(("weight_decay", value) for value in (-1, math.inf, "x")),
    *((name, 5) for name in ("base", "revision", "data", "eval_data", "method", "trainer")),
    ("seed", 2**32),
    ("base", ""),
]


@pytest.mark.parametrize(("name", "value"), _WRONG, ids=str)
def test_a_value_out_of_type_or_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name}="):
        FinetuneParameters.from_notebook({name.upper(): value})


def test_the_edges_are_accepted() -> None:
    FinetuneParameters(max_rows=1, max_steps=1, seed=2**32 - 1, dropout=0, epochs=2, warmup_steps=0, weight_decay=0.1)


def test_a_local_path_is_the_same_however_it_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("base", "soc"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a.jsonl").touch()
    typed = FinetuneParameters(base="base", data="a.jsonl", eval_data="./a.jsonl")
    there = str(tmp_path / "a.jsonl")
    assert typed == FinetuneParameters(base=str(tmp_path / "base"), data=there, eval_data=there)
    kept = FinetuneParameters(base="owner/name", data="soc")
    assert (kept.base, kept.data, kept.eval_data) == ("owner/name", "soc", None)


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"method": "full", "epochs": 3.0, "max_steps": 7, "save_steps": 5, "revision": "main"},
        {"data": "my rows.jsonl", "eval_data": "held out.jsonl", "rank": 4, "learning_rate": 5e-4, "seed": 1},
        {
            "ignore": ("label", "a,b"),
            "columns": "prompt=q,completion=a",
            "greeting": "drop",
            "repeated": "join",
            "skip_bad": True,
        },
        {"base": "embedded"},
    ],
)
def test_the_command_for_a_base_that_was_moved_is_the_same_training(made: dict[str, Any], tmp_path: Path) -> None:
    before = FinetuneParameters(**{"base": str(tmp_path / "old"), **made})
    recorded = SimpleNamespace(parameters=json.loads(json.dumps(before.to_json())))
    words = shlex.split(_same_training("mine", recorded))  # type: ignore[arg-type]
    assert words[:6] == ["granite-pipeline", "train", "--name", "mine", "--base", "FOLDER"]
    read = inspect.signature(train).parameters
    asked, said, left = _options(train), dict[str, Any](), words[6:]
    while left:
        name = asked[left.pop(0)]
        assert name in read
        if name == "skip_bad":
            said[name] = True
        elif name == "ignore":
            said[name] = (*said.get(name, ()), left.pop(0))
        else:
            said[name] = _TYPES.get(name, str)(left.pop(0))
    after = FinetuneParameters(base=str(tmp_path / "new"), **said)
    assert content({"parameters": after.to_json()}) == content({"parameters": before.to_json()})


_TYPES = {**dict.fromkeys(("rank", "alpha", "max_steps", "seed"), int), **dict.fromkeys(("epochs", "learning_rate"), float)}


def _options(verb: Any) -> dict[str, str]:
    """The parameter of each option of a verb."""
    app = typer.Typer()
    app.command()(verb)
    return {option: one.name for one in typer.main.get_command(app).params for option in one.opts if one.name}
