import json
import struct
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.errors import InputError
from pipeline.runs.folder import RunFolder


def _run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


def _json(*words: str) -> dict[str, object]:
    result = _run(*words, "--json")
    assert result.exit_code == 0, result.exception
    return dict(json.loads(result.stdout))


def test_plan_json_is_the_documented_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    plan = _json("plan", "--engine", "vllm", "--model-shape", "granite-4.1-8b", "--hardware", "l4", "--set", "max_model_len=4096")
    assert set(plan) == {
        *("engine", "feasible", "argv", "env", "dtype", "quantization", "tensor_parallel", "pipeline_parallel", "nodes"),
        *("max_model_len", "max_num_seqs"),
        *("memory_gib", "parameters", "reasons", "alternatives", "warnings", "model", "machine", "purpose"),
    }
    assert plan["argv"][:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]  # type: ignore[index]
    assert plan["argv"][-4:] == ["--host", "127.0.0.1", "--port", "8003"]  # type: ignore[index]
    assert {"flag": "--max-model-len", "value": "4096", "reason": "set by the user", "source": "user"} in plan["reasons"]  # type: ignore[operator]
    assert plan["max_model_len"] == 4096


def test_a_refusal_is_a_plan_too() -> None:
    plan = _json("plan", "--engine", "vllm", "--model-shape", "granite-4.1-30b", "--hardware", "rtx4060")
    assert (plan["feasible"], plan["argv"]) == (False, [])
    assert plan["alternatives"]
    assert plan["warnings"]


def test_the_table_shows_reasons_memory_and_the_command() -> None:
    result = _run(
        "plan", "--engine", "llamacpp", "--model-shape", "granite-4.0-350m", "--hardware", "cpu-2c-24g", "--set", "parallel=2"
    )
    assert result.exit_code == 0, result.exception
    for words in ("granite-4.0-350m on cpu-2c-24g", "--parallel", "set by the user", "predicted memory", "GOMP_SPINCOUNT=1000"):
        assert words in result.stdout
    assert "-c 16384 --parallel 2" in result.stdout


def test_the_table_of_a_refusal_shows_what_fits() -> None:
    result = _run("plan", "--engine", "vllm", "--model-shape", "granite-4.1-8b", "--hardware", "cpu-2c-24g")
    assert "does not fit" in result.stdout
    assert "of RAM (weights 31.2 as float32" in result.stdout
    assert "alternative: the Q8_0 GGUF" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "tgi", "--model-shape", "granite-4.1-8b"], "no engine 'tgi'"),
        (["--engine", "vllm", "--model-shape", "granite-5"], "no model shape 'granite-5'"),
        (["--engine", "vllm", "--model-shape", "granite-4.1-8b", "--model", "x"], "only one of"),
        (["--engine", "vllm", "--model-shape", "granite-4.1-8b", "--hardware", "pdp11"], "no machine 'pdp11'"),
        (["--engine", "vllm", "--model-shape", "granite-4.1-8b", "--purpose", "fun"], "no purpose 'fun'"),
        (["--engine", "vllm", "--model-shape", "granite-4.1-8b", "--set", "=x"], "is not KEY=VALUE"),
        (["--engine", "vllm", "--run", "absent"], "run absent has no merged_fp16"),
        (["--engine", "llamacpp", "--run", "absent"], "run absent has no unsloth.Q8_0.gguf"),
        (["--engine", "vllm", "--model", "/nowhere/at/all"], "no such model"),
    ],
)
def test_bad_input(words: list[str], message: str, tmp_path: Path) -> None:
    result = _run("plan", *words, "--output", str(tmp_path))
    assert isinstance(result.exception, InputError)
    assert message in result.exception.message


def test_hardware_json_can_be_given_back() -> None:
    machine = _json("hardware", "--hardware", "2xa10g")
    assert _json("hardware", "--hardware", json.dumps(machine)) == machine


def test_hardware_shows_this_machine_and_others() -> None:
    assert "RAM" in _run("hardware").stdout
    shown = _run("hardware", "--hardware", "l4").stdout
    assert "NVIDIA L4, 21.8 of 22.1 GiB free, compute capability 8.9" in shown


