from __future__ import annotations

import json
import logging
from datetime import date
from pathlib import Path

import pytest

from training.tuning import checkpoints

_INPUTS = {"seed": 1, "rows": [1, 2]}


def _made(folder: Path, *steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "inputs.json").write_text(json.dumps(_INPUTS))
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "optimizer.pt").write_bytes(b"moments" * step)
        (checkpoint / "trainer_state.json").write_text("{}")
        checkpoints.seal(checkpoint)


def test_the_newest_whole_checkpoint_is_used(tmp_path: Path) -> None:
    _made(tmp_path, 9, 10, 100)
    assert checkpoints.latest(tmp_path, _INPUTS) == str(tmp_path / "checkpoint-100")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: (c / "sealed.json").unlink(), "it was not finished"),
        (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda c: (c / "optimizer.pt").write_bytes(b"cut"), "optimizer.pt has 3 bytes instead of 700"),
        (lambda c: (c / "optimizer.pt").write_bytes(b"MOMENTS" * 100), "optimizer.pt has changed"),
        (lambda c: (c / "sealed.json").write_text("{"), "sealed.json cannot be read"),
        (lambda c: (c / "sealed.json").write_text("[1]"), "sealed.json cannot be read"),
    ],
)
def test_a_damaged_one_is_set_aside_and_the_one_before_used(
    damage, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _made(tmp_path, 50, 100)
    damage(tmp_path / "checkpoint-100")
    with caplog.at_level(logging.INFO):
        assert checkpoints.latest(tmp_path, _INPUTS) == str(tmp_path / "checkpoint-50")
    assert caplog.messages == [
        f"checkpoint-100 is not used ({said}) and set aside as damaged-checkpoint-100; trying the one before",
        "resuming from checkpoint-50",
    ]
    assert (tmp_path / "damaged-checkpoint-100").is_dir()


def test_when_all_are_damaged_training_starts_over(tmp_path: Path) -> None:
    _made(tmp_path, 50)
    (tmp_path / "checkpoint-50" / "sealed.json").unlink()
    assert checkpoints.latest(tmp_path, _INPUTS) is None


def test_a_fine_tune_keeps_the_date_it_was_begun_on(tmp_path: Path) -> None:
    today = {**_INPUTS, "date": date.today().isoformat()}
    assert checkpoints.dated(tmp_path, _INPUTS) == today
    begun = {**_INPUTS, "date": "2024-02-05"}
    checkpoints.latest(tmp_path, begun)
    assert checkpoints.dated(tmp_path, _INPUTS) == begun
    assert checkpoints.dated(tmp_path, {**_INPUTS, "seed": 2}) == {**today, "seed": 2}
    for unusable in ("{", "[]", json.dumps(_INPUTS), json.dumps({**_INPUTS, "date": "soon"})):
        (tmp_path / "inputs.json").write_text(unusable)
        assert checkpoints.dated(tmp_path, _INPUTS) == today


def test_a_checkpoint_of_another_date_is_not_resumed_from(tmp_path: Path) -> None:
    _made(tmp_path, 50)
    (tmp_path / "inputs.json").write_text(json.dumps({**_INPUTS, "date": "2024-02-05"}))
    assert checkpoints.latest(tmp_path, checkpoints.dated(tmp_path, _INPUTS)) == str(tmp_path / "checkpoint-50")
    assert checkpoints.latest(tmp_path, {**_INPUTS, "date": "2024-02-06"}) is None


@pytest.mark.parametrize(("checkpoint", "step"), [(None, 0), ("/a/checkpoint-50", 50), ("checkpoint-7/", 7)])
def test_the_step_of_a_checkpoint(checkpoint: str | None, step: int) -> None:
    assert checkpoints.step(checkpoint) == step


def test_checkpoints_of_another_training_are_set_aside_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, aside = tmp_path / "checkpoints", tmp_path / "checkpoints-of-other-inputs"
    for step in (50, 100):  # the second one replaces the first
        _made(folder, step)
        caplog.clear()
        assert checkpoints.latest(folder, {"seed": 2}) is None
        assert sorted(p.name for p in folder.iterdir()) == ["inputs.json", "way.json"]
        assert {p.name for p in aside.iterdir()} - {"way.json"} == {f"checkpoint-{step}", "inputs.json"}
        assert caplog.messages == [
            f"checkpoint-{step} is of a training with other inputs or batches: set aside as {aside}, training starts over"
        ]


def test_a_note_without_checkpoints_is_nothing_to_keep(tmp_path: Path) -> None:
    _made(tmp_path / "checkpoints")
    assert checkpoints.latest(tmp_path / "checkpoints", {"seed": 2}) is None
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


def test_a_checkpoint_of_another_trainer_or_other_batches_is_not_resumed_from(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints.latest(folder, _INPUTS, ("unsloth", "padded"))
    _made(folder, 50)
    assert checkpoints.latest(folder, _INPUTS, ("unsloth", "padded")) == str(folder / "checkpoint-50")
    # rows come in another order
    assert checkpoints.latest(folder, _INPUTS, ("hf", "packed")) is None
    assert (tmp_path / "checkpoints-of-other-inputs" / "checkpoint-50").is_dir()
    # one of a release that kept no note of it
    _made(folder, 60)
    (folder / "way.json").unlink()
    assert checkpoints.latest(folder, _INPUTS, ("hf", "packed")) is None
