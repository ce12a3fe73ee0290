from __future__ import annotations

import logging
import re

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
