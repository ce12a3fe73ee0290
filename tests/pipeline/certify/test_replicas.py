"""Every address behind a name, with real llama.cpp servers: the run itself, another fine-tune under its name, and nobody."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import certified
import pytest
import servers
import stub_server

from pipeline.certify import replicas
from pipeline.certify.replicas import Replica, Service, addresses, ask, require_all
from pipeline.errors import EnvironmentFailure, InputError, VerificationFailed
from pipeline.runs.folder import RunFolder
from pipeline.serve import records, start
from pipeline.serve.start import Options, Target

NAME = "fine.test"
OURS, OTHER, NOBODY = "127.0.0.2", "127.0.0.3", "127.0.0.4"
UNSHARED = os.geteuid() == 0 and shutil.which("unshare") is not None


def _known(monkeypatch: pytest.MonkeyPatch, *found: str) -> None:
    """Make the name stand for these addresses, as a headless Service does."""
    ask_system = socket.getaddrinfo

    def look_up(host: str, port: Any, *more: Any, **named: Any) -> Any:
        if host != NAME:
            return ask_system(host, port, *more, **named)
        return [entry for address in found for entry in ask_system(address, port, *more, **named)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_a_name_stands_for_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    _known(monkeypatch, "127.0.0.3", "127.0.0.2", "::1", "127.0.0.2")
    assert addresses(f"http://{NAME}:8003") == ["127.0.0.2", "127.0.0.3", "::1"]
    _known(monkeypatch, "::1", "127.0.0.1")  # one machine, of which one server answers
    assert addresses(f"http://{NAME}:8003") == ["127.0.0.1"]
    assert addresses("https://127.0.0.9") == ["127.0.0.9"]
    with pytest.raises(EnvironmentFailure, match=r"the name nowhere\.invalid is not known here"):
        addresses("http://nowhere.invalid:8003")
    for wrong in ("fine.test:8003", "http://", "http://x:port", "ftp://x"):
        with pytest.raises(InputError, match="is not a URL"):
            addresses(wrong)


def test_what_is_wrong_comes_before_who_is_silent(run: RunFolder) -> None:
    fine, other, silent = Replica("a", "passed"), Replica("b", "failed", reason="x"), Replica("c", "unanswered", reason="y")
    require_all(run, [fine])
    with pytest.raises(VerificationFailed, match=r"^b: not the fine-tune of run test") as caught:
        require_all(run, [silent, fine, other])
    assert caught.value.evidence == "b: x\nc: y"
    with pytest.raises(EnvironmentFailure, match=r"^c: no answer"):
        require_all(run, [fine, silent])


def test_a_run_without_reference_or_an_unknown_number_type_is_refused(run: RunFolder) -> None:
    service = Service("http://127.0.0.2:1", "vllm", ("m",))
    with pytest.raises(InputError, match="no reference distributions"):
        ask(run, service)
    run.probes.parent.mkdir(parents=True)
    run.probes.write_text("{}")
    with pytest.raises(InputError, match="no number type 'int3'"):
        ask(run, service, dtype="int3")


def test_the_number_type_is_the_certificate_s(run: RunFolder) -> None:
    assert (replicas.certified_dtype(run, "vllm"), replicas.certified_dtype(run, "llamacpp")) == ("unknown", "Q8_0")
    run.certificate.mkdir(parents=True)
    (run.certificate / "evidence-vllm.json").write_text('{"dtype": "float32"}')
    assert replicas.certified_dtype(run, "vllm") == "float32"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, RunFolder]:
    """Two fine-tunes of one base; the first with its reference distributions, as certify makes them."""
    from training.certify import probes

    folder = tmp_path_factory.mktemp("replicas")
    ours, other = certified.make(folder), certified.make(folder, seed=8)
    probes.probe(ours)
    return ours, other


@pytest.fixture(scope="module")
def port(made: tuple[RunFolder, RunFolder]) -> Iterator[int]:
    """Both served under the first one's name, on one port of two addresses."""
    port, ours = servers.free_port(), made[0]
    try:
        for run, host in zip(made, (OURS, OTHER), strict=True):
            options = Options("verify", host=host, port=port, owner=os.getpid())
            start.serve("llamacpp", Target.of_run(run, "llamacpp", ours.name), options, lambda _: None)
        yield port
    finally:
        for run in made:
            records.stop(run.servers, "llamacpp")


@pytest.mark.slow
def test_the_address_that_serves_another_fine_tune_is_named(
    made: tuple[RunFolder, RunFolder], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, service = made[0], Service(f"http://{NAME}:{port}", "llamacpp", (made[0].name,))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # each address is asked itself
    _known(monkeypatch, OURS, OTHER, NOBODY)
    found = {one.address: one for one in ask(ours, service, prompts=8)}
    assert {address: one.state for address, one in found.items()} == {OURS: "passed", OTHER: "failed", NOBODY: "unanswered"}
    status = {check.id: check.status for check in found[OURS].checks}
    assert (
        status["served.llamacpp_prompts"] == status["served.llamacpp_answers"] == status["served.llamacpp_logprobs"] == "passed"
    )
    assert status["tuned.llamacpp"] == "passed"
    assert any(check.id == "served.llamacpp_answers" and check.status == "failed" for check in found[OTHER].checks)
    written = json.loads(ours.replicas.read_text())
    assert (written["passed"], written["dtype"], written["run"]) == (False, "Q8_0", ours.name)
    assert [one["state"] for one in written["replicas"]] == ["passed", "failed", "unanswered"]
    with pytest.raises(VerificationFailed, match=f"^{OTHER}: not the fine-tune"):
        require_all(ours, list(found.values()))
    # the other one, asked as itself, is itself
    _known(monkeypatch, OURS)
    require_all(ours, ask(ours, service, prompts=8))
    assert json.loads(ours.replicas.read_text())["passed"] is True


@pytest.mark.slow
@pytest.mark.skipif(not UNSHARED, reason="a name of its own needs root and unshare")
@pytest.mark.parametrize(
    ("hosts", "code", "words"),
    [((OURS,), 0, ""), ((OURS, OTHER), 1, f"{OTHER}: not the fine-tune of run"), ((OURS, NOBODY), 3, f"{NOBODY}: no answer")],
)
def test_the_verb_with_a_name_of_the_system(
    made: tuple[RunFolder, RunFolder], port: int, tmp_path: Path, hosts: tuple[str, ...], code: int, words: str
) -> None:
    lines = tmp_path / "hosts"
    lines.write_text("".join(f"{address} {NAME}\n" for address in hosts))
    verb = [sys.executable, "-m", "pipeline", "verify", "--run", made[0].name, "--output", str(made[0].output)]
    verb += ["--backends", "llamacpp", "--replicas", f"http://{NAME}:{port}/v1", "--limit", "4", "--json"]
    shell = 'mount --bind "$0" /etc/hosts && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", shell, str(lines), *verb], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert [one["address"] for one in json.loads(done.stdout)["replicas"]] == sorted(hosts)


@pytest.mark.slow
def test_one_that_still_loads_is_silent_and_one_without_the_name_is_another(
    made: tuple[RunFolder, RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = {"data": [{"id": "a"}, {"id": "b"}]}
    for answer, state in (((503, {}, {"error": "loading"}), "unanswered"), (listed, "failed"), (b"<html>", "unanswered")):
        with stub_server.serving({"/v1/models": answer}) as stub:
            found = ask(made[0], Service(stub.url, "llamacpp", (made[0].name,)), prompts=2)
            assert [one.state for one in found] == [state]
