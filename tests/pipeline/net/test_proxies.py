"""Proxies in the environment: never asked for this machine, asked for others, and one line when they fail - past real ones that count."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from servers import free_port
from stub_server import serving

from pipeline.errors import InputError, MissingDependency
from pipeline.net import client
from pipeline.net.client import Unanswered, open_client, post, proxy_of, status_of
from pipeline.net.loopback import spare_loopback, spared
from pipeline.net.reach import get_json

ROOT = Path(__file__).parents[3]


class Counting:
    """A proxy that counts who comes: ``answer`` is said to whatever is asked; None: it speaks SOCKS 5 and lets everything through."""

    def __init__(self, answer: bytes | None) -> None:
        self.answer, self.seen = answer, list[bytes]()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                peer = self.listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._speak, args=(peer,), daemon=True).start()

    def _speak(self, peer: socket.socket) -> None:
        with peer:
            first = peer.recv(4096)
            self.seen.append(first)
            if self.answer is not None:
                peer.sendall(self.answer)
                return
            peer.sendall(b"\x05\x00")
            asked = peer.recv(4096)
            port, host = int.from_bytes(asked[-2:], "big"), asked[5 : 5 + asked[4]]
            self.seen.append(host)
            peer.sendall(b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
            with socket.create_connection(("127.0.0.1", port)) as server:
                threading.Thread(target=_pump, args=(server, peer), daemon=True).start()
                _pump(peer, server)


def _pump(source: socket.socket, target: socket.socket) -> None:
    while True:
        try:
            part = source.recv(65536)
            target.sendall(part)
        except OSError:
            return
        if not part:
            return


@contextmanager
def counting(answer: bytes | None = None) -> Iterator[Counting]:
    proxy = Counting(answer)
    try:
        yield proxy
    finally:
        proxy.listener.close()


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    # what spare_loopback sets is taken away again
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")


SPOILT = [
    "socks5://127.0.0.1:{port}",
    "socks://127.0.0.1:{port}",
    "http://127.0.0.1:{port}",
    "foo://127.0.0.1:{port}",
    "http://[bad",
]


@pytest.mark.parametrize("variable", ["all_proxy", "ALL_PROXY", "http_proxy", "HTTP_PROXY"])
@pytest.mark.parametrize("value", SPOILT)
def test_this_machine_is_asked_past_every_proxy(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with counting() as proxy, serving({"/health": {}}) as server:
        monkeypatch.setenv(variable, value.format(port=proxy.port))
        monkeypatch.setenv("NO_PROXY", "[::1], fe80::/10, a b,*.corp.example")
        for url in (server.url, server.url.replace("127.0.0.1", "localhost"), server.url.replace("127.0.0.1", "0.0.0.0")):
            assert status_of(f"{url}/health") == 200
            with open_client(url) as asked:
                assert asked.get("/health").status_code == 200
            assert client.wait_for(get_json(url, "/health")).ok
        assert proxy.seen == []


CLIENTS = """
import httpx, os
from pipeline.net.loopback import spare_loopback
spare_loopback()
url = os.environ["URL"]
print(httpx.get(url + "/health").status_code)
import ollama, openai
print(ollama.Client(host=url).show("m").template)
print([model.id for model in openai.OpenAI(base_url=url + "/v1", api_key="x").models.list()])
"""


@pytest.mark.parametrize("value", ["socks5://127.0.0.1:{port}", "http://127.0.0.1:{port}"])
def test_other_peoples_clients_ask_this_machine_directly_too(value: str) -> None:
    routes = {
        "/health": {},
        "/api/show": {"template": "t", "model_info": {}},
        "/v1/models": {"object": "list", "data": [{"id": "m", "object": "model"}]},
    }
    with counting(b"HTTP/1.1 502 no\r\nContent-Length: 0\r\n\r\n") as proxy, serving(routes) as server:
        given = value.format(port=proxy.port)
        names = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY")
        environment = {**os.environ, **dict.fromkeys(names, given), "no_proxy": "[::1],fe80::/10", "URL": server.url}
        done = subprocess.run(
            [sys.executable, "-c", CLIENTS], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=60, check=False
        )
        assert done.stdout.split("\n") == ["200", "t", "['m']", ""], done.stderr
        assert proxy.seen == []


def test_a_socks_proxy_carries_a_request_to_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with counting() as proxy, serving({"/v1/models": {"data": []}}) as server:
        monkeypatch.setenv("all_proxy", f"socks5://127.0.0.1:{proxy.port}")
        away = server.url.replace("127.0.0.1", "models.example")
        assert client.wait_for(get_json(away, "/v1/models")).ok
        assert proxy.seen[1] == b"models.example"


_ASKS = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"


FAILING = """
import json, sys
from pipeline.net import client
from pipeline.net.reach import get_json
url = sys.argv[1]
try:
    with client.open_client(url, timeout=5) as asked:
        client.post(asked, "/v1/chat/completions", {})
