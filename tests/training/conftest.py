"""Shared fixtures of training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def sound_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base, for reading only."""
    return tiny.make("3.x-dense", tmp_path_factory.mktemp("sound") / "base")


@pytest.fixture
def folder(sound_base: Path, tmp_path: Path) -> Path:
    """A sound base, free to be spoilt."""
    return Path(shutil.copytree(sound_base, tmp_path / "base"))
