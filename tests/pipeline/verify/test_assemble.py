from __future__ import annotations

import pytest

from pipeline.net.chat import Streamed
from pipeline.report.check import Check
from pipeline.verify import assemble
from pipeline.verify.evidence import Evidence, Features, restored, stored
from pipeline.verify.material import Material
from pipeline.verify.prober import difference
from pipeline.verify.score import Answer, HeldOut, score


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


LOOK = {"name": "look", "arguments": {"host": "a", "depth": 1}}
TEXT = '<tool_call>\n{"name": "look", "arguments": {"depth": 1, "host": "a"}}\n</tool_call>'
ASKED = ({"role": "user", "content": "q"},)
CALLS = HeldOut(ASKED, TEXT, ({"type": "function", "function": {"name": "look"}},), calls=(LOOK,))
THINKS = HeldOut(ASKED, "<think>a</think>Ada")


def _judged(*answers: Answer, streams: tuple[Streamed, ...] = (), numbers: tuple[int, ...] = ()) -> assemble.Outcome:
    rows, tuned = [CALLS, THINKS], [Answer(TEXT, "stop"), Answer(THINKS.expected, "stop")]
    material = Material(rows, [], tuned, tuned, score(rows, tuned), 8, None)  # type: ignore[arg-type]
    facts = {"injection": {"raw": None}, "structured_output": {"result": "passed"}, "tool_calls": {"result": "passed"}}
    probed = tuple(Check(f"vllm.{name}", "passed", "", data=data) for name, data in facts.items())
    features, parity = Features(("m",), answers[0], probed, streams, numbers), Check("vllm.prompt_parity", "passed", "equal")
    launched = dict.fromkeys(("engine_version", "argv", "ready_seconds"))
    said = Evidence("vllm", "1", "float32", (0, 1), answers, parity, features=features, model="m", launched=launched)
    assert restored(stored({"vllm": said})) == {"vllm": said}
    return assemble.judged(said, material)


def _plain(engine: str, *texts: str, rows: int = 16) -> tuple[Check, Evidence]:
    """The check of what a client gets without sampling settings, whose first answers are ``texts`` and the others right."""
    held = [HeldOut(ASKED, f"answer {n}") for n in range(rows)]
    right = [Answer(row.expected, "stop") for row in held]
    plain = dict(enumerate([*[Answer(text, "stop") for text in texts], *right[len(texts) :]]))
    features = Features((), right[0], (), (), plain=plain)
    said = Evidence(engine, "1", "Q8_0", tuple(range(rows)), tuple(right), features=features)
    assert restored(stored({engine: said})) == {engine: said}
    return assemble.plain_client(said, Material(held, [], right, right, {}, 8, None)), said  # type: ignore[arg-type]


def test_a_plain_client_that_gets_the_same_answers_passes_and_one_near_tie_may_tip() -> None:
    check, _ = _plain("vllm")
    assert (check.id, check.status) == ("vllm.plain_client", "passed")
    assert check.data == {"rows": 16, "exact": 1.0, "exact_greedy": 1.0, "same": 16}
    assert _plain("vllm", "another")[0].status == "passed"
    assert _plain("vllm", "another", rows=15)[0].status == "warning"


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        ("ollama", "Ollama takes temperature 1 and top_p 1 where a request names none: send temperature 0 and top_p 1; the gateway fills it in"),
        ("llamacpp", "temperature 0.8 and top_p 0.95 where a request names none: send temperature 0 and top_p 1; the gateway fills it in, or granite-pipeline serve llamacpp sets it"),
        ("openai", "OpenAI-compatible takes settings of its own where a request names none: send temperature 0; the gateway fills it in"),
    ],
)  # fmt: skip
def test_other_answers_for_a_plain_client_are_a_warning_with_the_remedy(engine: str, told: str) -> None:
    check, _ = _plain(engine, "x", "y")
    assert check.status == "warning"
    assert check.figure.startswith("exact 0.875 of 16 rows without sampling settings, 1.000 with; 14 answers are the same. ")
    assert check.figure.endswith(told)


def test_a_backend_is_judged_by_what_it_said_however_it_said_it() -> None:
    stream = Streamed("", 0.1, 0.2, 2, ({"name": "look", "arguments": '{"host": "a", "depth": 1}'},))
    right = _judged(Answer("", "stop", (LOOK,)), Answer("Ada", "stop", thought="b"), streams=(stream,), numbers=(0,))
    assert (right.entry.status, right.entry.exact, right.entry.prompts.passed) == ("passed", 1.0, 2)
    assert right.entry.fields["calls"] == 1.0 and "severity" not in right.entry.fields
    wrong = _judged(Answer(TEXT, "stop", ()), Answer("Ada", "stop", thought="b"), streams=(stream,), numbers=(0,))
    broken = {check.id: check.figure for check in wrong.checks if check.status == "failed"}
    # the one row of two that tipped is within what is allowed of so few; it is counted all the same
    assert (wrong.entry.exact, wrong.entry.prompts.passed, wrong.entry.fields["calls"]) == (0.5, 1, 0.0)
    assert broken == {}
