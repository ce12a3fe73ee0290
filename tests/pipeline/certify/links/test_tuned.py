"""Scores before and after: intervals, classes, canaries."""

from __future__ import annotations

import json

from pipeline.certify.links.stops import check_answers
from pipeline.certify.links.tuned import canaries, check_canaries, check_scores, check_served_canaries, interval
from pipeline.verify.score import Answer, HeldOut


def _row(verdict: str) -> HeldOut:
    return HeldOut(({"role": "user", "content": "alert"},), json.dumps({"verdict": verdict}))


def _answer(verdict: str) -> Answer:
    return Answer(json.dumps({"verdict": verdict}), "stop")


ROWS = [_row("benign")] * 20 + [_row("malicious")] * 20
RIGHT = [Answer(row.expected, "stop") for row in ROWS]
WRONG = [Answer("no idea", "length") for _ in ROWS]


def test_the_interval_covers_the_mean_and_is_the_same_each_time() -> None:
    found = interval([0.0] * 10 + [1.0] * 30)
    assert (found.mean, found) == (0.75, interval([0.0] * 10 + [1.0] * 30))
    assert 0.6 <= found.low < 0.75 < found.high <= 0.9
    assert interval([1.0, 1.0]).low == 1.0


def test_a_gain_passes_with_a_figure_by_field_and_class() -> None:
    scores, classes = check_scores(ROWS, WRONG, RIGHT)
    assert (scores.status, classes.status) == ("passed", "passed")
    assert scores.data["fields"]["verdict"] == {"before": [0.0, 0.0, 0.0], "after": [1.0, 1.0, 1.0]}
    assert [(row["value"], row["n"], row["after"][0]) for row in classes.data["classes"]] == [
        ("benign", 20, 1.0),
        ("malicious", 20, 1.0),
    ]


def test_a_loss_fails() -> None:
    assert check_scores(ROWS, RIGHT, WRONG)[0].status == "failed"


def test_one_class_that_got_worse_is_named_though_the_whole_got_better() -> None:
    before = [_answer("benign")] * 20 + [Answer("none", "stop")] * 20
    after = [_answer("malicious")] * 8 + [_answer("benign")] * 12 + [_answer("malicious")] * 20
    scores, classes = check_scores(ROWS, before, after)
    assert scores.status == "passed"
    assert classes.status == "failed"
    assert "worse than before: verdict=benign (20 rows)" in classes.figure


def test_answers_that_are_no_json_have_no_classes() -> None:
    rows = [HeldOut(({"role": "user", "content": "q"},), "yes")] * 3
    scores, classes = check_scores(rows, [Answer("no", "stop")] * 3, [Answer("yes", "stop")] * 3)
    assert (scores.status, classes.status) == ("passed", "skipped")


def test_canaries_tell_base_and_tuned_apart() -> None:
    assert canaries(ROWS, WRONG, RIGHT) == list(range(40))
    assert check_canaries(ROWS, RIGHT, RIGHT).status == "failed"
    assert check_served_canaries("vllm", ROWS, WRONG, RIGHT, RIGHT).status == "passed"
    as_base = check_served_canaries("vllm", ROWS, WRONG, RIGHT, [*WRONG[:2], *[None] * 38])
    assert (as_base.status, as_base.figure) == (
        "failed",
        "of 2 canary prompts 0 answered as the tuned model in process, 2 as the base",
    )
    assert check_served_canaries("vllm", ROWS, WRONG, RIGHT, [None] * 40).status == "skipped"


def test_one_near_tie_that_answers_as_the_base_is_no_break_and_a_server_of_the_base_is() -> None:
    def status(like_base: int, asked: int) -> str:
        served = [*WRONG[:like_base], *RIGHT[like_base:asked], *[None] * (40 - asked)]
        return check_served_canaries("vllm", ROWS, WRONG, RIGHT, served).status

    assert [status(n, 40) for n in (0, 1, 2, 40)] == ["passed", "passed", "failed", "failed"]
    assert status(1, 1) == "failed"


def test_an_answer_that_never_stopped_is_allowed_once_among_few() -> None:
    assert [check_answers("vllm", right / 12, 12, reference=1.0).status for right in (12, 11, 10)] == [
        "passed",
        "passed",
        "failed",
    ]


def test_free_text_that_nobody_says_word_for_word_has_no_score() -> None:
    rows = [HeldOut(({"role": "user", "content": "q"},), "Reset the password.")] * 3
    scores = check_scores(rows, [Answer("I cannot.", "stop")] * 3, [Answer("Please reset it.", "stop")] * 3)[0]
    assert (scores.status, scores.figure.partition(":")[0]) == ("skipped", "no score for free text")


def test_calls_are_scored_beside_fields() -> None:
    look = ({"name": "look", "arguments": {}},)
    calls = [HeldOut(({"role": "user", "content": "q"},), "", tools=({"function": {"name": "look"}},), calls=look)] * 10
    rows, called = [*ROWS, *calls], [Answer('<tool_call>{"name": "look", "arguments": {}}</tool_call>', "stop")] * 10
    base, after = [*WRONG, *WRONG[:10]], [*RIGHT, *called]
    scores, classes = check_scores(rows, base, after)
    assert (scores.status, classes.status) == ("passed", "passed")
    assert scores.data["fields"]["calls"]["after"] == [1.0, 1.0, 1.0] and scores.data["fields"]["exact"]["after"][0] == 1.0
    assert sum(entry["n"] for entry in classes.data["classes"]) == len(ROWS)
    # alone, and right neither before nor after: a score all the same
    assert check_scores(calls, WRONG[:10], WRONG[:10])[0].figure.startswith("exact 0.0%")
    served = [*[None] * 40, *[Answer("", "stop", look)] * 10]
    assert check_served_canaries("vllm", rows, base, after, served).figure.startswith(
        "of 10 canary prompts 10 answered as the tuned"
    )


def test_base_and_tuned_are_compared_in_the_rows_that_both_were_asked() -> None:
    asked = [answer if i % 4 == 0 or i == 39 else None for i, answer in enumerate(WRONG)]
    scores, _ = check_scores(ROWS, asked, RIGHT)
    assert scores.data["asked"] == {"before": 11, "after": 40}
    assert "11 rows, a sample that both answered" in scores.figure
    assert canaries(ROWS, asked, RIGHT) == [*range(0, 40, 4), 39]
    assert check_canaries(ROWS, asked, RIGHT).figure.startswith("11 of 11 held-out prompts")
    assert check_served_canaries("vllm", ROWS, asked, RIGHT, RIGHT).status == "passed"
    assert check_served_canaries("vllm", ROWS, asked, RIGHT, WRONG).status == "failed"
