from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.engines.vllm import lora
from pipeline.engines.vllm.engine import Vllm
from pipeline.errors import InputError, ModelError
from pipeline.machine.named import hardware_from
from pipeline.model.model import Model
from pipeline.planning.plan import Adapter, Request

GOOD: dict[str, Any] = {"peft_type": "LORA", "r": 16, "target_modules": ["v_proj", "q_proj"], "base_model_name_or_path": "/base"}


def _adapter(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**GOOD, **changes}))
    return folder


def test_names_with_runs_and_folders(tmp_path: Path) -> None:
    _adapter(tmp_path / "one" / "adapter")
    folder = _adapter(tmp_path / "elsewhere", r=24)
    found = lora.parse(f"a=one, b={folder}", tmp_path)
    assert [(a.name, a.path, a.rank, a.targets) for a in found] == [
        ("a", tmp_path / "one" / "adapter", 16, ("q_proj", "v_proj")),
        ("b", folder, 24, ("q_proj", "v_proj")),
    ]
    assert lora.planned_rank(found) == 32


@pytest.mark.parametrize("text", ["", "one", "=one", "a=", "a=one,a=one"])
def test_words_that_are_no_adapters(tmp_path: Path, text: str) -> None:
    _adapter(tmp_path / "one" / "adapter")
    with pytest.raises(InputError):
        lora.parse(text, tmp_path)


def test_different_bases_are_named(tmp_path: Path) -> None:
    _adapter(tmp_path / "one" / "adapter")
    _adapter(tmp_path / "two" / "adapter", base_model_name_or_path="/other")
    with pytest.raises(InputError, match="different base models") as caught:
        lora.parse("a=one,b=two", tmp_path)
    assert caught.value.evidence == "a: /base\nb: /other"


@pytest.mark.parametrize(
    "change", [{"peft_type": "IA3"}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"r": 1000}, {"r": "x"}]
)
def test_adapters_that_vllm_cannot_serve(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        lora.read("a", _adapter(tmp_path / "a", **change))


def test_a_full_fine_tune_has_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="was fine-tuned as a whole"):
        lora.read("a", tmp_path)


def test_a_base_that_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder here"):
        lora.base_folder([Adapter("a", tmp_path, 8, (), "/nowhere")], None)


@pytest.mark.parametrize(("machine", "eager"), [("cpu-16c-64g-bf16", True), ("l4", False)])
def test_planned_flags_and_argv(machine: str, eager: bool) -> None:
    two = (Adapter("a", Path("/r/a/adapter"), 16, (), "/base"), Adapter("b", Path("/r/b/adapter"), 20, (), "/base"))
    request = Request(Model.from_shape("granite-4.0-350m"), hardware_from(machine), "serve", "base", {}, two)
    plan = Vllm().plan(request)
    assert plan.arguments[plan.arguments.index("--enable-lora") :][:5] == [
        "--enable-lora",
        "--max-lora-rank",
        "32",
        "--max-loras",
        "2",
    ]
    assert ("--enforce-eager" in plan.arguments) is eager
    argv = Vllm().launch(plan, request, host="127.0.0.1", port=1).argv
    assert argv[argv.index("--lora-modules") :] == (
        "--lora-modules", "a=/r/a/adapter", "b=/r/b/adapter", "--host", "127.0.0.1", "--port", "1",
    )  # fmt: skip
    without = Vllm().plan(Request(request.model, request.hardware, "serve", "base"))
    assert "--enable-lora" not in without.arguments
    assert plan.memory.overhead > without.memory.overhead


def test_more_adapters_than_slots_wait_in_ram() -> None:
    many = tuple(Adapter(f"a{n}", Path("/x"), 8, (), "/base") for n in range(12))
    request = Request(Model.from_shape("granite-4.0-350m"), hardware_from("l4"), "serve", "base", {}, many)
    words = Vllm().plan(request).arguments
    assert words[words.index("--max-loras") + 1] == "8"
    assert words[words.index("--max-cpu-loras") + 1] == "12"


def test_slots_of_a_known_shape() -> None:
    shape = Model.from_shape("granite-3.3-2b").shape
    # hidden 2048, 32 heads of 64, 8 kv heads, 8192 feed-forward, 40 layers
    per_layer = (2048 + 2048) + 2 * (2048 + 512) + (2048 + 2048) + 3 * (2048 + 8192)
    assert lora.slots_gib(shape, 16, 2, 2.0) == pytest.approx(2 * 16 * 40 * per_layer * 2 / 2**30)
