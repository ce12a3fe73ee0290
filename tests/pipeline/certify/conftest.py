"""Fixtures of the certificate's tests."""

from __future__ import annotations

import pytest
import recorded

from pipeline.runs.folder import RunFolder


@pytest.fixture
def line(run: RunFolder) -> RunFolder:
    """A run whose every stage is recorded, on files of a few bytes."""
    return recorded.make(run)
