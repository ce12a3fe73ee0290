import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.answers import Line, Span, compare, show
from pipeline.runs.text import visible

EXPECTED = '{"severity": "high", "technique": "T1059", "score": 1}'


def test_equal_objects_match_whatever_their_spelling() -> None:
    found = compare(EXPECTED, '{"technique":"T1059",\n"score":1,"severity":"h\\u0069gh"}')
    assert (found.matches, found.note) == (True, "as expected")
    assert [line.field for line in found.lines] == ["severity", "technique", "score"]


def test_fields_are_marked_one_by_one() -> None:
    found = compare(EXPECTED, '{"severity": "low", "technique": "T1059", "verdict": ["x"]}')
    assert found.lines == (
        Line("severity", (Span("low", "differs"),)),
        Line("technique", (Span("T1059"),)),
        Line("score", (Span("(missing)", "missing"),)),
        Line("verdict", (Span('["x"]', "extra"),)),
    )
    assert (found.matches, found.note) == (False, "differs in severity, score, verdict")


@pytest.mark.parametrize("value", ["true", "1.0", '"1"'])
def test_a_value_of_another_type_differs(value: str) -> None:
    assert compare('{"score": 1}', f'{{"score": {value}}}').note == "differs in score"


@pytest.mark.parametrize("answer", ["Sure! It is high.", "[1]", "{", "[" * 100_000, "9" * 5000])
def test_what_is_not_an_object_is_shown_whole(answer: str) -> None:
    found = compare(EXPECTED, answer)
    assert (found.lines, found.note) == ((Line(None, (Span(answer),)),), "not a JSON object")


def test_an_empty_answer_is_said_to_be_empty() -> None:
    assert compare(EXPECTED, " \n").note == "empty answer"


def test_texts_are_compared_by_word() -> None:
    found = compare("isolate the host now", "isolate the laptop now please")
    assert found.lines[0].spans == (
        *(Span("isolate the "), Span("host", "missing"), Span("laptop", "extra"), Span(" now"), Span(" please", "extra")),
    )
    assert found.note == "some words differ"


def test_texts_with_little_in_common_are_not_marked() -> None:
    assert compare("isolate the host", "1 2 3 4 5 6 7 8 9").lines == (Line(None, (Span("1 2 3 4 5 6 7 8 9"),)),)


def test_very_long_texts_are_not_marked() -> None:
    assert compare("a " * 5000, "a " * 4999 + "b").note == "a different text"


def test_same_text_apart_from_the_ends_matches() -> None:
    assert compare("yes\n", "yes").matches


def test_show_marks_nothing() -> None:
    assert show('{"a": null}').lines == (Line("a", (Span("null"),)),)
    assert show("plain").lines == (Line(None, (Span("plain"),)),)


def test_control_and_bidi_characters_are_spelled_out() -> None:
    assert visible("a\x00b\x1b[31m\u202ec\td\n") == "a‹U+0000›b‹U+001B›[31m‹U+202E›c\td\n"


@given(st.text(), st.text())
def test_word_marks_give_both_texts_back(expected: str, answer: str) -> None:
    found = compare(expected, answer)
    if found.note == "some words differ":
        spans = found.lines[0].spans
        assert "".join(s.text for s in spans if s.kind != "missing") == visible(answer.strip())
        assert "".join(s.text for s in spans if s.kind != "extra") == visible(expected.strip())
    assert found.matches == (found.note == "as expected")


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()))
def test_every_object_matches_itself(value: dict[str, object]) -> None:
    assert compare(json.dumps(value), json.dumps(value, indent=2)).matches
