"""A disk that is really full, in each stage: one clear error, earlier results intact, and a rerun after freeing space succeeds."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from pipeline.errors import DiskFull
from pipeline.report import write
from pipeline.runs.files import leftovers
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_tree
from training.export import gguf, merge
from training.parameters import FinetuneParameters
from training.tuning import finetune

pytestmark = pytest.mark.slow
SAMPLE = Path(__file__).parents[1] / "pipeline" / "sample_report.json"
MIB = 2**20


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of 80 MiB."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode()[:200]}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def parameters(tmp_path_factory: pytest.TempPathFactory) -> FinetuneParameters:
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"prompt": f"alert {i}", "completion": "ok" if i % 2 else "bad"} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = tiny.make("3.x-dense", folder / "base")
    return FinetuneParameters(base=str(base), data=str(folder / "rows.jsonl"), trainer="hf", max_steps=6, save_steps=2)


@pytest.fixture(scope="module")
def run(disk: Path, parameters: FinetuneParameters) -> RunFolder:
    """A finished run on the small disk."""
    run = RunFolder("t", disk)
    finetune.finetune(run, parameters)
    merge.merge(run)
    gguf.export_gguf(run)
    write.write_report(json.loads(SAMPLE.read_text()), run.report)
    return run


def _fill(disk: Path, left: int) -> Path:
    """Fill the disk but for so many bytes."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with filler.open("wb") as out:
        for _ in range(max(0, free - left) // 4096):
            out.write(b"\1" * 4096)
    return filler


STAGES: dict[str, tuple[Callable[[RunFolder, FinetuneParameters], object], int, str]] = {
    "training": (lambda run, p: finetune.finetune(run, p, force=True), 300_000, "training.tuning.finetune"),
    "merge": (lambda run, p: merge.merge(run, force=True), 3 * MIB, "training.export.weights"),
    "gguf": (lambda run, p: gguf.export_gguf(run, force=True), 2 * MIB, "training.export.gguf"),
    "report": (lambda run, p: write.write_report(json.loads(SAMPLE.read_text()), run.report), 4096, "pipeline.report.write"),
}


def _results(run: RunFolder) -> dict[str, str]:
    return {p.name: sha256_tree(p) for p in (run.adapter, run.merged, run.gguf, run.report, run.heldout)}


@pytest.mark.parametrize(
    "checked", [pytest.param(True, id="said before", marks=pytest.mark.wide), pytest.param(False, id="met on the way")]
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_said_and_costs_nothing(
    stage: str, checked: bool, disk: Path, run: RunFolder, parameters: FinetuneParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, left, module = STAGES[stage]
    before = _results(run)
    filler = _fill(disk, left)
    if not checked:  # as when another process takes the space after the check
        for place in {module, "training.preflight"}:
            monkeypatch.setattr(f"{place}.require_free_space", lambda *_: None)
    with pytest.raises(DiskFull, match=r"only [\d.]+ GiB are free" if checked else "is full") as caught:
        work(run, parameters)
    assert caught.value.exit_code == 3
    assert "free some space" in caught.value.remedy
    assert _results(run) == before
    assert leftovers(run.path) == leftovers(run.report) == []
    filler.unlink()
    monkeypatch.undo()
    work(run, parameters)
    assert _results(run) == before


def test_numbers_are_said_with_the_purpose(disk: Path, run: RunFolder) -> None:
    filler = _fill(disk, MIB)
    try:
        with pytest.raises(DiskFull) as caught:
            merge.merge(run, force=True)
    finally:
        filler.unlink()
    said: Any = caught.value.message
    assert said.startswith("the merged FP16 model needs 0.02 GiB in ")
    assert "only 0.00 GiB are free" in said
