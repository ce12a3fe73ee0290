from __future__ import annotations

import pytest

from pipeline.net.chat import Streamed
from pipeline.verify import assemble
from pipeline.verify.prober import difference
from pipeline.verify.score import Answer, HeldOut


@pytest.mark.parametrize(
    ("served", "status"), [(0.90, "passed"), (0.85, "passed"), (0.95, "passed"), (0.84, "failed"), (0.96, "failed")]
)
def test_exact_may_differ_by_the_tolerance_either_way(served: float, status: str) -> None:
    assert assemble.exact("vllm", served, 0.90, 100).status == status


@pytest.mark.parametrize(("served", "status"), [(1.0, "passed"), (0.95, "passed"), (0.94, "failed")])
def test_answers_must_stop_as_often_as_in_process(served: float, status: str) -> None:
    assert assemble.finish("vllm", served, 1.0, 100).status == status


def test_one_tipped_answer_of_few_is_allowed_and_two_are_not() -> None:
    assert [assemble.exact("vllm", round(right / 12, 4), 1.0, 12).status for right in (11, 10)] == ["passed", "failed"]
    assert [assemble.finish("vllm", round(right / 12, 4), 1.0, 12).status for right in (11, 10)] == ["passed", "failed"]


def test_a_model_under_another_name_is_not_listed() -> None:
    assert assemble.listed("vllm", "granite-soc", ["base"]).status == "failed"
    assert assemble.listed("ollama", "granite-soc", ["granite-soc:latest"]).status == "passed"


def test_difference_shows_both_sides_at_the_first_difference() -> None:
    told = difference([1, 2, 9, 4], "text", [1, 2, 3, 4])
    assert told == "at position 2 of 4: engine [1, 2, 9, 4], tokenizer [1, 2, 3, 4]"
    assert "at position 4 of 5" in difference("abcd", "abcde", [])


def test_streaming_in_one_piece_is_not_streaming() -> None:
    whole = "a text of more than twenty characters"
    said = [(HeldOut((), whole), Answer(whole, "stop"))]
    assert assemble.streamed("x", [Streamed(whole, 0.1, 0.2, 9)], said).status == "passed"
    assert assemble.streamed("x", [Streamed(whole, 0.1, 0.2, 1)], said).status == "failed"
    assert assemble.streamed("x", [], []).status == "skipped"


@pytest.mark.parametrize(
    ("answer", "reference", "status"),
    [("text", "text", "passed"), ("", "text", "failed"), (" ", "", "passed"), ("text", "", "passed")],
)
def test_an_engine_must_answer_where_the_trained_model_does(answer: str, reference: str, status: str) -> None:
    assert assemble.chat("vllm", answer, reference).status == status
