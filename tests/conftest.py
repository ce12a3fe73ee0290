"""Shared fixtures."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

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


# they start vLLM and plan with the memory that is free: one after another, and before all else, for they take longest
ON_VLLM = tuple(f"tests/{name}.py" for name in ("e2e/test_agents", "e2e/test_line", "e2e/test_faults_vllm", "pipeline/integrations/test_frameworks"))  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes many minutes unless it is asked for by its marker; several workers share the rest by files."""
    if fast := [item.nodeid for item in items if item.get_closest_marker("wide") and not item.get_closest_marker("slow")]:
        raise pytest.UsageError(f"marked wide, yet not slow, so that 'make check' runs them: {', '.join(fast)}")
    if "long" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if not item.get_closest_marker("long")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
    if config.getoption("dist", "no") != "loadgroup":
        return
    items.sort(key=lambda item: (not item.nodeid.startswith(ON_VLLM), not item.get_closest_marker("slow")))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_worker(item)))


def _worker(item: pytest.Item) -> str:
    """Tests of one name are one worker's: what a file's fixtures train or start, and what a session makes, is made once."""
    if item.nodeid.startswith(ON_VLLM):
        return "vllm"
    shared = {"gguf", "vllm_renderer"} & set(getattr(item, "fixturenames", ()))
    return "gguf" if shared else item.nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of ``-n auto``: a process for each core, and 4 GiB for each, for some load PyTorch, a model or an engine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, 4, int(psutil.virtual_memory().available // (4 * 2**30))))
