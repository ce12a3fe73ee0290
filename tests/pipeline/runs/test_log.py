from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.runs.folder import RunFolder
from pipeline.runs.log import written

log = logging.getLogger("granite")


def test_what_is_said_stands_in_the_run_folder_with_date_time_and_without_secrets(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-value-0815")
    with written(run, "merge") as path:
        log.info("shard %d with planted-value-0815", 1)
        log.debug("not said")
    log.info("after")
    assert path.parent == run.logs
    assert re.fullmatch(r"merge-\d{8}-\d{6}\.log", path.name)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO granite: shard 1 with \*{8}\n", path.read_text())


def test_an_error_ends_the_log_with_its_traceback(run: RunFolder) -> None:
    with pytest.raises(ValueError, match="odd"), written(run, "merge") as path:
        raise ValueError("odd")
    assert "ended by ValueError('odd')" in path.read_text()
    assert "Traceback" in path.read_text()


def test_a_quiet_terminal_stays_quiet(run: RunFolder) -> None:
    root, shown = logging.getLogger(), []

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown.append(record.getMessage())

    handler, level = Shown(), root.level
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    try:
        with written(run, "merge") as path:
            log.info("quiet")
            log.warning("loud")
        assert (root.level, handler.level) == (logging.WARNING, logging.NOTSET)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    assert shown == ["loud"]
    assert "quiet" in path.read_text()


_NOTICES = """import logging, sys
from pipeline.commands import show
from pipeline.runs.log import unheard
show.log_to_stderr(logging.INFO)
import datasets
from tqdm.auto import tqdm
logging.getLogger("datasets.config").info("Disabling Tensorflow because USE_TORCH is set")
logging.getLogger("bitsandbytes.cextension").warning("Failed to load CPU gemm_4bit_forward")
with unheard(logging.getLogger("ours")):
    print("Unsloth: no GPU found")
for _ in tqdm(range(3), desc="Loading weights"):
    pass
logging.getLogger("ours").info("a line of %d words", 5 * 40)
logging.getLogger("ours").info("x" * 300)"""


def test_without_a_terminal_there_are_lines_with_the_time_and_no_bars_or_notices() -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TQDM_", "HF_HUB_DISABLE", "HF_HUB_ENABLE"))
    }
    environment |= {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", _NOTICES], env=environment, capture_output=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"\r" not in done.stderr
    said = done.stderr.decode().splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in said] == ["a line of 200 words", "x" * 300]
