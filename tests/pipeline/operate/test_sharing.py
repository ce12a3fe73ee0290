"""Agents that share a base: what one server of their adapters takes and loses, against a server each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.machine.named import hardware_from
from pipeline.model.safetensors import read_folder
from pipeline.operate.agents import Agents, Sharing, sharing
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest

SHAPE = {
    **{"architectures": ["GraniteForCausalLM"], "model_type": "granite", "hidden_size": 4096, "num_hidden_layers": 40},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12800, "vocab_size": 100352},
    **{"max_position_embeddings": 131072, "tie_word_embeddings": True},
}


def _base(folder: Path, name: str = "base") -> Path:
    """A base of 8 billion parameters in its headers, and of no bytes on disk."""
    base = folder / name
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(SHAPE))
    header = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [8170848256], "data_offsets": [0, 8170848256 * 2]}}
    text = json.dumps(header).encode()
    with (base / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 8170848256 * 2)
    assert read_folder(base)
    return base


def _run(output: Path, name: str, base: Path, sha256: str, **config: object) -> RunFolder:
    run = RunFolder(name, output)
    run.adapter.mkdir(parents=True)
    adapter = {"peft_type": "LORA", "r": 16, "target_modules": ["q_proj"], "base_model_name_or_path": str(base), **config}
    (run.adapter / "adapter_config.json").write_text(json.dumps(adapter))
    inputs = {"parameters": {"base": str(base)}, "base": {"id": str(base), "sha256": sha256}, "data": {}}
    Manifest(run.manifest).record("finetune", inputs, [run.adapter], {}, 1)
    return run


def _agents(**agents: object) -> Agents:
    return Agents.model_validate({"agents": agents})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return _base(tmp_path)


def _sixteen(output: Path, base: Path) -> Agents:
    for number in range(16):
        _run(output, f"run{number}", base, "a" * 64)
    return _agents(**{f"agent{number}": {"run": f"run{number}"} for number in range(16)})


def test_sixteen_agents_take_one_gpu_instead_of_sixteen(base: Path, tmp_path: Path) -> None:
    (one,) = sharing(_sixteen(tmp_path / "output", base), tmp_path / "output", hardware_from("h100"))
    assert (one.apart.servers, one.apart.gpus, one.together.servers, one.together.gpus) == (16, 16, 1, 1)
    assert one.apart.memory_gib == pytest.approx(16 * (one.together.memory_gib - _slots(one)), rel=0.02)
    assert one.refused == "" and one.left_out == {}
    assert one.command.startswith(f"granite-pipeline serve vllm --model {base} --adapters run0=run0,run1=run1,")
    assert one.agents["agent3"] == {"run": "run3", "backend": "vllm", "model": "run3"}
    lost = "\n".join(one.lost)
    for words in ("Q8_0 GGUF", "rank 16", "KV cache", "second copy", "base + adapter"):
        assert words in lost


def _slots(one: Sharing) -> float:
    """GiB of the adapters' slots, from what two servers differ by."""
    return one.together.memory_gib - one.apart.memory_gib / one.apart.servers


def test_a_model_over_two_gpus_counts_them(base: Path, tmp_path: Path) -> None:
    (one,) = sharing(_sixteen(tmp_path / "output", base), tmp_path / "output", hardware_from("2xv100-16"))
    assert (one.apart.gpus, one.together.gpus) == (32, 2)


def test_other_bases_and_single_runs_are_not_shared(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    _run(output, "a", base, "a" * 64)
    _run(output, "b", base, "b" * 64)
    _run(output, "damaged", base, "a" * 64).manifest.write_text("{")
    runs = {"one": "a", "same": "a", "other": "b", "untrained": "none", "damaged": "damaged"}
    agents = _agents(**{name: {"run": run} for name, run in runs.items()})
    assert sharing(agents, output, hardware_from("h100")) == []


def test_what_cannot_be_shared_is_left_out_with_its_reason(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    for name, config in (("a", {}), ("b", {}), ("dora", {"use_dora": True}), ("high", {"r": 1024}), ("quick", {})):
        _run(output, name, base, "a" * 64, **config)
    names = {name: {"run": name} for name in ("a", "b", "dora", "high")}
    agents = _agents(**names, quick={"run": "quick", "backend": "llamacpp"}, twin={"run": "quick", "model": "a"})
    (one,) = sharing(agents, output, hardware_from("h100"))
    assert sorted(one.agents) == ["a", "b"]
    assert one.together.servers == 1 and one.apart.servers == 2
    assert sorted(one.left_out) == ["dora", "high", "quick", "twin"]
    assert "beyond vLLM's 512" in one.left_out["high"]
    assert "backend llamacpp" in one.left_out["quick"]
    assert "another run is called a too" in one.left_out["twin"]


def test_a_base_that_does_not_fit_or_is_not_here_is_refused(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    agents = _sixteen(output, base)
    (one,) = sharing(agents, output, hardware_from("cpu-4c-16g"))
    assert "GiB of RAM" in one.refused
    (base / "config.json").unlink()
    (one,) = sharing(agents, output, hardware_from("h100"))
    assert "is not a folder here" in one.refused
    assert one.command == ""


def test_choose_proposes_it(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "output"
    for name in ("a", "b"):
        _run(output, name, base, "a" * 64)
    _run(output, "dora", base, "a" * 64, use_dora=True)
    file = tmp_path / "agents.yaml"
    file.write_text("agents:\n  first: {run: a}\n  second: {run: b, model: two}\n  third: {run: dora}\n")
    monkeypatch.setenv("AGENTS_FILE", str(file))
    words = ["choose", "--hardware", "h100", "--users", "8", "--output", str(output)]
    text = CliRunner().invoke(app, words, env={"COLUMNS": "300"})
    assert text.exit_code == 0, text.exception
    assert "first, second share a base" in text.stdout
    assert "1 GPU and" in text.stdout and "against 2 GPUs and" in text.stdout
    assert f"--model {base} --adapters a=a,two=b" in text.stdout
    assert "second: {run: b, backend: vllm, model: two}" in text.stdout
    assert "agent third keeps a server of its own" in text.stdout
    said = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert said["backend"] == "vllm"
    (shared,) = said["sharing"]
    assert (shared["apart"]["gpus"], shared["together"]["gpus"], shared["engine"]) == (2, 1, "vllm")
    file.unlink()
    assert json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["sharing"] == []
