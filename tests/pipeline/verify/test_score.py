from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.verify.score import Answer, HeldOut, answer_budget, fields_of, is_exact, read_held_out, score

WANT = '{"severity":"high","technique":"T1486","verdict":"malicious","action":"isolate_host"}'


def _row(expected: str = WANT) -> HeldOut:
    return HeldOut(({"role": "user", "content": "alert"},), expected)


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        (WANT, True),
        (json.dumps(json.loads(WANT), indent=1), True),
        (WANT.replace("isolate_host", "monitor"), True),
        (WANT.replace("T1486", "T1490"), False),
        (WANT.replace('"verdict":"malicious",', ""), False),
        (WANT + " sure", False),
        ("[]", False),
        ("", False),
    ],
)
def test_exact_needs_json_with_the_three_key_fields(text: str, exact: bool) -> None:
    assert is_exact(_row(), Answer(text, "stop"), fields_of([_row()])) is exact


def test_score_counts_each_field() -> None:
    answers = [Answer(WANT, "stop"), Answer(WANT.replace("high", "low"), "stop"), Answer("no", "length"), Answer(WANT, "stop")]
    assert score([_row()] * 4, answers) == {
        "n": 4, "json_valid": 0.75, "severity": 0.5, "technique": 0.75, "verdict": 0.75, "action": 0.75, "calls": None, "exact": 0.5, "finish_stop": 0.75,
    }  # fmt: skip


def test_answers_that_are_not_json_are_compared_as_text() -> None:
    rows = [_row("Paris"), _row("Rome")]
    found = score(rows, [Answer(" Paris\n", "stop"), Answer("rome", "stop")])
    assert found["exact"] == 0.5
    assert found["severity"] is None
    assert found["technique"] is None


def test_held_out_rows_are_read_with_their_answer_apart(tmp_path: Path) -> None:
    path = tmp_path / "heldout.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n")
    assert read_held_out(path) == [HeldOut(({"role": "user", "content": "a"},), "b")]


def test_a_broken_held_out_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "heldout.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"messages": []}\n')
    with pytest.raises(InputError, match=rf"{path}:2: not a held-out row"):
        read_held_out(path)


def test_free_text_may_be_longer_than_its_author_was_and_json_not() -> None:
    assert answer_budget([_row('{"a":1}'), _row('{"a":2}')], [20, 30]) == 42
    assert [answer_budget([_row("Yes, it is.")], [longest]) for longest in (4, 90, 400)] == [72, 244, 412]
