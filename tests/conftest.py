"""Shared fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.runs import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """An empty run folder."""
    return RunFolder("test", tmp_path)
