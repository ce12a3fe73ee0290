import pytest

from pipeline.errors import InputError
from pipeline.planning.overrides import Known, Overrides
from pipeline.planning.plan import Setting

_KNOWN = Known(
    {
        "--alpha",
        "--beta",
        "--max-model-len",
        "-c",
        "--host",
        "--port",
        "--model",
        "--api-key",
        "--hf-token",
        "--served-model-name",
    },
    {"--fast", "--no-fast", "--bare"},
    {"NAME"},
    tokens={"--max-model-len"},
    automatic={"--max-model-len", "--fast", "NAME"},
)


@pytest.mark.parametrize("key", ["max_model_len", "max-model-len", "--max-model-len", "--max_model_len"])
def test_spellings_of_a_flag(key: str) -> None:
    assert Overrides.of({key: " 5 "}, _KNOWN).values == {"--max-model-len": "5"}


def test_variables_stay_as_they_are() -> None:
    assert Overrides.of({"NAME": "5"}, _KNOWN).values == {"NAME": "5"}


def test_aliases() -> None:
    assert Overrides.of({"ctx-size": "5"}, _KNOWN, {"--ctx-size": "-c"}).values == {"-c": "5"}


@pytest.mark.parametrize("key", ["port", "host", "model", "api_key", "hf-token", "served-model-name"])
def test_reserved_names_are_refused_with_the_right_way(key: str) -> None:
    with pytest.raises(InputError) as caught:
        Overrides.of({key: "x"}, _KNOWN)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("text", "tokens"), [("32k", "32768"), ("128K", "131072"), ("1.5k", "1536"), ("0k", "0"), ("4096", "4096")]
)
def test_tokens_may_be_counted_in_thousands_of_1024(text: str, tokens: str) -> None:
    assert Overrides.of({"max_model_len": text}, _KNOWN).values == {"--max-model-len": tokens}


def test_part_of_a_token_and_other_thousands_are_refused() -> None:
    with pytest.raises(InputError, match=r"--max-model-len is '1.3k', which is 1331.2 tokens"):
        Overrides.of({"max_model_len": "1.3k"}, _KNOWN)
    assert Overrides.of({"alpha": "2k"}, _KNOWN).values == {"--alpha": "2k"}  # a word of the engine's own


def test_auto_is_as_if_nothing_had_been_said() -> None:
    assert Overrides.of({"max-model-len": "5", "max_model_len": "auto", "NAME": "AUTO", "fast": "auto"}, _KNOWN).values == {}
    assert Overrides.of({"max-model-len": "auto", "max_model_len": "5"}, _KNOWN).values == {"--max-model-len": "5"}
    with pytest.raises(InputError, match="--alpha has no automatic choice"):
        Overrides.of({"alpha": "auto"}, _KNOWN)


def test_only_a_switch_stands_alone() -> None:
    assert Overrides.of({"fast": ""}, _KNOWN).switch("--fast") is True
    for name in ("alpha", "NAME"):
        with pytest.raises(InputError, match="needs a value"):
            Overrides.of({name: " "}, _KNOWN)


@pytest.mark.parametrize("text", ["1.5", "x", "", "0", "11", "1e1"])
def test_integers_are_checked(text: str) -> None:
    with pytest.raises(InputError):
        Overrides({"--n": text}).integer("--n", 1, 10)


def test_numbers_choices_and_switches() -> None:
    user = Overrides({"--n": "7", "--x": "0.5", "--w": "b", "--s": "off"})
    assert (user.integer("--n", 1, 10), user.number("--x", 0, 1), user.choice("--w", ("a", "b")), user.switch("--s")) == (
        7,
        0.5,
        "b",
        False,
    )
    assert (user.integer("--q", 1, 2), user.number("--q", 1, 2), user.choice("--q", ("a",)), user.switch("--q")) == (None,) * 4
    for broken in (
        lambda: user.number("--w", 0, 1),
        lambda: user.number("--n", 0, 1),
        lambda: user.choice("--w", ("a",)),
        lambda: user.switch("--n"),
        lambda: Overrides({"--x": "nan"}).number("--x", 0, 1),
    ):
        with pytest.raises(InputError):
            broken()


def test_user_values_take_the_place_of_planned_ones() -> None:
    planned = [Setting("--alpha", "1", "why"), Setting("--bare", None, "why"), Setting("NAME", "x", "why")]
    flags, env = Overrides({"--alpha": "2", "--beta": "3", "NAME": "y"}).lay_over(planned, _KNOWN)
    assert flags == (
        Setting("--alpha", "2", "set by the user", "user"),
        Setting("--bare", None, "why"),
        Setting("--beta", "3", "set by the user", "user"),
    )
    assert env == (Setting("NAME", "y", "set by the user", "user"),)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"--fast": "true"}, ["--fast"]),
        ({"--fast": "false"}, ["--no-fast"]),
        ({"--no-fast": "true"}, ["--no-fast"]),
        ({"--bare": "false"}, []),
    ],
)
def test_switches_become_a_bare_flag_or_its_opposite(value: dict[str, str], words: list[str]) -> None:
    for planned in ([], [Setting("--fast", None, "why")], [Setting("--no-fast", None, "why")]):
        flags, _ = Overrides(value).lay_over(planned if "--bare" not in value else [], _KNOWN)
        assert [f.name for f in flags] == words


@pytest.mark.parametrize(
    ("key", "near"), [("alpah", "--alpha"), ("MAX_MODEL_LEN", "--max-model-len"), ("nam", "NAME"), ("fsat", "--fast")]
)
def test_unknown_names_get_the_nearest_known_one(key: str, near: str) -> None:
    with pytest.raises(InputError, match="the engine has no setting") as caught:
        Overrides.of({key: "1"}, _KNOWN)
    assert near in caught.value.remedy
