import pytest

from pipeline.report.phrases import duration, first_line, flatten, listing, moment, percent, points, words


@pytest.mark.parametrize(
    ("share", "text"),
    [
        *[(None, "–"), (0.0, "0 %"), (0.0001, "< 0.1 %"), (0.0005, "0.1 %"), (0.5, "50 %"), (0.8627, "86.3 %")],
        *[(0.9994, "99.9 %"), (0.9996, "> 99.9 %"), (1.0, "100 %")],
    ],
)
def test_percent_never_rounds_to_all_or_none(share: float | None, text: str) -> None:
    assert percent(share).replace("\u00a0", " ") == text


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        (0.0, "the same as"),
        (-0.0004, "the same as"),
        (-0.005, "0.5 points below"),
        (0.01, "1 point above"),
        (0.2, "20 points above"),
    ],
)
def test_points(difference: float, text: str) -> None:
    assert points(difference) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(None, "–"), (0.84, "0.8 s"), (9.96, "10 s"), (99.4, "99 s"), (99.6, "1 min 40 s"), (522.4, "8 min 42 s")],
        *[(3599.6, "1 h 00 min"), (7500, "2 h 05 min")],
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds).replace("\u00a0", " ") == text


@pytest.mark.parametrize(
    ("iso", "text"),
    [
        *[("2026-11-14T09:31:52+00:00", "2026-11-14 09:31 UTC"), ("2026-11-14T11:31:52+02:00", "2026-11-14 09:31 UTC")],
        *[("2026-11-14T09:31:52", "2026-11-14 09:31"), ("yesterday", "yesterday")],
    ],
)
def test_moment(iso: str, text: str) -> None:
    assert moment(iso) == text


def test_words_read_as_words() -> None:
    assert words("export.gguf_loads") == "export: GGUF loads"
    assert words("widget_id") == "widget ID"


def test_flatten_keeps_plain_lists_on_one_row() -> None:
    value = {"a": {"b": [1, None, True], "c": []}, "d": [{"e": "x"}, ["y", "z"]]}
    assert flatten(value) == [("a.b", "1, –, yes"), ("a.c", "–"), ("d[0].e", "x"), ("d[1]", "y, z")]


def test_first_line_is_a_short_sentence() -> None:
    assert first_line("\n  it broke \nstack") == "it broke."
    assert first_line("") == "no detail given."
    assert first_line("x" * 500) == "x" * 279 + "…"


def test_listing() -> None:
    assert [listing(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
