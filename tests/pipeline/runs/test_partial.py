from __future__ import annotations

from pathlib import Path

from pipeline.runs.stages import Partial

_A, _B = {"text": "one\u2028\nline", "finish_reason": "stop"}, {"text": "two", "finish_reason": "length"}


def test_what_was_done_is_there_after_a_kill_and_a_cut_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "tuned.part"
    first = Partial(path, "key")
    first.add({"3": _A})
    first.add({"0": _B})
    path.write_bytes(path.read_bytes() + b'{"1": {"text": "cu')
    again = Partial(path, "key")
    assert again.done == {"3": _A, "0": _B}
    again.add({"1": _B})
    assert Partial(path, "key").done == {"3": _A, "0": _B, "1": _B}


def test_what_was_done_for_other_inputs_is_not_taken(tmp_path: Path) -> None:
    Partial(tmp_path / "p", "key").add({"0": _A})
    assert Partial(tmp_path / "p", "other").done == {}


def test_damaged_files_are_empty_ones(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"\xff\xfe[1]\n7\n")
    partial = Partial(tmp_path / "p", "key")
    assert partial.done == {}
    partial.remove()
    assert not (tmp_path / "p").exists()
