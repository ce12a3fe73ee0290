import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError
from pipeline.report.check import Check
from pipeline.report.schema import parse
from pipeline.runs.text import clean

SAMPLE = Path(__file__).parents[1] / "sample_report.json"


@pytest.fixture
def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SAMPLE.read_text(encoding="utf-8"))
    return found


CONTRACT = [
    *["schema", "run", "passed", "base_model", "eval", "backends", "checks", "base_model.id", "eval.base", "eval.tuned"],
    *[f"eval.{which}.{key}" for which in ("base", "tuned") for key in ("n", "json_valid", "severity", "technique", "exact")],
    *[
        f"backends.0.{key}"
        for key in (
            *(
                "name",
                "status",
                "reason",
                "engine_version",
                "argv",
                "ready_seconds",
                "prompts",
                "prompts.total",
                "prompts.passed",
            ),
            *("exact", "prompt_parity", "finish_stop", "ttft_ms", "ttft_ms.p50", "ttft_ms.p95", "tokens_per_second"),
        )
    ],
    *["checks.0.id", "checks.0.status", "checks.0.detail"],
]


@pytest.mark.parametrize("path", CONTRACT)
def test_each_contract_key_is_required_and_named(result: dict[str, Any], path: str) -> None:
    *parents, last = path.split(".")
    node: Any = result
    for part in parents:
        node = node[int(part)] if part.isdigit() else node[part]
    del node[last]
    with pytest.raises(InputError) as error:
        parse(result)
    assert error.value.message.endswith(f"{path.replace('.0', '[0]')} is missing")


def test_everything_else_may_be_missing(result: dict[str, Any]) -> None:
    for key in ("created_at", "training", "examples", "manifest", "hardware", "settings", "not_tested"):
        del result[key]
    for backend in result["backends"]:
        for key in ("env", "fields", "reasons", "memory_gib", "memory_measured_gib", "checks", "install"):
            del backend[key]
    assert parse(result).training.history == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("passed",), "yes", "passed: input should be a valid boolean"),
        (("schema",), 2, "schema: input should be 1"),
        (("eval", "tuned", "exact"), 1.2, "eval.tuned.exact: input should be less than or equal to 1"),
        (("backends", 0, "status"), "ok", "backends[0].status: input should be 'passed', 'failed' or 'skipped'"),
        (("checks", 2, "status"), "green", "checks[2].status: input should be 'passed', 'failed', 'skipped' or 'warning'"),
    ],
)
def test_wrong_values_are_named(result: dict[str, Any], path: tuple[Any, ...], value: Any, message: str) -> None:
    node: Any = result
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    with pytest.raises(InputError) as error:
        parse(result)
    assert error.value.message.endswith(message)


def test_a_result_may_not_say_passed_with_a_failed_check(result: dict[str, Any]) -> None:
    result["checks"][7]["status"] = "failed"
    with pytest.raises(InputError, match=r"says passed, but vllm\.chat failed"):
        parse(result)


def test_a_result_may_not_say_passed_with_a_failed_backend(result: dict[str, Any]) -> None:
    result["backends"][1]["status"] = "failed"
    with pytest.raises(InputError, match="says passed, but llamacpp failed: the backend failed without naming a check"):
        parse(result)


def test_scores_take_their_fields_from_the_data(result: dict[str, Any]) -> None:
    result["eval"]["tuned"] = {
        **{"n": 3, "json_valid": 1.0, "severity": None, "technique": None, "exact": 0.5},
        **{"colour": 0.25, "note": "x", "rows": 17, "exact_interval": [0.1, 0.9], "flag": True},
    }
    assert parse(result).evaluation.tuned.shares == {"json_valid": 1.0, "colour": 0.25, "exact": 0.5}


def test_checks_of_a_backend_appear_once_and_the_worse_wins(result: dict[str, Any]) -> None:
    result["passed"] = False
    result["backends"][0]["checks"] = [
        {"id": "vllm.chat", "status": "failed", "detail": "no answer"},
        {"id": "canary", "status": "warning", "detail": "close"},
    ]
    run = parse(result)
    checks = run.checks_of(run.backends[0])
    assert [c.id for c in checks] == ["model_listed", "chat", "streaming", "prompt_parity", "finish_stop", "scores", "canary"]
    assert checks[1] == Check(id="chat", status="failed", detail="no answer")
    assert [(c.id, c.figure) for c in run.broken] == [("vllm.chat", "no answer")]
    assert [c.id.partition(".")[0] for c in run.line_checks] == ["data", "train", "train", "export", "export", "eval"]


def test_clean_makes_a_value_that_every_format_can_carry() -> None:
    dirty = {
        "a": [math.nan, -math.inf, 1.5, True, None],
        3: ("x\ud83dy",),
        "HF_TOKEN": "abc",
        "VLLM_API_KEY": "",
        "pad_token": "<pad>",
    }
    assert clean(dirty) == {
        **{
            "a": [None, None, 1.5, True, None],
            "3": ["x\ufffdy"],
            "HF_TOKEN": "(hidden)",
            "VLLM_API_KEY": "",
            "pad_token": "<pad>",
        }
    }
