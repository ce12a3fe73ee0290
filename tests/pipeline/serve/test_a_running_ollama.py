"""An Ollama that runs already is used and nobody's model in it is replaced; one started here has a store of its own.

The Ollama is a small program that follows the documented API (``stub_ollama``), as a service or on PATH.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import servers
import stub_ollama
from small_run import make_run
from stub_server import serving
from typer.testing import CliRunner

from pipeline import config, engines
from pipeline.cli import app
from pipeline.engines import ollama as engine
from pipeline.errors import EngineError, InputError, MissingDependency
from pipeline.net.loopback import claim, listening
from pipeline.operate.registry import check_ollama_models
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.serve import artefacts, backends, records, start
from pipeline.serve.start import Options, Target
from pipeline.verify.sources import run_servers

SHAPE = {
    "general.architecture": "granite", "granite.block_count": 2, "granite.attention.head_count": 4, "granite.vocab_size": 64,
    "granite.embedding_length": 64, "granite.feed_forward_length": 128, "granite.context_length": 512,
}  # fmt: skip


@pytest.fixture
def mine(tmp_path: Path, write_gguf: Callable[[Path, dict[str, Any]], None]) -> RunFolder:
    made = make_run(RunFolder("mine", tmp_path / "runs"))
    write_gguf(made.gguf, SHAPE)
    made.modelfile.write_text(f'FROM ./{made.gguf.name}\nTEMPLATE """{{{{ .Prompt }}}}"""\n')
    manifest = Manifest(made.manifest)
    manifest.record("gguf", {"merged": manifest.artefact_sha256("merge", "merged_fp16")}, [made.gguf], {}, 1)
    return made


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Ollama on PATH, none configured, and no .env of somebody's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for name in ("OLLAMA_BASE_URL", "OLLAMA_HOST", "OLLAMA_MODELS", "OLLAMA_REMOTE_OK", "OLLAMA_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of one that runs, which the settings name as Ollama's own variable does."""
    with servers.stub_ollama(tmp_path) as server:
        url = server.url(20, "/api/version")
        monkeypatch.setenv("OLLAMA_HOST", url.removeprefix("http://"))
        yield url


def models(url: str) -> list[tuple[str, str]]:
    return [(m["name"], m["digest"]) for m in httpx.get(f"{url}/api/tags").json()["models"]]


def make(url: str, name: str) -> None:
    """Somebody's own model."""
    content = b"GGUF of somebody"
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    httpx.post(f"{url}/api/blobs/{digest}", content=content).raise_for_status()
    httpx.post(f"{url}/api/create", json={"model": name, "files": {"x.gguf": digest}, "stream": False}).raise_for_status()


def begin(run: RunFolder, **options: Any) -> backends.Started:
    return backends.start(run, "ollama", config.load(), Options(purpose="verify", owner=os.getpid(), **options))


def served(*words: str) -> Any:
    return CliRunner().invoke(app, ["serve", "ollama", *words])


def test_serve_makes_the_model_there_and_leaves_the_server_running(mine: RunFolder, service: str) -> None:
    words = ["--run", "mine", "--output", str(mine.output), "--served-model-name", "soc"]
    done = served(*words)
    assert done.exception is None, done.exception
    assert f"made in the Ollama that already runs at {service}; it goes on running" in done.output
    assert [name for name, _ in models(service)] == ["soc:latest"]
    seen = asyncio.run(check_ollama_models(service, "soc", output=mine.output))
    assert seen[0].artefact is not None
    assert seen[0].artefact == artefacts.of_file(mine.gguf)
    variable = served(*words, "--set", "num-parallel=2")
    assert "OLLAMA_NUM_PARALLEL is a setting of the server, and this Ollama already runs" in str(variable.exception)
    assert served(*words).exception is None  # one that was made from here is made again
    make(service, "soc")  # made again by someone else under the same name
    assert asyncio.run(check_ollama_models(service, "soc", output=mine.output))[0].artefact is None


