"""The shared parsers of what is given as words."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.commands import options
from pipeline.errors import InputError
from pipeline.runs.folder import RunFolder


def test_set_takes_values_and_switches() -> None:
    assert options.overrides(["max-model-len=4096", " enforce-eager", "x=a=b", "y="]) == {
        **{"max-model-len": "4096", "enforce-eager": "", "x": "a=b", "y": ""}
    }
    assert options.overrides(None) == {}
    with pytest.raises(InputError, match="--set '=x' is not KEY=VALUE") as caught:
        options.overrides(["=x"])
    assert "--set max_model_len=32k" in str(caught.value)


def test_a_parameter_needs_its_value() -> None:
    assert options.pair("parameter", "EPOCHS=2") == ("EPOCHS", "2")
    for text in ("EPOCHS", "=2", ""):
        with pytest.raises(InputError, match=r"parameter .* is not NAME=VALUE"):
            options.pair("parameter", text)


def test_lists_and_known_words() -> None:
    assert options.listed(" vllm, ,ollama ") == ["vllm", "ollama"]
    options.require_known("purpose", "serve", ("verify", "serve"))
    with pytest.raises(InputError, match="no purpose 'fun'") as caught:
        options.require_known("purpose", "fun", ("verify", "serve"))
    assert caught.value.remedy == "use verify, serve"


def test_without_an_agent_the_words_are_what_was_given(tmp_path: Path) -> None:
    assert options.chosen(None, "a", "vllm", "m") == ("a", "vllm", "m")
    assert options.chosen(None, None).run is None
    assert options.folder(None, None, tmp_path) == RunFolder(output=tmp_path)
    with pytest.raises(InputError, match="not usable"):
        options.folder(None, "", tmp_path)
