"""Packaging: no licence text stands in the way of an export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.modelfile.grammar import parse_modelfile
from pipeline.prompts.chat import EMBEDDED_TEMPLATE
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from training.export.gguf import package


@pytest.fixture
def run(run: RunFolder, empty_gguf: Path, tmp_path: Path) -> RunFolder:
    base = tmp_path / "base"
    base.mkdir()
    run.merged.mkdir(parents=True)
    shutil.copy(empty_gguf, run.gguf)
    (run.merged / "chat_template.jinja").write_text(EMBEDDED_TEMPLATE)
    (run.merged / "tokenizer_config.json").write_text('{"eos_token": "<|end_of_text|>"}')
    (run.merged / "config.json").write_text('{"max_position_embeddings": 2048}')
    Manifest(run.manifest).record("finetune", {"base": {"id": str(base)}, "data": {}, "parameters": {}}, [], {"system": None}, 1)
    return run


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\ufeffApache\u00a0License\x0cEnd\n".encode(), " Apache License End\n"),
        ("Licence agr\u00e9\u00e9e\n".encode("latin-1"), "Licence agr\ufffd\ufffde\n"),
        (b"plain\r\n\ttext\n", "plain\n\ttext\n"),
    ],
)
def test_a_licence_is_written_as_far_as_ollama_reads_it(run: RunFolder, tmp_path: Path, raw: bytes, shown: str) -> None:
    (tmp_path / "base" / "LICENSE").write_bytes(raw)
    package(run)
    assert parse_modelfile(run.modelfile.read_text()).licenses == [shown]


def test_one_that_cannot_be_quoted_is_left_out_with_a_warning(
    run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "base" / "LICENSE").write_text('one"""\ntwo"""\n')
    package(run)
    assert parse_modelfile(run.modelfile.read_text()).licenses == []
    assert "LICENSE is left out" in caplog.text
