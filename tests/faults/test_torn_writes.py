"""A writer killed at any moment: a reader of the final name sees the old content or the new one, never a part of either."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.runs.files import sweep

KILLS = 25
SEED = 7
SIZE = 2_000_000
_WRITER = """
import sys
from pathlib import Path
from pipeline.runs.files import staged, write_atomic
folder, size = Path(sys.argv[1]), int(sys.argv[2])
for turn in range(10**6):
    letter = "ab"[turn % 2]
    write_atomic(folder / "report.json", letter * size)
    with staged(folder / "merged") as target:
        target.mkdir()
        for part in ("1", "2", "3"):
            (target / part).write_text(letter * (size // 3))
"""


def _whole(text: str, size: int) -> bool:
    return len(text) == size and len(set(text)) == 1


def _look(folder: Path) -> None:
    report, merged = folder / "report.json", folder / "merged"
    if report.exists():
        assert _whole(report.read_text(), SIZE)
    if merged.exists():
        parts = [(merged / part).read_text() for part in ("1", "2", "3")]
        assert all(_whole(part, SIZE // 3) for part in parts)
        assert len({part[0] for part in parts}) == 1


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_files_and_nothing_else(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    for _ in range(KILLS):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), str(SIZE)], env={**os.environ})
        deadline = time.monotonic() + 30
        while not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged.*/previous")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(0.15 + chance.uniform(0, 0.25))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        sweep(tmp_path)
        _look(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "report.json"]
