from pipeline.planning.plan import Memory, Plan, Setting

_PLAN = Plan(
    engine="vllm",
    feasible=True,
    flags=(Setting("--a", "1", "because"), Setting("--b", None, "so", "user")),
    env=(Setting("X", "2", "env"),),
    dtype="bfloat16",
    quantization=None,
    tensor_parallel=1,
    max_model_len=8192,
    max_num_seqs=4,
    memory=Memory(1.0, 2.0, 0.5, 0.25, 0.125, 8.0),
    parameters=(Setting("num_ctx", "8192", "context"),),
    alternatives=("x",),
    warnings=("w",),
)


def test_arguments_and_environment() -> None:
    assert _PLAN.arguments == ["--a", "1", "--b"]
    assert _PLAN.environment == {"X": "2"}


def test_total_is_the_sum_of_the_parts_without_what_is_available() -> None:
    assert _PLAN.memory.total == 3.875


def test_json_contract() -> None:
    assert _PLAN.to_json(["python", "--a", "1", "--b"]) == {
        "engine": "vllm",
        "feasible": True,
        "argv": ["python", "--a", "1", "--b"],
        "env": {"X": "2"},
        "dtype": "bfloat16",
        "quantization": None,
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
        "nodes": 1,
        "max_model_len": 8192,
        "max_num_seqs": 4,
        "memory_gib": {
            "weights": 1.0, "kv_cache": 2.0, "activation": 0.5, "graphs": 0.25, "overhead": 0.125, "available": 8.0, "total": 3.875,
        },
        "parameters": {"num_ctx": "8192"},
        "reasons": [
            {"flag": "--a", "value": "1", "reason": "because", "source": "planned"},
            {"flag": "--b", "value": None, "reason": "so", "source": "user"},
            {"flag": "X", "value": "2", "reason": "env", "source": "planned"},
            {"flag": "num_ctx", "value": "8192", "reason": "context", "source": "planned"},
        ],
        "alternatives": ["x"],
        "warnings": ["w"],
    }  # fmt: skip


def test_json_without_a_launch_has_the_engine_s_flags() -> None:
    assert _PLAN.to_json()["argv"] == ["--a", "1", "--b"]
