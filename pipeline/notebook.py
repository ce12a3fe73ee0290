"""What the notebooks share: one set-up call, tables and charts that show in JupyterLab and in executed copies."""

import logging
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dotenv import find_dotenv, load_dotenv

from pipeline.net.loopback import spare_loopback
from pipeline.runs import log
from pipeline.runs.folder import RunFolder, writable_home

OWNER_VARIABLE = "GRANITE_PIPELINE_OWNER"


def begin(name: str, output: str) -> RunFolder:
    """Log with the time of day, and return the run folder; call it once, first."""
    load_dotenv(find_dotenv(usecwd=True))
    spare_loopback()
    log.begin(logging.StreamHandler(sys.stdout), again=True)  # JupyterLab saves what is logged with the notebook
    writable_home()
    return RunFolder(name, Path(output).resolve())


def owner() -> int | None:
    """The process that servers started here must not outlive: the batch run's, or none in an interactive session."""
    pid = os.environ.get(OWNER_VARIABLE)
    return int(pid) if pid else None


def table(rows: Iterable[Mapping[str, Any]]) -> Any:
    """A table of dicts, long texts wrapped instead of cut."""
    import pandas

    look = pandas.DataFrame(list(rows)).style.hide(axis="index").format(na_rep="", precision=4)
    look.set_table_styles([{"selector": "th", "props": [("text-align", "left")]}])
    return look.set_properties(**{"text-align": "left", "white-space": "pre-wrap", "max-width": "48em", "vertical-align": "top"})


def pairs(mapping: Mapping[str, Any]) -> Any:
    """A two-column table of names and values."""
    return table({"name": name, "value": str(value)} for name, value in mapping.items())


def chart(svg: str) -> Any:
    """An SVG drawn by ``pipeline.report.charts``, shown inline."""
    from IPython.display import HTML

    return HTML(f'<div style="max-width:760px;background:#fff;color:#111">{svg}</div>')
