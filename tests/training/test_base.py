"""Base models: what building the embedded one leaves behind, and which one a run cannot be trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_tree
from pipeline.runs.manifest import Manifest
from training import base
from training.parameters import FinetuneParameters
from training.tuning.finetune import finetune

QUESTION = (
    "<|start_of_role|>user<|end_of_role|>What is the capital of France?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
)


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".embedded-2.ab12cd34", f".embedded-{base.RECIPE}._b12cd3_"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".hashes.json.ab12cd34").write_text("another process writes this now")
    monkeypatch.setattr(base, "build_embedded", Path.mkdir)  # 270 MB of weights are not the point here
    found = base.resolve("embedded", tmp_path)
    assert found.folder.is_dir()
    assert [path.name for path in tmp_path.glob(".embedded-*")] == []
    assert (tmp_path / ".hashes.json.ab12cd34").exists()


def test_a_run_is_not_trained_on_its_own_output(run: RunFolder, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "alert {i}", "completion": "ok"}}\n' for i in range(40)))
    run.merged.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (run.merged / name).write_text("{}")
    (tmp_path / "link").symlink_to(run.path)
    for folder in (run.merged, tmp_path / "link" / run.merged.name):
        with pytest.raises(InputError, match="lies in run test itself") as caught:
            finetune(run, FinetuneParameters(base=str(folder), data=str(rows)))
        assert "another --name" in caught.value.remedy
    assert not run.manifest.exists()


def test_the_base_of_a_run_is_the_recorded_one_at_its_revision(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"base": {"id": "owner/name", "revision": "abc", "sha256": "1"}, "data": {}, "parameters": {"base": "owner/name"}}
    Manifest(run.manifest).record("finetune", inputs, [], {}, 1)
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(base, "resolve", lambda *given: asked.append(given))
    base.BaseModel.of_run(run)
    assert asked == [("owner/name", run.base_cache, "abc")]


@pytest.mark.slow
def test_the_embedded_base_answers_and_is_made_the_same_each_time(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("first", "second"):
        base.build_embedded(tmp_path / name)
    assert sha256_tree(tmp_path / "first") == sha256_tree(tmp_path / "second")
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "first"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "first"))
    assert type(model).__name__ == "GraniteForCausalLM"
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0][ids.shape[1] :])


def test_a_newline_and_the_mark_that_stands_for_it_can_be_told_apart(tmp_path: Path) -> None:
    """Tied embeddings are the output too: two equal rows would be written at random in each other's place."""
    from safetensors.numpy import load_file

    base.build_embedded(tmp_path / "base")
    rows = load_file(str(tmp_path / "base" / "model.safetensors"))["model.embed_tokens.weight"].astype("float32")
    newline, mark = rows[198], rows[3]
    assert float(newline @ mark) / float((newline @ newline) ** 0.5 * (mark @ mark) ** 0.5) > 0.95
    assert float(mark @ mark) < 0.7 * float(newline @ newline)


def test_a_run_keeps_the_embedded_base_that_it_was_trained_on(run: RunFolder) -> None:
    older = run.base_cache / "embedded-3"
    older.mkdir(parents=True)
    (older / "config.json").write_text("{}")
    run.path.mkdir()
    run.adapter.mkdir()
    digest = sha256_tree(older)
    inputs = {"parameters": {"base": "embedded"}, "data": {}, "base": {"id": "embedded", "sha256": digest}}
    Manifest(run.manifest).record("finetune", inputs, [run.adapter], {}, 1.0)
    found = base.BaseModel.of_run(run)
    assert (found.folder, found.sha256) == (older, digest)
