import pytest

from pipeline.errors import DataError, PipelineError, StartFailure, at


def test_at_says_where_and_keeps_everything_else() -> None:
    with pytest.raises(DataError) as caught, at("run"), at("rows.jsonl:3"):
        raise DataError("no answer", evidence="{}", remedy="give one")
    assert str(caught.value) == "run: rows.jsonl:3: no answer\n{}\nWhat to do: give one"
    assert caught.value.args == ("run: rows.jsonl:3: no answer",)


def test_at_keeps_what_only_one_class_carries() -> None:
    failure = StartFailure("died", kind="oom", numbers=[1.5])
    with pytest.raises(StartFailure) as caught, at("generic"):
        raise failure
    assert caught.value is failure
    assert (failure.message, failure.kind, failure.numbers) == ("generic: died", "oom", (1.5,))


def test_at_leaves_other_errors_and_results_alone() -> None:
    with pytest.raises(ValueError, match=r"^plain$"), at("here"):
        raise ValueError("plain")
    with at("here"):
        text = str(PipelineError("made, not raised"))
    assert text == "made, not raised"
