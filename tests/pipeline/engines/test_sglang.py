import sys

import pytest

from pipeline.engines.sglang import Sglang
from pipeline.errors import EngineError, InputError
from pipeline.machine.named import hardware_from
from pipeline.model.model import Model
from pipeline.planning.plan import Plan, Purpose, Request


def _request(machine: str, shape: str, purpose: Purpose = "serve", **overrides: str) -> Request:
    return Request(Model.from_shape(shape), hardware_from(machine), purpose, "m", overrides)


def _plan(machine: str, shape: str, purpose: Purpose = "serve", **overrides: str) -> Plan:
    return Sglang().plan(_request(machine, shape, purpose, **overrides))


def test_l4_serves_the_8b() -> None:
    assert _plan("l4", "granite-4.1-8b").arguments == [
        "--model-path",
        "ibm-granite/granite-4.1-8b",
        "--served-model-name",
        "m",
        "--dtype",
        "bfloat16",
        "--context-length",
        "10240",
        "--max-running-requests",
        "20",
    ]


def test_two_a10g_share_the_30b() -> None:
    assert _plan("2xa10g", "granite-4.1-30b", "verify").arguments == [
        "--model-path",
        "ibm-granite/granite-4.1-30b",
        "--served-model-name",
        "m",
        "--dtype",
        "bfloat16",
        "--context-length",
        "4096",
        "--max-running-requests",
        "16",
        "--quantization",
        "fp8",
        "--tp-size",
        "2",
        "--disable-cuda-graph",
    ]


def test_a_cpu_is_refused_with_what_works() -> None:
    plan = _plan("cpu-2c-24g", "granite-4.0-350m")
    assert (plan.feasible, plan.alternatives) == (False, ("the vllm engine's CPU build, or llamacpp",))


def test_overrides_are_checked() -> None:
    plan = _plan("l4", "granite-4.1-3b", max_model_len="4096", mem_fraction_static="0.8")
    assert {s.name: s.source for s in plan.flags if s.source == "user"} == {
        "--context-length": "user",
        "--mem-fraction-static": "user",
    }
    for wrong in ({"tp_size": "2"}, {"context_length": "0"}, {"frobnicate": "1"}):
        with pytest.raises(InputError):
            _plan("l4", "granite-4.1-3b", **wrong)
    with pytest.raises(InputError, match=r"needs compute capability 8\.0"):
        _plan("t4", "granite-4.1-3b", dtype="bfloat16")


def test_launch_uses_its_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    request = _request("l4", "granite-4.1-3b")
    plan = Sglang().plan(request)
    monkeypatch.delenv("SGLANG_PYTHON", raising=False)
    assert Sglang().launch(plan, request, host="127.0.0.1", port=8004).argv[:3] == (sys.executable, "-m", "sglang.launch_server")
    monkeypatch.setenv("SGLANG_PYTHON", "/opt/sglang/bin/python")
    launch = Sglang().launch(plan, request, host="127.0.0.1", port=8004)
    assert (launch.argv[0], launch.argv[-1]) == ("/opt/sglang/bin/python", "8004")
    assert not Sglang().available().usable


def test_no_launch_without_a_gpu() -> None:
    request = _request("cpu-2c-24g", "granite-4.0-350m")
    with pytest.raises(EngineError):
        Sglang().launch(Sglang().plan(request), request, host="127.0.0.1", port=1)
