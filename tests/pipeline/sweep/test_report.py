"""The sweep's page: which run is best and why, what is not compared, and what a run says in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.sweep import report
from pipeline.sweep.guarded import Outcome
from pipeline.sweep.spec import Resources, Run, Sweep


def _make(output: Path, name: str, exact: float, *, rank: int = 16, seed: int = 7, loss: float = 1.0, held: bytes = b"h") -> None:
    """What a finished run leaves in its folder, as far as a sweep looks at it."""
    run = RunFolder(name, output)
    run.adapter.mkdir(parents=True)
    (run.adapter / "w").write_bytes(name.encode())
    run.heldout.write_bytes(held)
    parameters = {"rank": rank, "seed": seed, "batch_size": 2, "gradient_accumulation": 2}
    counts = {"rows": {"train": 10, "held_out": 4}, "tokens": {"all": 200, "trained": 50}}
    result: dict[str, Any] = {"steps": 5, "eval_loss": {"before": 9.0, "after": loss}, **counts}
    manifest = Manifest(run.manifest)
    manifest.record("finetune", {"parameters": parameters}, [run.adapter, run.heldout], result, 10)
    scores = {
        "n": 100,
        "exact": exact,
        "json_valid": 1.0,
        "calls": None,
        "exact_interval": [round(exact - 0.05, 4), round(exact + 0.05, 4)],
        "of": 100,
    }
    manifest.record("evaluate_tuned", {}, [], scores, 5)


def _sweep(tmp_path: Path, runs: dict[str, dict[str, Any]]) -> Sweep:
    path = tmp_path / "sweep.yaml"
    path.touch()
    made = tuple(Run(name, given) for name, given in runs.items())
    return Sweep(path, ("01_finetune", "02_export"), made, Resources(), "exact")


def _told(
    tmp_path: Path, runs: dict[str, dict[str, Any]], outcomes: dict[str, Outcome] | None = None, metric: str = "exact"
) -> Any:
    sweep = _sweep(tmp_path, runs)
    return report.record(sweep, tmp_path, report.entries(sweep, tmp_path, outcomes or {}), metric)


def test_the_best_run_and_what_it_cost(tmp_path: Path) -> None:
    for name, exact, rank in (("a", 0.6, 8), ("b", 0.9, 16), ("c", 0.7, 16)):
        _make(tmp_path, name, exact, rank=rank)
    told = _told(tmp_path, {"a": {"RANK": 8}, "b": {"RANK": 16}, "c": {"RANK": 16}})
    assert told["best"] == "b"
    assert re.search(r"exact 90.%.*the highest of 3 runs. The next is c with 70.*apart, so that this is no chance", told["why"])
    assert told["cost"] == {"seconds": 45.0, "trained_tokens": 3 * 5 * 4 * 20}
    ranks = {row["value"]: row for row in told["by_parameter"]["RANK"]}
    assert (ranks["8"]["mean"], ranks["16"]["mean"]) == (0.6, pytest.approx(0.8))
    assert (ranks["16"]["lowest"], ranks["16"]["highest"]) == (0.7, 0.9)
    assert [run["interval"] for run in ranks["16"]["runs"]] == [[0.85, 0.95], [0.65, 0.75]]
    assert told["doubts"] == []
    page = report.write(told, tmp_path).read_text()
    assert page.index('href="b/manifest.json"') < page.index('href="c/manifest.json"') < page.index('href="a/manifest.json"')
    assert json.loads((tmp_path / "sweep.json").read_text()) == told


def test_a_difference_inside_the_intervals_may_be_chance(tmp_path: Path) -> None:
    _make(tmp_path, "a", 0.80)
    _make(tmp_path, "b", 0.82)
    assert "the intervals overlap, so that the difference may be chance" in _told(tmp_path, {"a": {}, "b": {}})["why"]


def test_the_held_out_loss_decides_between_equals_and_lower_is_better(tmp_path: Path) -> None:
    _make(tmp_path, "a", 0.8, loss=2.0)
    _make(tmp_path, "b", 0.8, loss=1.0)
    assert _told(tmp_path, {"a": {}, "b": {}})["best"] == "b"
    told = _told(tmp_path, {"a": {}, "b": {}}, metric="eval_loss")
    assert (told["best"], told["lower_is_better"], "the lowest of 2 runs" in told["why"]) == ("b", True, True)


def test_other_held_out_rows_are_said_to_be_no_comparison(tmp_path: Path) -> None:
    _make(tmp_path, "a", 0.8, held=b"one")
    _make(tmp_path, "b", 0.9, held=b"two")
    (doubt,) = _told(tmp_path, {"a": {}, "b": {}})["doubts"]
    assert "different held-out rows" in doubt


def test_a_folder_made_with_other_parameters_is_not_this_specs_run(tmp_path: Path) -> None:
    _make(tmp_path, "a", 0.9, rank=8)
    _make(tmp_path, "b", 0.5, rank=16)
    told = _told(tmp_path, {"a": {"RANK": 16}, "b": {"RANK": 16}})
    assert [run["state"] for run in told["runs"]] == ["waiting", "done"]
    assert (told["best"], told["runs"][0]["score"]) == ("b", None)


def test_what_failed_is_never_the_best(tmp_path: Path) -> None:
    _make(tmp_path, "a", 0.9)
    _make(tmp_path, "b", 0.5)
    outcomes = {"a": Outcome("a", 1, "here", said="no"), "b": Outcome("b", 0, "here")}
    told = _told(tmp_path, {"a": {}, "b": {}, "c": {}}, outcomes)
    assert (told["best"], told["exit_code"]) == ("b", 1)
    assert [run["state"] for run in told["runs"]] == ["not verified", "done", "waiting"]
    assert "<h1>2 of 3 runs are not done</h1>" in report.render(told)


def test_a_score_that_no_run_has_names_those_there_are(tmp_path: Path) -> None:
    _make(tmp_path, "a", 0.9)
    told = _told(tmp_path, {"a": {}}, metric="severity")
    assert (told["best"], "measured were exact, json_valid" in told["why"]) == (None, True)


def test_nothing_in_the_page_is_markup_or_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3cret-s3cret")
    evil = "<script>x</script> s3cret-s3cret \u202e"
    _make(tmp_path, "a", 0.9)
    runs = {"a": {"REVISION": evil}, "b": {"REVISION": "x"}, "c": {evil: 1}}
    _make(tmp_path, "b", 0.8)
    told = _told(tmp_path, runs, {"c": Outcome("c", 3, evil, said=evil)})
    page = report.write(told, tmp_path).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "s3cret" not in page + (tmp_path / "sweep.json").read_text()
    assert "\u202e" not in page


def test_a_sweep_of_many_values_is_drawn(tmp_path: Path) -> None:
    runs = {f"r{i}": {"SEED": i, "RANK": 4 * (1 + i % 2)} for i in range(40)}
    for i, name in enumerate(runs):
        _make(tmp_path, name, 0.4 + i / 100, seed=i, rank=4 * (1 + i % 2))
    page = report.render(_told(tmp_path, runs))
    assert page.count("<svg") == 2
    assert "2 of 40" not in page
