from __future__ import annotations

from pathlib import Path

import pytest
from small_run import make_run

from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.serve import artefacts


@pytest.fixture
def made(run: RunFolder) -> RunFolder:
    return make_run(run)


def test_gguf_and_merged_folder_are_the_same_fine_tune(made: RunFolder) -> None:
    gguf, merged = artefacts.of_file(made.gguf), artefacts.of_file(made.merged)
    assert gguf is not None
    assert merged is not None
    assert gguf.fine_tune == merged.fine_tune == artefacts.manifest_hash(Manifest(made.manifest))
    assert (gguf.run, gguf.file, merged.file) == ("test", "unsloth.Q8_0.gguf", "merged_fp16")
    assert gguf.sha256 != merged.sha256
    assert artefacts.Artefact.from_json(gguf.to_json()) == gguf


def test_other_weights_are_another_fine_tune(made: RunFolder) -> None:
    other = artefacts.of_file(make_run(RunFolder("other", made.output), b"x").gguf)
    mine = artefacts.of_file(made.gguf)
    assert mine is not None
    assert other is not None
    assert mine.fine_tune != other.fine_tune


def test_a_later_stage_does_not_change_the_fine_tune(made: RunFolder) -> None:
    before = artefacts.of_file(made.gguf)
    Manifest(made.manifest).record("evaluate", {"n": 1}, [], {}, 1)
    assert artefacts.of_file(made.gguf) == before


def test_a_containers_path_is_matched_by_run_and_file(made: RunFolder) -> None:
    assert artefacts.of_served_path(f"/models/test/{made.gguf.name}", made.output) == artefacts.of_file(made.gguf)
    assert artefacts.of_served_path("model", made.output) is None
    # names that no file system takes: a server may say anything
    assert artefacts.of_served_path(f"/{'a' * 300}/{made.gguf.name}", made.output) is None
    assert artefacts.of_served_path("/test/\0", made.output) is None


def test_a_changed_or_stale_file_is_not_ours(made: RunFolder, tmp_path: Path) -> None:
    assert artefacts.of_file(tmp_path / "nothing") is None
    manifest = Manifest(made.manifest)
    (made.merged / "model.safetensors").write_bytes(b"merged again")
    manifest.record("merge", {}, [made.merged], {}, 1)
    # the GGUF was made from the weights before
    assert artefacts.of_file(made.gguf) is None
    (made.merged / "model.safetensors").write_bytes(b"changed behind the manifest's back")
    assert artefacts.of_file(made.merged) is None
