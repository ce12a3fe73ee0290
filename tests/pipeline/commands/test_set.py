"""``--set`` means the same to ``plan`` and to ``serve``: what one shows is what the other starts."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline import engines
from pipeline.cli import app
from pipeline.engines.base import Availability, Engine
from pipeline.errors import EngineError, InputError
from pipeline.machine.hardware import Hardware
from pipeline.machine.named import NAMES, named
from pipeline.model.model import Model
from pipeline.model.shape import SHAPES
from pipeline.planning.plan import Plan, Request
from pipeline.serve import backends, start

ENGINES = ("vllm", "llamacpp", "ollama", "sglang")
# what the plan says of the model and of privacy, and no one would have chosen for them
FIXED = {"--model", "--model-path", "--served-model-name", "--alias", "--jinja", "--enable-auto-tool-choice"}
FIXED |= {"--no-enable-prefix-caching", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "HF_HUB_OFFLINE"}


@pytest.fixture
def both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_settings: None, write_gguf: Any
) -> Any:  # (engine, machine, settings) -> what plan shows, what serve starts: each a dict, or the words of its InputError
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backends, "look", lambda engine, settings: (None, Availability(False)))
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "architectures": ["GraniteForCausalLM"], "model_type": "granite", "hidden_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 3, "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 65536,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"w": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    sizes = {"block_count": 3, "embedding_length": 256, "attention.head_count": 4, "attention.head_count_kv": 2}
    sizes |= {"feed_forward_length": 128, "vocab_size": 100, "context_length": 65536}
    gguf = tmp_path / "model.gguf"
    write_gguf(gguf, {"general.architecture": "granite", **{f"granite.{name}": value for name, value in sizes.items()}})

    def shown(engine: str, words: list[str]) -> dict[str, Any] | str:
        done = CliRunner().invoke(app, ["plan", "--engine", engine, *words, "--json"])
        if isinstance(done.exception, InputError):
            return str(done.exception)
        assert done.exception is None, done.exception
        told = json.loads(done.stdout)
        return {name: told[name] for name in ("argv", "env", "parameters")}

    def started(engine: str, words: list[str]) -> dict[str, Any] | str:
        seen: dict[str, Any] = {}

        def note(engine: Engine, request: Request, target: Any, options: Any, *_: object) -> None:
            plan: Plan = engine.plan(request)
            launch = engine.launch(plan, request, host=options.host, port=options.port)
            env = plan.environment if engine.creates_model else launch.env
            seen.update(argv=list(launch.argv), env=dict(env), parameters={s.name: s.value for s in plan.parameters})
            raise EngineError("seen enough")

        monkeypatch.setattr(start, "start_planned", note)
        monkeypatch.setattr(type(engines.get(engine)), "available", lambda self: Availability(True, "1"))
        done = CliRunner().invoke(app, ["serve", engine, *words])
        if isinstance(done.exception, InputError):
            return str(done.exception)
        assert seen, done.exception
        return seen

    def asked(engine: str, machine: str, settings: list[str]) -> tuple[dict[str, Any] | str, dict[str, Any] | str]:
        hardware = named(machine)
        monkeypatch.setattr(Hardware, "detect", lambda *_: hardware)
        model = folder if engines.get(engine).serves == "folder" else gguf
        words = ["--model", str(model), *(word for text in settings for word in ("--set", text))]
        return shown(engine, words), started(engine, words)

    return asked


@pytest.mark.parametrize(
    ("engine", "machine", "settings", "expected"),
    [
        ("vllm", "l4", ["enforce_eager"], "--enforce-eager"),
        ("vllm", "l4", ["--enforce-eager=false"], "--no-enforce-eager"),
        ("vllm", "l4", ["max-model-len=32k", "max_num_batched_tokens=2K"], "--max-model-len 32768"),
        ("vllm", "l4", ["max_model_len=1.5k"], "--max-model-len 1536"),
        ("vllm", "cpu-16c-64g", ["max-num-seqs=3", "enforce-eager", "dtype=float32"], "--max-num-seqs 3"),
        ("vllm", "cpu-16c-64g", ["VLLM_CPU_KVCACHE_SPACE=3"], "VLLM_CPU_KVCACHE_SPACE=3"),
        ("vllm", "cpu-16c-64g", ["tp=1"], "--tensor-parallel-size 1"),
        ("llamacpp", "cpu-16c-64g", ["ctx_size=2k", "no-warmup"], "-c 2048"),
        ("llamacpp", "l4", ["np=2", "flash-attn=on"], "--parallel 2"),
        ("ollama", "cpu-16c-64g", ["num-ctx=1k", "num_parallel=2"], "num_ctx=1024"),
        ("sglang", "l4", ["context_length=16K", "disable-cuda-graph"], "--context-length 16384"),
    ],
)
def test_both_verbs_make_the_same_of_it(both: Any, engine: str, machine: str, settings: list[str], expected: str) -> None:
    shown, started = both(engine, machine, settings)
    assert shown == started
    pairs = [f"{name}={value}" for part in ("env", "parameters") for name, value in shown[part].items()]
    assert expected in " ".join([*shown["argv"], *pairs])


@pytest.mark.parametrize(
    ("engine", "machine", "settings"),
    [
        ("vllm", "l4", ["dtype=auto", "max-model-len=AUTO", "quantization=auto", "enforce_eager=auto", "kv-cache-dtype=auto"]),
        ("vllm", "cpu-16c-64g", ["dtype=auto", "VLLM_CPU_KVCACHE_SPACE=auto", "max-num-seqs=3", "max_num_seqs=auto"]),
        ("llamacpp", "cpu-16c-64g", ["ctx-size=auto", "parallel=auto", "flash-attn=auto"]),
        ("ollama", "l4", ["num-ctx=auto", "num-parallel=auto"]),
        ("sglang", "l4", ["context-length=auto", "dtype=auto"]),
    ],
)
def test_auto_is_as_if_it_were_left_out(both: Any, engine: str, machine: str, settings: list[str]) -> None:
    shown, started = both(engine, machine, settings)
    assert shown == started == both(engine, machine, [])[0]
    assert "argv" in shown


def test_auto_leaves_to_the_plan_what_a_variable_says(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, _ = both("vllm", "l4", [])
    monkeypatch.setenv("VLLM_MAX_MODEL_LEN", "2048")
    assert both("vllm", "l4", [])[0] != planned
    assert both("vllm", "l4", ["max_model_len=auto"]) == (planned, planned)


@pytest.mark.parametrize(
    ("engine", "setting", "message"),
    [
        ("vllm", "max_model_length=4096", "did you mean --max-model-len"),
        ("vllm", "enforced-eager", "did you mean --enforce-eager"),
        ("llamacpp", "ctx_sise=4096", "did you mean --ctx-size"),
        ("ollama", "OLLAMA_NUM_PARALEL=2", "did you mean OLLAMA_NUM_PARALLEL"),
        ("vllm", "max-model-len=1.3k", "which is 1331.2 tokens"),
        ("vllm", "max-model-len=1m", "must be a whole number"),
        ("vllm", "max-num-seqs=1k", "must be a whole number"),
        ("vllm", "max-model-len", "--max-model-len needs a value"),
        ("vllm", "seed=auto", "--seed has no automatic choice"),
        ("vllm", "enforce-eager=perhaps", "it takes true or false"),
        ("vllm", "port=1", "cannot be set with --set"),
        ("vllm", "=x", "is not KEY=VALUE"),
    ],
)
def test_both_verbs_refuse_it_with_the_same_words(both: Any, engine: str, setting: str, message: str) -> None:
    shown, started = both(engine, "l4", [setting])
    assert message in shown
    assert shown == started


@pytest.mark.parametrize("verb", ["plan", "serve"])
def test_the_help_says_how(verb: str) -> None:
    said = re.sub(r"[\s│]+", " ", CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "160"}).stdout)
    for words in ("KEY[=VALUE]", "max-model-len=32k (1k is 1024 tokens)", "(a switch alone)", "dtype=auto (the plan's choice)"):
        assert words in said


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_plan_chooses_may_be_left_to_it(engine: str) -> None:
    facts = engines.get(engine)
    known = {*facts.flags.flags, *facts.flags.switches, *facts.flags.variables}
    assert known >= {*facts.flags.tokens, *facts.flags.automatic}
    chosen = set()
    for machine in (*NAMES, "2xa10g", "cpu-2c-24g", "cpu-16c-64g-bf16"):
        hardware = named(machine)
        assert hardware is not None
        for shape in SHAPES:
            request = Request(Model.from_shape(shape), hardware, "latency")
            plan = facts.plan(request)
            # Ollama's parameters are flags by another name
            chosen |= {s.name for s in (*plan.flags, *plan.env)} | {f"--{s.name.replace('_', '-')}" for s in plan.parameters}
    assert chosen - FIXED <= set(facts.flags.automatic)
