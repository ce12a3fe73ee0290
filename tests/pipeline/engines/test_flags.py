import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import engines
from pipeline.engines import flags
from pipeline.engines.base import Engine
from pipeline.engines.llamacpp_server import parser as xllamacpp_parser
from pipeline.errors import EngineError, InputError
from pipeline.machine.named import hardware_from
from pipeline.model.model import Model
from pipeline.net.chat import SAMPLING
from pipeline.planning.plan import Plan, Request, Setting


@pytest.fixture
def llamacpp(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    engine = engines.get("llamacpp")
    if not engine.available().usable:
        pytest.skip("xllamacpp is not installed")
    return engine


def _plan(engine: Engine) -> Plan:
    return engine.plan(Request(Model.from_shape("granite-4.0-350m"), hardware_from("cpu-2c-24g"), sampling=SAMPLING))


def test_our_server_knows_every_flag_a_plan_may_have(llamacpp: Engine, tmp_path: Path) -> None:
    flags.require_known_flags(llamacpp, _plan(llamacpp), tmp_path)


def test_a_flag_the_installed_engine_does_not_know_stops_the_launch(llamacpp: Engine, tmp_path: Path) -> None:
    plan = _plan(llamacpp)
    strange = replace(plan, flags=(*plan.flags, Setting("--frobnicate", "1", "why")))
    with pytest.raises(EngineError) as caught:
        flags.require_known_flags(llamacpp, strange, tmp_path)
    assert "does not know --frobnicate" in caught.value.message


def test_the_answer_is_kept_by_version(llamacpp: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = flags.installed_flags(llamacpp, tmp_path)
    monkeypatch.setattr(flags, "_ask", lambda question: frozenset())
    assert flags.installed_flags(llamacpp, tmp_path) == first
    assert len(list(tmp_path.iterdir())) == 1


def test_our_own_server_is_asked_again_when_its_code_changed(
    llamacpp: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its flags are those of this product's version, not of the wheel's."""
    monkeypatch.setattr(flags, "_our_code", lambda _: "as it was")
    monkeypatch.setattr(flags, "_ask", lambda _: frozenset({"--model"}))
    assert flags.installed_flags(llamacpp, tmp_path) == {"--model"}
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    flags.require_known_flags(llamacpp, _plan(llamacpp), tmp_path)


def test_engines_without_flags_are_not_asked(tmp_path: Path) -> None:
    assert flags.installed_flags(engines.get("ollama"), tmp_path) == frozenset()


def test_our_server_s_flags_are_llama_server_s() -> None:
    ours = {o for a in xllamacpp_parser()._actions for o in a.option_strings if o.startswith("--")}
    assert ours <= {*engines.get("llamacpp").flags.flags, *engines.get("llamacpp").flags.switches, "--help"}


@pytest.mark.slow
def test_the_committed_vllm_list_is_the_installed_parser_s(tmp_path: Path) -> None:
    engine = engines.get("vllm")
    if engine.available().version != "0.32.0":
        pytest.skip("the list was read from 0.32.0")
    installed = {flag for flag in flags.installed_flags(engine, tmp_path) if flag.startswith("--")}
    assert installed == {*engine.flags.flags, *engine.flags.switches}


def test_unknown_engines_list_the_known_ones() -> None:
    with pytest.raises(InputError) as caught:
        engines.get("tgi")
    assert caught.value.remedy == "known engines: ollama, vllm, openai, llamacpp, sglang"


@pytest.mark.parametrize("name", engines.NAMES)
def test_every_engine_has_its_own_name(name: str) -> None:
    assert engines.get(name).name == name


def test_openai_compatible_urls_are_not_launched() -> None:
    engine = engines.get("openai")
    request = Request(Model.from_shape("granite-4.0-350m"), hardware_from("cpu-2c-24g"))
    plan = engine.plan(request)
    assert (engine.available().usable, plan.feasible, plan.arguments) == (True, True, [])
    with pytest.raises(EngineError):
        engine.launch(plan, request, host="127.0.0.1", port=1)
    with pytest.raises(InputError):
        engine.plan(replace(request, overrides={"max_model_len": "1"}))
