"""One model on two machines for real: ``serve --nodes`` in two network namespaces, with answers equal to those of one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny

from pipeline.engines.vllm.engine import Vllm
from pipeline.machine.hardware import Cpu, Hardware
from pipeline.model.model import Model
from pipeline.planning.plan import Request

_ROOT_ONLY = os.geteuid() != 0 or shutil.which("ip") is None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.long,
    pytest.mark.skipif(_ROOT_ONLY, reason="network namespaces need root and ip"),
    pytest.mark.skipif(not Vllm().available().usable, reason="vLLM is not installed"),
]
SETTINGS = {"dtype": "float32", "VLLM_CPU_KVCACHE_SPACE": "1", "max-model-len": "256", "enforce-eager": ""}
_ASK = """
import json, sys, httpx
body = {"model": "m", "prompt": [2, 100, 200, 300], "max_tokens": 16, "temperature": 0, "logprobs": 3}
answer = httpx.post(sys.argv[1] + "/v1/completions", json=body, timeout=120, trust_env=False)
print(json.dumps(answer.json()["choices"][0]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Head size 64: vLLM's CPU attention has no kernel for the tiny models' own."""
    return tiny.make("3.x-dense", tmp_path_factory.mktemp("nodes") / "merged_fp16", hidden_size=256)


@pytest.fixture
def machines() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces with an address each, joined by a cable."""
    tag = f"gp{os.getpid() % 10000}"
    names = [f"{tag}a", f"{tag}b"]
    places = list(zip(names, ("10.231.7.1", "10.231.7.2"), strict=True))
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for name, address in places:
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            _ip("-n", name, "link", "set", name, "up")
        yield places
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no network namespace can be made here: {done.stderr.strip()}")


def _too_small(model: Path) -> Hardware:
    """A machine with less memory than the whole model takes and more than half of it does."""
    ample = Hardware(Cpu(2, ("avx2",)), 20.0, 20.0)
    request = Request(Model.open(model), ample, served_name="m", overrides=SETTINGS)
    whole = Vllm().plan(request).memory.total
    part = Vllm().plan(replace(request, hardware=replace(ample, ram_free_gib=whole - 0.01), nodes=2)).memory.total
    assert part < whole
    return replace(ample, ram_free_gib=round((whole + part) / 2, 3))


def _pipeline(*words: str, inside: str = "") -> subprocess.CompletedProcess[str]:
    before = ["ip", "netns", "exec", inside] if inside else []
    return subprocess.run(
        [*before, sys.executable, "-m", "pipeline", *words], capture_output=True, text=True, check=False, timeout=600
    )


def _lives(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _answer(url: str, inside: str = "") -> dict[str, Any]:
    before = ["ip", "netns", "exec", inside] if inside else []
    done = subprocess.run([*before, sys.executable, "-c", _ASK, url], capture_output=True, text=True, check=True, timeout=200)
    return dict(json.loads(done.stdout))


def test_two_machines_answer_as_one_process(model: Path, machines: list[tuple[str, str]], tmp_path: Path) -> None:
    sets = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}" if value else key)]
    common = ["serve", "vllm", "--model", str(model), "--served-model-name", "m", "--detach", *sets]
    small = json.dumps(
        {key: value for key, value in _too_small(model).to_json().items() if key in ("cpu", "ram_gib", "ram_free_gib")}
    )
    over = ["--nodes", "2", "--master-addr", machines[0][1], "--hardware", small, "--output", str(tmp_path / "two")]
    stop = ["stop", "--output", str(tmp_path / "two"), "--all"]
    (second, _), (first, _) = machines[1], machines[0]
    try:
        joined = _pipeline(*common, *over, "--node-rank", "1", inside=second)
        assert joined.returncode == 0, joined.stderr
        led = _pipeline(*common, *over, "--node-rank", "0", "--port", "8003", inside=first)
        assert led.returncode == 0, led.stderr
        both = _answer("http://127.0.0.1:8003", first)
        records = sorted(path.parents[1].name for path in (tmp_path / "two").glob("*/servers/vllm.json"))
        assert records == ["merged_fp16", "merged_fp16-node1"]
        argv = [
            json.loads(path.read_text())["process"]["argv"] for path in sorted((tmp_path / "two").glob("*/servers/vllm.json"))
        ]
        pids = [json.loads(path.read_text())["process"]["pid"] for path in (tmp_path / "two").glob("*/servers/vllm.json")]
        assert "--headless" in argv[1]
    finally:
        stopped = _pipeline(*stop)
    assert stopped.returncode == 0, stopped.stderr
    assert not [pid for pid in pids if _lives(pid)]
    try:
        alone = _pipeline(*common, "--port", "0", "--output", str(tmp_path / "one"))
        assert alone.returncode == 0, alone.stderr
        record = next((tmp_path / "one").glob("*/servers/vllm.json"))
        one = _answer(json.loads(record.read_text())["process"]["url"])
    finally:
        _pipeline("stop", "--output", str(tmp_path / "one"), "--all")
    assert both["text"] == one["text"]
    assert both["logprobs"]["tokens"] == one["logprobs"]["tokens"]
    assert both["logprobs"]["token_logprobs"] == pytest.approx(one["logprobs"]["token_logprobs"], abs=2e-4)
    print("log-probabilities", both["logprobs"]["token_logprobs"], one["logprobs"]["token_logprobs"])
