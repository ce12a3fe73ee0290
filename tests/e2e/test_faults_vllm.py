"""Faults caused on purpose in a real vLLM: a start takes most of a minute, so one start tells as much as it can."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import psutil
import pytest
import tiny
from serving_faults import nothing_left, request_of, starts, target_of, until

from pipeline.engines.vllm.engine import Vllm
from pipeline.errors import EngineError, StartFailure
from pipeline.planning.plan import Plan, Request, Setting
from pipeline.serve import records, server, start
from pipeline.serve.start import Options, Target

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Vllm().available().usable, reason="vLLM is not installed")]
KV = "VLLM_CPU_KVCACHE_SPACE"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("vllm") / "merged_fp16"
    # vLLM's CPU attention starts at head_dim 32
    with mock.patch.dict(tiny.VARIANTS, {"head-32": ("Granite", {"intermediate_size": 128, "hidden_size": 128})}):
        yield tiny.make("head-32", folder)
    shutil.rmtree(folder)


@pytest.fixture
def target(model: Path, tmp_path: Path) -> Iterator[Target]:
    copy = tmp_path / "run" / "merged_fp16"
    shutil.copytree(model, copy)
    yield target_of(copy, tmp_path / "run")
    start.stop(tmp_path / "run", "vllm")


class Misjudging(Vllm):
    """A planner that is wrong about the model's context and about this machine's RAM until it is told better."""

    def plan(self, request: Request) -> Plan:
        wrong = {"--max-model-len": "100000", KV: "4000"}
        plan = super().plan(request)

        def spoilt(settings: tuple[Setting, ...]) -> tuple[Setting, ...]:
            return tuple(replace(s, value=wrong.get(s.name, s.value)) if s.name not in request.overrides else s for s in settings)

        return replace(plan, flags=spoilt(plan.flags), env=spoilt(plan.env))


def _start(engine: Vllm, target: Target, said: list[str]) -> start.Endpoint:
    return start.start_planned(engine, request_of(target), target, Options(owner=os.getpid()), said.append)


@pytest.mark.wide
def test_wrong_context_and_cache_are_mended_and_a_killed_engine_is_noticed(target: Target) -> None:
    said: list[str] = []
    endpoint = _start(Misjudging(), target, said)
    attempts = starts(target)[-1]["attempts"]
    assert [attempt.get("kind") for attempt in attempts] == ["context-exceeds-model", "cpu-kv-too-large", None]
    assert attempts[0]["retry"]["settings"] == {"--max-model-len": "512"}
    assert attempts[1]["retry"]["settings"] == {KV: "1"}
    assert {row["flag"] for row in (endpoint.plan or {})["reasons"] if row["source"] == "retry"} == {"--max-model-len", KV}
    assert any(line.startswith("vllm: starting") for line in said)
    assert any("retry 2 of 3" in line for line in said)
    process = endpoint.server
    assert process is not None
    family = psutil.Process(process.pid).children(recursive=True)
    core = next(p for p in family if "EngineCore" in "".join(p.cmdline()) or "EngineCore" in p.name())
    core.kill()
    until(lambda: not process.alive, 40)
    assert server.failure(process, "died while serving").kind in ("engine-process-died", "engine-process-failed")
    server.stop(process)
    assert records.running(target.servers) == []
    nothing_left(target.folder, [_port(endpoint.url)], [process.pid])


def test_a_cache_larger_than_the_ram_that_the_user_asked_for_is_refused_before_a_start(target: Target) -> None:
    request = request_of(target, **{KV: "4000"})
    with pytest.raises(EngineError, match="vllm cannot serve this model on this machine") as caught:
        start.start_planned(Vllm(), request, target, Options(owner=os.getpid()), lambda _: None)
    assert "KV cache 4000.0" in caught.value.evidence
    assert "without your --set it fits" in caught.value.remedy
    nothing_left(target.folder, [])


def _no_tokenizer(folder: Path) -> None:
    for path in [*folder.glob("tokenizer*"), *folder.glob("vocab*"), *folder.glob("merges*"), *folder.glob("special_tokens*")]:
        path.unlink()


def _unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchForCausalLM"], "model_type": "nosuch"}))


def _corrupt_shard(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (_no_tokenizer, "no-tokenizer"),
        pytest.param(_unknown_architecture, "unknown-architecture", marks=pytest.mark.wide),
        pytest.param(_corrupt_shard, "corrupt-weights", marks=pytest.mark.long),
    ],
)
def test_a_damaged_folder_is_refused_at_once(spoil: object, kind: str, target: Target) -> None:
    plan = Vllm().plan(request_of(target))
    request = request_of(target)
    spoil(target.model)  # type: ignore[operator]
    with pytest.raises(StartFailure) as caught:
        start.start_planned(Vllm(), request, target, Options(owner=os.getpid()), lambda _: None, plan)
    assert caught.value.kind == kind, str(caught.value)
    assert caught.value.remedy
    assert "last lines:" in caught.value.evidence
    assert len(starts(target)[-1]["attempts"]) == 1
    nothing_left(target.folder, [])


@pytest.mark.long
def test_an_engine_process_killed_while_loading_is_refused(target: Target) -> None:
    def kill() -> None:
        def core() -> list[psutil.Process]:
            mine = [p for p in psutil.process_iter(["cmdline"]) if str(target.model) in " ".join(p.info["cmdline"] or [])]
            return [
                c
                for p in mine
                for c in p.children(recursive=True)
                if "spawn_main" in " ".join(c.cmdline()) or "EngineCore" in c.name()
            ]

        until(core, 60)[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(StartFailure, match="ended before it was ready") as caught:
        _start(Vllm(), target, [])
    killer.join()
    assert caught.value.kind in ("engine-process-failed", "engine-process-died", "killed")
    nothing_left(target.folder, [])


def _port(url: str) -> int:
    return int(url.rsplit(":", 1)[1])
