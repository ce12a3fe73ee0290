"""This machine's rank of a model that several hold: headless ones wait for the others, rank 0 is not tried again with other flags."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from serving_faults import target_of
from typer.testing import CliRunner

from pipeline import engines
from pipeline.cli import app
from pipeline.engines.base import Engine, Launch
from pipeline.errors import InputError, StartFailure
from pipeline.machine.hardware import Cpu, Hardware
from pipeline.net.loopback import towards
from pipeline.planning.plan import Node, Plan, Request
from pipeline.serve import records, start
from pipeline.serve.start import Options, Target

_CODE = "import sys, time; print(sys.argv[1], flush=True); time.sleep(float(sys.argv[2]))"


class Spread(Engine):
    """A process a node that says a word and then waits, for so long."""

    name = "spread"
    spans_nodes = True
    joined = "waiting for the others"
    says, stays = "waiting for the others", 60.0

    def plan(self, request: Request) -> Plan:
        return Plan(self.name, True, nodes=request.nodes)

    def launch(self, plan: Plan, request: Request, *, host: str, port: int) -> Launch:
        return self.rank(plan, request, Node(0, 1, host, host, "lo"), host=host, port=port)

    def rank(self, plan: Plan, request: Request, node: Node, *, host: str, port: int) -> Launch:
        argv = (sys.executable, "-c", _CODE, type(self).says, str(type(self).stays))
        return Launch(self.name, argv, {"RANK": str(node.rank)}, f"http://{node.master}:{port}", "/health", request.name, 20.0)


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    engines.register(Spread)
    yield
    engines.unregister("spread")


@pytest.fixture
def target(base: Path, tmp_path: Path) -> Target:
    return target_of(base, tmp_path / "run")


def _options(rank: int) -> Options:
    machine = Hardware(Cpu(2), 8.0, 8.0)
    node = Node(rank, 2, "127.0.0.1", "127.0.0.1", "lo")
    return Options("serve", port=8003, owner=os.getpid(), timeout=20, node=node, hardware=machine)


def test_a_headless_rank_is_up_once_it_waits_for_the_others(target: Target) -> None:
    said: list[str] = []
    process = start.join("spread", target, _options(1), said.append)
    folder = target.folder.with_name("run-node1")
    try:
        assert process.alive
        assert "node 1 of 2, towards 127.0.0.1" in said[0]
        assert process.env == {"RANK": "1"}
        # beside the run's folder, which the other machines use too
        assert [one.pid for one in records.running(folder / "servers")] == [process.pid]
        assert records.running(target.servers) == []
    finally:
        records.end(process, folder / "servers")
    assert not psutil.pid_exists(process.pid)


def test_a_headless_rank_that_ends_says_its_last_words(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spread, "says", "no such device")
    monkeypatch.setattr(Spread, "stays", 0.2)
    with pytest.raises(StartFailure, match="ended before it waited for the other machines") as caught:
        start.join("spread", target, _options(1), lambda _: None)
    assert "no such device" in caught.value.evidence
    monkeypatch.setattr(Spread, "stays", 60.0)
    with pytest.raises(StartFailure, match="did not come to wait"):
        start.join("spread", target, replace(_options(1), timeout=1), lambda _: None)
    assert records.running(target.folder.with_name("run-node1") / "servers") == []


def test_rank_0_is_not_tried_again(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that is taken is mended by another one where a server is alone; the other machines wait for the first start."""
    monkeypatch.setattr(Spread, "says", "OSError: [Errno 98] Address already in use")
    monkeypatch.setattr(Spread, "stays", 0.2)
    for node, tries in ((_options(0).node, 1), (None, 4)):
        said: list[str] = []
        with pytest.raises(StartFailure, match="ended before it was ready") as caught:
            start.serve("spread", target, replace(_options(0), port=0, node=node), said.append)
        assert caught.value.kind == "port-taken"
        assert len([line for line in said if line.startswith("starting spread")]) == tries


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--node-rank", "1"), "are for one model on several machines"),
        (("--master-addr", "10.0.0.1"), "are for one model on several machines"),
        (("--nodes", "2"), "needs the address of machine 0"),
        (("--nodes", "2", "--node-rank", "2", "--master-addr", "127.0.0.1"), "2 nodes have ranks 0 to 1"),
        (("--hardware", "2xl4"), "serve plans for this machine"),
    ],
)
def test_what_does_not_go_together_is_refused(base: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(app, ["serve", "vllm", "--model", str(base), "--output", str(tmp_path), *words])
    assert isinstance(result.exception, InputError)
    assert said in str(result.exception)


def test_an_engine_of_one_machine_is_refused(empty_gguf: Path, tmp_path: Path) -> None:
    words = ["serve", "llamacpp", "--gguf", str(empty_gguf), "--output", str(tmp_path)]
    result = CliRunner().invoke(app, [*words, "--nodes", "2", "--master-addr", "127.0.0.1"])
    assert isinstance(result.exception, InputError)
    assert "is not planned over several machines" in str(result.exception)


def test_the_way_to_another_machine_names_address_and_interface() -> None:
    assert towards("127.0.0.1") == ("127.0.0.1", "lo")
    with pytest.raises(Exception, match=r"no way from here to nowhere\.invalid"):
        towards("nowhere.invalid")
