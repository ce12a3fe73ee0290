"""With a proxy in the environment, our own servers are still asked directly - in processes of their own, past a real proxy that refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from stub_server import Stub, serving

from pipeline.net.loopback import spare_loopback
from pipeline.operate import proxy as gateway_server
from pipeline.operate import status
from pipeline.serve import records
from pipeline.serve.records import Record
from pipeline.serve.server import Server

ROOT = Path(__file__).parents[3]
HERE = "127.0.0.1,localhost,::1,0.0.0.0"


class _Refusing(dict[str, object]):
    """Answers every request, as a proxy does that may not reach the host."""

    def get(self, *_: object) -> object:
        return 502, {}, {"error": "refused by the proxy"}


@pytest.fixture
def proxy() -> Iterator[Stub]:
    with serving(_Refusing()) as stub:
        yield stub


def _run(proxy: Stub, folder: Path, *words: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment = {**kept, "PYTHONPATH": str(ROOT), "HTTP_PROXY": proxy.url, "http_proxy": proxy.url}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=60, check=False, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_line_asks_a_runs_server_directly(proxy: Stub, tmp_path: Path) -> None:
    me = psutil.Process()
    with serving({"/health": {}}) as engine:
        process = Server(
            "vllm", engine.url, "m", (), {}, me.pid, me.create_time(), tmp_path / "log", "2026-01-01T00:00:00", "/health"
        )
        records.save(tmp_path / "test" / "servers", Record(process.engine, process))
        words = ("status", "--run", "test", "--output", str(tmp_path), "--json")
        [row] = json.loads(_run(proxy, tmp_path, "-m", "pipeline", *words))["servers"]
    assert row["healthy"] is True
    assert proxy.seen == []


def test_any_client_of_a_notebook_asks_directly_and_without_its_first_cell_only_ours_does(proxy: Stub, tmp_path: Path) -> None:
    theirs = "import httpx; from pipeline import notebook; {begin}; print(httpx.get('{url}/health').status_code)"
    ours = "from pipeline.serve import start; print(start.reachable('{url}/health'))"
    with serving({"/health": {}}) as engine:
        begun = _run(proxy, tmp_path, "-c", theirs.format(begin="notebook.begin('x', 'out')", url=engine.url))
        assert (begun.split(), len(proxy.seen), len(engine.seen)) == (["200"], 0, 1)
        _run(proxy, tmp_path, "-c", theirs.format(begin="pass", url=engine.url))
        assert (len(proxy.seen), len(engine.seen)) == (1, 1)
        assert _run(proxy, tmp_path, "-c", ours.format(url=engine.url)).split() == ["True"]
        assert (len(proxy.seen), len(engine.seen)) == (1, 2)


@pytest.mark.parametrize("module", [gateway_server, status])
def test_the_servers_spare_this_machine_however_they_are_started(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(SystemExit):
        module.main(["--help"])  # type: ignore[attr-defined]
    assert (os.environ["NO_PROXY"], os.environ["no_proxy"]) == (HERE, HERE)


@pytest.mark.parametrize(
    ("upper", "lower", "expected"),
    [
        ("corp.example", "", (f"corp.example,{HERE}", f"corp.example,{HERE}")),
        ("", "corp.example, localhost", ("corp.example,localhost,127.0.0.1,::1,0.0.0.0",) * 2),
        ("a.example", "b.example", (f"a.example,{HERE}", f"b.example,{HERE}")),
        ("*", "", ("*", "*")),
        ("a.example, *", "", ("*", "*")),
        ("*.corp.example [fd00::1]", "", (f".corp.example,fd00::1,{HERE}",) * 2),
        ("fe80::/10,10.0.0.0/8", "", (f"fe80::/10,10.0.0.0/8,{HERE}", f"10.0.0.0/8,{HERE}")),
    ],
)
def test_what_is_excepted_already_is_kept(
    upper: str, lower: str, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", upper)
    monkeypatch.setenv("no_proxy", lower)
    spare_loopback()
    spare_loopback()
    assert (os.environ["NO_PROXY"], os.environ["no_proxy"]) == expected
