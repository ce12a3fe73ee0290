"""A short budget of fuzzing for every reader of untrusted files; ``benchmarks/fuzz.py`` runs it for as long as wanted."""

from __future__ import annotations

import pytest
from fuzzing.targets import TARGETS, run


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_breaks_a_reader(name: str) -> None:
    run(name, examples=60, seed=1)