def test_nobody_s_model_is_replaced_unless_asked(mine: RunFolder, service: str) -> None:
    make(service, "soc")
    before, words = models(service), ["--run", "mine", "--output", str(mine.output), "--served-model-name", "soc"]
    refused = served(*words)
    assert isinstance(refused.exception, InputError)
    assert f"Ollama at {service} already has a model soc, which was not made from a run in {mine.output}" in str(
        refused.exception
    )
    assert "--replace" in refused.exception.remedy and models(service) == before
    assert served(*words, "--replace").exception is None
    assert models(service) != before


def test_a_slow_list_or_another_spelling_does_not_make_a_name_free(
    mine: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow").mkdir()
    with servers.stub_ollama(tmp_path / "slow", STUB_SLOW="2.5") as server:
        monkeypatch.setenv("OLLAMA_HOST", url := server.url(20, "/api/version"))
        make(url, "soc")
        before, words = models(url), ["--run", "mine", "--output", str(mine.output), "--served-model-name"]
        for name in ("soc", "SOC", "library/soc", "registry.ollama.ai/library/Soc:latest"):
            assert "already has a model" in str(served(*words, name).exception)
        assert models(url) == before


def test_what_did_not_answer_its_first_token_is_deleted_or_known(
    mine: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "refuses").mkdir()
    with servers.stub_ollama(tmp_path / "refuses", STUB_REFUSES="1") as server:
        monkeypatch.setenv("OLLAMA_HOST", url := server.url(20, "/api/version"))
        found = begin(mine)
        assert found.status == "failed" and "more system memory" in found.reason
        assert models(url) == [] and not start.private_models(mine.path)
        words = ["--run", "mine", "--output", str(mine.output), "--served-model-name", "soc"]
        for _ in range(2):  # the second finds the model of the first, and knows that it is ours
            assert "refuses a chat" in str(served(*words).exception)


def test_parity_deletes_what_it_made(mine: RunFolder, service: str) -> None:
    with run_servers(mine, ["ollama"], config.load(), start=True) as (found, _):
        assert found["ollama"].model.startswith("gp-verify-") and len(models(service)) == 1
    assert models(service) == []


def test_another_modelfile_or_another_server_is_another_model(
    mine: RunFolder, service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--run", "mine", "--output", str(mine.output), "--served-model-name", "soc"]
    assert served(*words).exception is None
    assert backends.find(mine, "ollama", config.load())
    text = mine.modelfile.read_text()
    mine.modelfile.write_text(text + "SYSTEM Be brief.\n")
    assert backends.find(mine, "ollama", config.load()) is None
    mine.modelfile.write_text(text)
    (tmp_path / "second").mkdir()
    with servers.stub_ollama(tmp_path / "second") as second:
        monkeypatch.setenv("OLLAMA_HOST", second.url(20, "/api/version"))
        assert backends.find(mine, "ollama", config.load()) is None


def test_a_store_that_the_user_names_keeps_the_user_s_models(
    mine: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with servers.stub_ollama(tmp_path) as server:  # its store is tmp_path / "service"
        make(server.url(20, "/api/version"), "mine")
    monkeypatch.setenv("PATH", f"{stub_ollama.put_on_path(tmp_path / 'bin')}:/usr/bin:/bin")
    options = Options(owner=os.getpid(), overrides={"OLLAMA_MODELS": str(tmp_path / "service")})
    manifest = tmp_path / "service" / "manifests" / "mine:latest"
    before, target = manifest.read_text(), Target.of_run(mine, "ollama")
    with pytest.raises(InputError, match="already has a model mine"):
        start.serve("ollama", target, options, lambda _: None)
    assert manifest.read_text() == before
    for once in (replace(options, replace=True), options):  # then it is known to be ours
        start.serve("ollama", target, once, lambda _: None)
        assert start.stop(mine.path, "ollama") and manifest.read_text() != before


def test_serve_says_what_is_wrong_with_the_server_that_is_meant(
    mine: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--run", "mine", "--output", str(mine.output)]
    with servers.stub_ollama(tmp_path, STUB_VERSION="0.11.4") as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url(20, "/api/version"))
        assert "is version 0.11.4, and 0.12.11 or later is needed" in str(served(*words).exception)
    assert "nothing listens at" in str(served(*words).exception)


def test_a_client_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ollama", None)
    engine._package.cache_clear()
    with pytest.raises(MissingDependency, match="client for Python is not installed"):
        engine._package()
    engine._package.cache_clear()


def test_what_is_only_asked_gets_a_private_name_and_is_deleted(mine: RunFolder, service: str) -> None:
    make(service, "mine")
    make(service, "granite-soc")
    before = models(service)
    with backends.borrowed(mine, "ollama", config.load(), keep=False) as started:
        assert (started.status, started.was_up) == ("ready", False), started.reason
        assert started.endpoint and started.endpoint.model.startswith("gp-verify-")
        assert len(models(service)) == 3
        # a second question of the same run, as certify after verify, finds it there
        with backends.borrowed(mine, "ollama", config.load(), keep=True) as again:
            assert again.was_up and again.endpoint and again.endpoint.model == started.endpoint.model
        assert len(models(service)) == 3
    assert models(service) == before
    assert not start.private_models(mine.path)


def test_one_left_by_a_killed_process_is_deleted_by_stop(mine: RunFolder, service: str) -> None:
    before = models(service)
    for words in (["--run", "mine"], ["--all"]):
        assert begin(mine).status == "ready"
        assert models(service) != before
        done = CliRunner().invoke(app, ["stop", *words, "--output", str(mine.output)])
        assert done.exception is None and "stopped: ollama of mine" in done.output
        assert models(service) == before


def test_another_gguf_is_made_anew(mine: RunFolder, service: str) -> None:
    first = begin(mine).endpoint
    mine.gguf.write_bytes(mine.gguf.read_bytes() + b"\0")
    second = begin(mine).endpoint
    assert first and second and first.model != second.model
    assert start.stop(mine.path, "ollama")
    assert models(service) == []


def test_a_served_model_of_the_run_is_the_one_that_is_verified(mine: RunFolder, service: str) -> None:
    assert served("--run", "mine", "--output", str(mine.output), "--served-model-name", "soc").exception is None
    before = models(service)
    with backends.borrowed(mine, "ollama", config.load(), keep=False) as started:
        assert started.was_up and started.endpoint and started.endpoint.model == "soc"
    assert models(service) == before


def test_one_started_here_has_a_store_of_its_own_which_goes_with_it(
    mine: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "theirs"
    monkeypatch.setenv("PATH", f"{stub_ollama.put_on_path(tmp_path / 'bin')}:/usr/bin:/bin")
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{claim('127.0.0.1', 0)}")
    monkeypatch.setenv("OLLAMA_MODELS", str(theirs))
    with backends.borrowed(mine, "ollama", config.load(), keep=False) as started:
        assert started.endpoint and started.endpoint.server, started.reason
        store = Path(started.endpoint.server.env["OLLAMA_MODELS"])
        assert store.is_relative_to(mine.path.resolve()) and list((store / "blobs").iterdir())
    assert not store.exists() and not theirs.exists()


def test_a_store_that_the_user_names_is_used(mine: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{stub_ollama.put_on_path(tmp_path / 'bin')}:/usr/bin:/bin")
    named = tmp_path / "named"
    options = Options(owner=os.getpid(), overrides={"OLLAMA_MODELS": str(named)})
    endpoint = start.serve("ollama", Target.of_run(mine, "ollama"), options, lambda _: None)
    assert endpoint.server and start.stop(mine.path, "ollama")
    assert list((named / "blobs").iterdir())


@pytest.mark.parametrize("dies", ["create", "chat"])
def test_one_that_dies_is_named_with_its_log(dies: str, mine: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{stub_ollama.put_on_path(tmp_path / 'bin')}:/usr/bin:/bin")
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{claim('127.0.0.1', 0)}")
    monkeypatch.setenv("STUB_DIES", dies)
    found = begin(mine)
    assert found.status == "failed"
    assert found.reason.startswith("ollama died while")
    assert "log: " in found.reason and "Traceback" not in found.reason
    assert not list(mine.servers.glob("ollama-models"))


def test_one_that_dies_while_it_is_asked_is_named_too(mine: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{stub_ollama.put_on_path(tmp_path / 'bin')}:/usr/bin:/bin")
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{claim('127.0.0.1', 0)}")
    with (
        pytest.raises(EngineError, match="ollama died while it was asked") as caught,
        backends.borrowed(mine, "ollama", config.load(), keep=False) as started,
    ):
        assert started.endpoint and started.endpoint.server
        os.killpg(started.endpoint.server.pid, signal.SIGKILL)
        start.first_token(started.endpoint)
    assert "log: " in str(caught.value)


def test_what_is_wrong_with_a_server_is_said_and_never_called_not_installed(
    mine: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for faults, words in (
        ({"STUB_VERSION": "0.11.4"}, "is version 0.11.4, and 0.12.11 or later is needed; upgrade Ollama"),
        ({"STUB_HANG": "1"}, "did not answer within 2 s"),
    ):
        (folder := tmp_path / next(iter(faults))).mkdir()
        with servers.stub_ollama(folder, **faults) as server:
            if "STUB_HANG" not in faults:
                server.url(20, "/api/version")
            else:
                _until_listening(server.port)
            monkeypatch.setenv("OLLAMA_BASE_URL", f"http://127.0.0.1:{server.port}/v1")
            found = begin(mine)
            assert found.status == "failed" and words in found.reason
            assert "PATH" not in found.reason
    monkeypatch.setenv("OLLAMA_BASE_URL", f"127.0.0.1:{claim('127.0.0.1', 0)}")
    found = begin(mine)
    assert found.status == "failed" and "nothing listens at" in found.reason and "PATH" not in found.reason
    monkeypatch.delenv("OLLAMA_BASE_URL")
    if not listening("127.0.0.1", 11434):
        found = begin(mine)
        assert found.status == "skipped" and "ollama is not on PATH" in found.reason and "nothing listens at" in found.reason


def test_a_program_that_is_too_old_is_not_started(mine: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{stub_ollama.put_on_path(tmp_path / 'bin')}:/usr/bin:/bin")
    monkeypatch.setenv("STUB_VERSION", "0.9.1")
    found = engines.get("ollama").available()
    assert (found.usable, found.version) == (False, "0.9.1") and "0.12.11 or later is needed" in found.reason


def test_a_hung_service_does_not_keep_one_from_being_started(
    mine: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with servers.stub_ollama(tmp_path, STUB_HANG="1") as server:
        _until_listening(server.port)
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.port}")
        monkeypatch.setenv("PATH", f"{stub_ollama.put_on_path(tmp_path / 'bin')}:/usr/bin:/bin")
        with backends.borrowed(mine, "ollama", config.load(), keep=False) as started:
            assert started.status == "ready" and started.endpoint and started.endpoint.server, started.reason


def test_another_machine_is_given_the_model_only_when_that_is_allowed(
    mine: RunFolder, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "is_local", lambda url: False)
    found = begin(mine)
    assert found.status == "skipped" and "is another machine" in found.reason and "--remote-ok" in found.reason
    words = ["--run", "mine", "--output", str(mine.output), "--served-model-name", "soc"]
    assert "--remote-ok allows it" in str(served(*words).exception)
    assert models(service) == []
    monkeypatch.setenv("OLLAMA_REMOTE_OK", "1")
    with backends.borrowed(mine, "ollama", config.load(), keep=False) as started:
        assert started.status == "ready"
    assert served(*words).exception is None


def test_a_second_server_does_not_make_the_first_unknown(
    mine: RunFolder, service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--run", "mine", "--output", str(mine.output)]
    assert served(*words, "--served-model-name", "soc").exception is None
    assert served(*words, "--served-model-name", "other").exception is None
    (tmp_path / "second").mkdir()
    with servers.stub_ollama(tmp_path / "second") as second:
        monkeypatch.setenv("OLLAMA_HOST", url := second.url(20, "/api/version"))
        assert served(*words, "--served-model-name", "third").exception is None
        ours = artefacts.of_file(mine.gguf)
        for there, names in ((service, ("other:latest", "soc:latest")), (url, ("third:latest",))):
            seen = {s.name: s.artefact for s in asyncio.run(check_ollama_models(there, output=mine.output))}
            assert seen == dict.fromkeys(names, ours)
    known = tuple(records.every(mine.output))
    assert all(records.last_served(*where, known) == ours for where in ((service, "soc"), (service, "other"), (url, "third")))


def test_a_file_changed_in_place_is_not_the_one_that_was_trained(mine: RunFolder) -> None:
    assert artefacts.of_file(mine.gguf)
    content, times = bytearray(mine.gguf.read_bytes()), mine.gguf.stat()
    content[-1] ^= 1
    mine.gguf.write_bytes(content)
    os.utime(mine.gguf, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert artefacts.of_file(mine.gguf) is None


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("box", "http://box:11434"),
        ("box:80", "http://box:80"),
        ("http://box", "http://box:80"),
        ("https://box/", "https://box:443"),
        ("https://box:8443/ollama/", "https://box:8443/ollama"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:1234", "http://127.0.0.1:1234"),
        ("[::]:1234", "http://127.0.0.1:1234"),
        ("[::1]", "http://[::1]:11434"),
        ("::1", "http://[::1]:11434"),
        ("::", "http://127.0.0.1:11434"),
        (":4321", "http://127.0.0.1:4321"),
        ('"127.0.0.1:11434"', "http://127.0.0.1:11434"),
    ],
)
def test_addresses_as_ollama_reads_them(value: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", value)
    assert config.load().address("ollama").base_url == url
    monkeypatch.delenv("OLLAMA_HOST")
    monkeypatch.setenv("OLLAMA_BASE_URL", value)
    assert config.load().address("ollama").base_url == url


def test_two_variables_that_name_two_servers_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_BASE_URL", "http://box:11434/v1")
    monkeypatch.setenv("OLLAMA_HOST", "0.0.0.0")
    done = CliRunner().invoke(app, ["config", "--offline"])
    assert isinstance(done.exception, InputError)
    words = "OLLAMA_BASE_URL=http://box:11434/v1 and OLLAMA_HOST=http://127.0.0.1:11434 name two servers: OLLAMA_BASE_URL is used"
    assert words in str(done.exception)
    monkeypatch.setenv("OLLAMA_BASE_URL", "http://localhost:11434")
    assert CliRunner().invoke(app, ["config", "--offline"]).exception is None


def test_a_key_for_ollama_s_own_service_is_sent_nowhere_else(mine: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "secret-of-the-cloud")
    done = (200, {"Content-Type": "application/x-ndjson"}, b'{"status": "success"}\n')
    with serving({"/api/create": done}) as stub:
        digest = "sha256:" + hashlib.sha256(mine.gguf.read_bytes()).hexdigest()
        stub.routes[f"/api/blobs/{digest}"] = {}
        engines.get("ollama").create(stub.url, "m", mine.gguf, {})
    assert stub.seen and "secret-of-the-cloud" not in json.dumps([headers for _, headers in stub.seen])


@pytest.mark.parametrize("broken", [{"OLLAMA_HOST": "a:b:c"}, {"ALL_PROXY": "nonsense://x"}])
def test_the_client_is_imported_whatever_the_variables_say(broken: dict[str, str]) -> None:
    code = "from pipeline.engines.ollama import _package; print(_package().__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **broken},
        cwd=Path(config.__file__).parents[1],
    )
    assert done.stdout == "ollama\n", done.stderr


def _until_listening(port: int) -> None:
    end = time.monotonic() + 20
    while not listening("127.0.0.1", port):
        assert time.monotonic() < end
        time.sleep(0.05)
