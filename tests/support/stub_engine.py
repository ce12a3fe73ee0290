"""A small engine over HTTP, as honest as it is told to be: its own template, tokenizer and answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

Answers = dict[str, Callable[[dict[str, Any]], dict[str, Any] | int]]


@contextmanager
def serve(answers: Answers) -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """(base URL, requests seen); an answer is JSON, or an HTTP status to refuse with."""
    seen: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body))
            answer = answers[self.path](body) if self.path in answers else 404
            self.send_response(answer if isinstance(answer, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"error": "no"} if isinstance(answer, int) else answer).encode())

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()