except client.Unanswered as error:
    said = [error.message, error.remedy]
print(json.dumps([*said, client.wait_for(get_json(url, "/v1/models")).detail, client.status_of(url)]))
"""


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("http://127.0.0.1:{dead}", b""),
        ("socks5://127.0.0.1:{dead}", b""),
        ("http://127.0.0.1:{port}", _ASKS),
        ("http://127.0.0.1:{port}", b""),
        ("socks5://127.0.0.1:{port}", b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        ("socks5://127.0.0.1:{port}", b"\x05\xff"),
    ],
)
def test_a_proxy_that_fails_is_one_line_with_the_variable(value: str, answer: bytes, scheme: str) -> None:
    with counting(answer) as proxy:  # asked from a process of its own: httpcore leaves the socket of such a proxy open
        given = value.format(port=proxy.port, dead=free_port())
        environment = {**os.environ, "ALL_PROXY": given}
        command = [sys.executable, "-c", FAILING, f"{scheme}://models.example"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        message, remedy, seen, status = json.loads(done.stdout)
        assert f"the proxy {given} (ALL_PROXY)" in message and "\n" not in message
        assert "unset ALL_PROXY" in remedy and "NO_PROXY" in remedy
        assert given in seen
        assert status in (0, 407)


@pytest.mark.parametrize("value", ["foo://127.0.0.1:1", "http://[bad", "http://", "socks4://127.0.0.1:1", "http://a:99999"])
def test_a_value_that_is_no_proxy_names_its_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", value)
    with pytest.raises(InputError, match="https_proxy=") as caught:
        open_client("https://models.example")
    assert "unset it" in caught.value.remedy
    assert not client.wait_for(get_json("https://models.example", "/")).ok
    assert status_of("https://models.example") == 0


def test_a_proxy_as_desktops_write_it_is_one_that_every_client_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "socks://127.0.0.1:1")
    spare_loopback()
    assert dict(os.environ)["all_proxy"] == "socks5://127.0.0.1:1"
    httpx.Client().close()


def test_a_password_in_a_proxy_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://user:secret@127.0.0.1:{free_port()}")
    with open_client("http://models.example", timeout=5) as asked, pytest.raises(Unanswered) as caught:
        post(asked, "/", {})
    assert "secret" not in str(caught.value)


def test_without_the_package_for_socks_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "socks5h://127.0.0.1:1")
    monkeypatch.setattr(client, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="socksio") as caught:
        proxy_of("http://models.example")
    assert caught.value.remedy == "make setup"


@pytest.mark.parametrize(
    ("excepted", "yes", "no"),
    [
        ("*", "http://any.example", None),
        (".corp.example", "http://a.corp.example", "http://corp.example.org"),
        ("*.corp.example", "http://a.b.corp.example:8000", "http://xcorp.example"),
        ("corp.example", "http://CORP.example.", "http://corp.example.org"),
        ("10.0.0.0/8", "http://10.9.8.7:8003", "http://11.0.0.1"),
        ("fd00::/8", "http://[fd00::5]:8003", "http://[fe80::5]"),
        ("[fd00::5]", "http://[fd00::5]", "http://[fd00::6]"),
        ("gpu.example:8003", "http://gpu.example:8003", "http://gpu.example:8004"),
        ("gpu.example:443", "https://gpu.example", "http://gpu.example"),
        ("a.example b.example", "http://b.example", "http://c.example"),
        (" a.example , b.example ", "http://a.example", "http://c.example"),
    ],
)
@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_no_proxy_in_every_form(excepted: str, yes: str, no: str | None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, excepted)
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:9")
    for _ in range(2):
        assert spared(yes) and proxy_of(yes) is None
        assert no is None or (not spared(no) and proxy_of(no) is not None)
        spare_loopback()
        httpx.Client().close()  # what is written for other clients is what they can read


def test_verbs_ask_a_runs_server_directly_behind_a_socks_proxy(tmp_path: Path) -> None:
    with counting() as proxy, serving({"/health": {}, "/v1/models": {"data": []}}) as server:
        given = {"all_proxy": f"socks5://127.0.0.1:{proxy.port}", "VLLM_BASE_URL": f"{server.url}/v1"}
        command = [sys.executable, "-m", "pipeline", "config", "--json"]
        environment = {
            **os.environ,
            **given,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60, check=False)
        assert json.loads(done.stdout) and "Traceback" not in done.stderr, done.stderr
        assert server.seen and proxy.seen == []
