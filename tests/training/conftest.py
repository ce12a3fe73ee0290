"""Shared fixtures of training."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from training import preflight


@pytest.fixture(scope="session")
def sound_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base, for reading only."""
    return tiny.make("3.x-dense", tmp_path_factory.mktemp("sound") / "base")


@pytest.fixture(scope="session")
def converter_answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which tokenizers and configs the converter has taken in this session, as a base's cache keeps it."""
    return tmp_path_factory.mktemp("converter")


@pytest.fixture(scope="module", autouse=True)
def converter_asked_once(request: pytest.FixtureRequest, converter_answers: Path) -> Iterator[None]:
    """Trainings of one base in many folders share the preflight's answer, which takes a process with PyTorch to have."""
    ask = preflight._ask_converter
    with pytest.MonkeyPatch.context() as patched:
        if request.path.stem != "test_preflight":  # there it is what is tested
            patched.setattr(preflight, "_ask_converter", lambda model, scratch, _: ask(model, scratch, converter_answers))
        yield


@pytest.fixture
def folder(sound_base: Path, tmp_path: Path) -> Path:
    """A sound base, free to be spoilt."""
    return Path(shutil.copytree(sound_base, tmp_path / "base"))