def test_a_runs_plan_is_what_serve_would_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_MAX_MODEL_LEN", "4096")
    monkeypatch.setenv("VLLM_MODEL", "mine")
    monkeypatch.setenv("VLLM_PYTHON", sys.executable)
    folder = RunFolder("test", tmp_path).merged
    folder.mkdir(parents=True)
    config = {
        "architectures": ["GraniteForCausalLM"], "model_type": "granite", "hidden_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 3, "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 32768,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"w": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    words = ("plan", "--engine", "vllm", "--run", "test", "--output", str(tmp_path))
    plan = _json(*words)
    argv = list(plan["argv"])  # type: ignore[call-overload]
    assert plan["max_model_len"] == 4096
    assert argv[argv.index("--served-model-name") + 1] == "mine"
    assert _json(*words, "--set", "max_model_len=2048")["max_model_len"] == 2048
    assert _json(*words, "--hardware", "cpu-2c-24g")["max_model_len"] != 4096


def test_a_cpu_plan_refuses_more_than_one_gpu_in_parallel() -> None:
    words = ("plan", "--engine", "vllm", "--model-shape", "granite-4.0-350m", "--hardware", "cpu-2c-24g", "--set")
    result = _run(*words, "tensor-parallel-size=2")
    assert isinstance(result.exception, InputError)
    assert "--tensor-parallel-size is '2'; it must be a whole number from 1 to 1: it counts GPUs" in result.exception.message
    assert _json(*words, "tensor-parallel-size=1")["tensor_parallel"] == 1


def test_a_setting_without_a_value_is_a_switch_as_in_serve() -> None:
    words = ("plan", "--engine", "vllm", "--model-shape", "granite-4.1-8b", "--hardware", "h100", "--set")
    assert _json(*words, "enforce-eager") == _json(*words, "enforce-eager=true")
    assert "--enforce-eager" in _json(*words, "enforce-eager")["argv"]  # type: ignore[operator]


def test_a_plan_over_two_nodes_has_the_command_of_each_rank() -> None:
    words = ("plan", "vllm", "--model-shape", "granite-4.0-h-small", "--hardware", "2xl4", "--nodes", "2")
    plan = _json(*words, "--master-addr", "10.0.0.1")
    first, second = plan["ranks"]  # type: ignore[misc]
    assert plan["argv"] == first["argv"]
    assert (plan["nodes"], plan["tensor_parallel"], plan["pipeline_parallel"]) == (2, 2, 2)
    assert first["argv"][-8:] == ["--node-rank", "0", "--master-addr", "10.0.0.1", "--host", "127.0.0.1", "--port", "8003"]
    assert second["argv"][1:4] == ["-m", "vllm.entrypoints.cli.main", "serve"]
    assert second["argv"][-5:] == ["--node-rank", "1", "--master-addr", "10.0.0.1", "--headless"]
    planned = first["argv"][3:-8]
    assert planned == second["argv"][4:-5]
    assert planned[-6:] == ["--pipeline-parallel-size", "2", "--distributed-executor-backend", "mp", "--nnodes", "2"]
    own = {name: value for name, value in second["env"].items() if name not in plan["env"]}  # type: ignore[operator]
    there = "INTERFACE_OF_NODE_1"
    assert own == {"VLLM_HOST_IP": "ADDRESS_OF_NODE_1", "GLOO_SOCKET_IFNAME": there, "NCCL_SOCKET_IFNAME": there}
    text = _run(*words).stdout
    assert "2 nodes of 2xl4" in text
    assert "node 1: " in text


def test_an_engine_that_stays_on_one_machine_says_so() -> None:
    result = _run("plan", "llamacpp", "--model-shape", "granite-4.1-8b", "--hardware", "2xl4", "--nodes", "2")
    assert isinstance(result.exception, InputError)
    assert "llama.cpp is not planned over several machines" in str(result.exception)


def test_the_engine_is_named_once() -> None:
    words = ("--model-shape", "granite-4.1-8b", "--hardware", "l4")
    for given, said in (((), "no engine is named"), (("vllm", "--engine", "sglang"), "--engine says sglang")):
        result = _run("plan", *given, *words)
        assert isinstance(result.exception, InputError)
        assert said in str(result.exception)
