"""Shared fixtures."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.config import Settings
from pipeline.prompts.chat import EMBEDDED_TEMPLATE
from pipeline.runs.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """An empty run folder."""
    return RunFolder("test", tmp_path)


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No documented variable is set."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a dataset, a row a line: JSON of what is no text."""

    def made(*lines: object, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return made


def _write_gguf(path: Path, metadata: dict[str, str | int]) -> None:
    """A GGUF file with metadata strings and integers, and no tensors."""

    def text(value: str) -> bytes:
        raw = value.encode("utf-8")
        return struct.pack("<Q", len(raw)) + raw

    pairs = b"".join(
        text(key) + (struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value))
        for key, value in metadata.items()
    )
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata)) + pairs + b"\0" * 64)


@pytest.fixture
def write_gguf() -> object:
    return _write_gguf


@pytest.fixture
def empty_gguf(tmp_path: Path) -> Path:
    """A GGUF file that holds the embedded chat template and nothing to run."""
    path = tmp_path / "model.gguf"
    _write_gguf(
        path, {"general.architecture": "granite", "granite.context_length": 2048, "tokenizer.chat_template": EMBEDDED_TEMPLATE}
    )
    return path


# files that one worker has to itself where several share the suite (pytest -n auto), in this order before all others
TOGETHER = {
    # they start vLLM and plan with the memory that is free, or need a quick answer of two servers under load: never two at
    # once; and they take longest
    "vllm": (
        "e2e/test_failover",
        "e2e/test_agents",
        "e2e/test_line",
        "e2e/test_faults_vllm",
        "pipeline/integrations/test_frameworks",
    ),
    # they ask one converted model and one vLLM that renders
    "gguf": (
        "pipeline/prompts/test_parity_engines",
        "pipeline/verify/test_rows_engines",
        "pipeline/verify/test_probes_engines",
        "pipeline/commands/test_parity_mutations",
    ),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes many minutes unless it is asked for by its marker; where workers share, begin with the slow ones."""
    if fast := [item.nodeid for item in items if item.get_closest_marker("wide") and not item.get_closest_marker("slow")]:
        raise pytest.UsageError(f"marked wide, yet not slow, so that 'make check' runs them: {', '.join(fast)}")
    if "long" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if not item.get_closest_marker("long")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
    if hasattr(config, "workerinput"):
        order = list(TOGETHER)
        slow = {_part(item.nodeid) for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (order.index(part) if (part := _part(item.nodeid)) in order else 9, part not in slow))


def _part(nodeid: str) -> str:
    """What is one worker's: a file, so that what its fixtures train or start is made once, or some files."""
    file = nodeid.partition("::")[0]
    return next((name for name, files in TOGETHER.items() if file.removeprefix("tests/").removesuffix(".py") in files), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out the suite by parts, in the order in which they were collected."""
    from xdist.scheduler import LoadScopeScheduling

    class ByParts(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _part(nodeid)

    config.option.loadscopereorder = False
    return ByParts(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of ``-n auto``: a process for each core, and 4 GiB for each, for some load PyTorch, a model or an engine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, 4, int(psutil.virtual_memory().available // (4 * 2**30))))
