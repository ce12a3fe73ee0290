"""One of several servers of a name: the connection goes to its address, Host and TLS keep the name."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipeline.errors import EngineError
from pipeline.net import client
from pipeline.net.client import at_address, get_async, open_async, open_client, post

NAME = "one.test"


class _Seen(HTTPServer):
    """What a server on 127.0.0.2 was asked: (Host header, name in TLS)."""

    hosts: list[str]
    names: list[str | None]


class _Handler(BaseHTTPRequestHandler):
    server: _Seen

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.hosts.append(self.headers["Host"])
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        return


def _certificate(folder: Path, name: str) -> Path:
    """A self-signed certificate of a name, with its key, as one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "server.pem"
    path.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(pem) + secret)
    return path


@pytest.fixture(params=["http", "https"])
def server(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Seen]:
    found = _Seen(("127.0.0.2", 0), _Handler)
    found.hosts, found.names = [], []
    if request.param == "https":
        path = _certificate(tmp_path, NAME)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        context.sni_callback = lambda _, name, __: found.names.append(name)
        found.socket = context.wrap_socket(found.socket, server_side=True)
        trusting = ssl.create_default_context(cafile=str(path))
        monkeypatch.setattr(client, "tls", lambda: trusting)
    thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def _ask_both(url: str) -> None:
    async def ask() -> None:
        async with open_async(url) as asking:
            await get_async(asking, "/v1/models")

    asyncio.run(ask())
    with open_client(url) as asking:
        post(asking, "/v1/x", {})


def test_the_name_stays_in_host_and_tls(server: _Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    secure = bool(isinstance(server.socket, ssl.SSLSocket))
    url = f"{'https' if secure else 'http'}://{NAME}:{server.server_port}"
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with at_address(url, "127.0.0.2"):
        _ask_both(url)
    assert server.hosts == [f"{NAME}:{server.server_port}"] * 2
    assert server.names == ([NAME] * 2 if secure else [])
    # afterwards, and for other names, nothing is changed
    monkeypatch.delenv("ALL_PROXY")
    with at_address("http://other.test", "127.0.0.2"), pytest.raises(EngineError), open_client(url) as asking:
        post(asking, "/v1/x", {})
    assert len(server.hosts) == 2


def test_a_certificate_of_another_name_is_refused(server: _Seen) -> None:
    if not isinstance(server.socket, ssl.SSLSocket):
        return
    url = f"https://wrong.test:{server.server_port}"
    with at_address(url, "127.0.0.2"), pytest.raises(EngineError, match="CERTIFICATE_VERIFY_FAILED"), open_client(url) as asking:
        post(asking, "/v1/x", {})
    assert server.hosts == []
