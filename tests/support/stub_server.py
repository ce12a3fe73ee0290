"""A real HTTP server in a thread that answers with what a test gives it; it records what it was sent."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Stub:
    """``routes`` maps a path to JSON, raw bytes, or (status, headers, JSON); an unknown path is 404."""

    routes: dict[str, Any]
    key: str = ""
    delay: float = 0.0
    url: str = ""
    seen: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)
    bodies: dict[str, Any] = field(default_factory=dict)


@contextmanager
def serving(routes: dict[str, Any], key: str = "", delay: float = 0.0) -> Iterator[Stub]:
    stub = Stub(routes, key, delay)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(stub))
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(stub: Stub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stub.seen.append((self.path, dict(self.headers)))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Type") == "application/json":
                stub.bodies[self.path] = json.loads(body)
            time.sleep(stub.delay)
            if stub.key and self.headers.get("Authorization") != f"Bearer {stub.key}":
                self._send(401, {}, {"error": "invalid key"})
                return
            found = stub.routes.get(self.path, (404, {}, {"error": "not found"}))
            if isinstance(found, tuple):
                self._send(*found)
            else:
                self._send(200, {}, found)

        do_POST = do_GET  # noqa: N815
        do_HEAD = do_GET  # noqa: N815

        def _send(self, status: int, headers: Mapping[str, str], body: Any) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(b"" if self.command == "HEAD" else data)

        def log_message(self, *args: Any) -> None:
            return

    return Handler
