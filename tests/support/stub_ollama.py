#!/usr/bin/env python3
"""``ollama`` as its documentation describes it, without a model: ``serve`` and ``--version``; state in OLLAMA_MODELS.

Faults on demand: STUB_VERSION, STUB_HANG (accepts connections and says nothing), STUB_DIES=create or chat (after so many chats
with chat:N), STUB_REFUSES (every chat), STUB_SLOW (seconds before the list of models), STUB_SAYS (the answer to a chat). It is also imported, to put it on a PATH or to run one as a service.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VERSION = os.environ.get("STUB_VERSION", "0.33.0")
DIES, _, AFTER = os.environ.get("STUB_DIES", "").partition(":")


def put_on_path(folder: Path) -> Path:
    """The folder with an ``ollama`` that is this program, run by this Python."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "ollama"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} "$@"\n')
    program.chmod(0o755)
    return folder


class Store:
    """Blobs as files by digest, models as JSON files."""

    def __init__(self, folder: Path) -> None:
        self.blobs, self.manifests = folder / "blobs", folder / "manifests"
        for made in (self.blobs, self.manifests):
            made.mkdir(parents=True, exist_ok=True)

    def blob(self, digest: str) -> Path:
        return self.blobs / digest.replace(":", "-")

    def model(self, name: str) -> Path:
        """The model's file: the registry and ``library/`` may be left out, and one that is there has its own case."""
        short = name.casefold().removeprefix("registry.ollama.ai/").removeprefix("library/")
        wanted = short if ":" in short else f"{short}:latest"
        there = (path for path in self.manifests.iterdir() if path.name.casefold() == wanted)
        return next(there, self.manifests / (name if ":" in name else f"{name}:latest").rpartition("/")[2])

    def models(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.manifests.iterdir())]


class Handler(BaseHTTPRequestHandler):
    store: Store
    chats = 0

    def _send(self, status: int, body: Any, kind: str = "application/json") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def do_GET(self) -> None:
        if os.environ.get("STUB_HANG"):
            time.sleep(600)
        if self.path == "/api/version":
            return self._send(200, {"version": VERSION})
        if self.path == "/api/tags":
            time.sleep(float(os.environ.get("STUB_SLOW", "0")))
            return self._send(
                200, {"models": [{k: m[k] for k in ("name", "model", "digest", "size")} for m in self.store.models()]}
            )
        if self.path == "/v1/models":
            return self._send(
                200, {"object": "list", "data": [{"id": m["name"], "object": "model"} for m in self.store.models()]}
            )
        if self.path == "/api/ps":
            return self._send(200, {"models": []})
        return self._send(404, b"404 page not found", "text/plain")

    def do_HEAD(self) -> None:
        self._send(200 if self.store.blob(self.path.rpartition("/")[2]).exists() else 404, b"")

    def do_DELETE(self) -> None:
        path = self.store.model(json.loads(self._body())["model"])
        if not path.exists():
            return self._send(404, {"error": f"model '{path.name}' not found"})
        path.unlink()
        return self._send(200, b"")

    def do_POST(self) -> None:
        if self.path.startswith("/api/blobs/"):
            digest, content = self.path.rpartition("/")[2], self._body()
            if "sha256:" + hashlib.sha256(content).hexdigest() != digest:
                return self._send(400, {"error": f"digest mismatch, expected {digest}"})
            self.store.blob(digest).write_bytes(content)
            return self._send(201, b"")
        body = json.loads(self._body())
        if self.path == "/api/create":
            return self._create(body)
        name = str(body.get("model", ""))
        if not self.store.model(name).exists():
            return self._send(404, {"error": f"model '{name}' not found"})
        if self.path == "/api/show":
            made = json.loads(self.store.model(name).read_text())
            blob = next(iter(made["files"].values()))
            text = f"FROM {self.store.blob(blob)}\n"
            return self._send(200, {"modelfile": text, "template": made.get("template", ""), "system": made.get("system", "")})
        if self.path in ("/v1/chat/completions", "/api/chat"):
            Handler.chats += 1
            if os.environ.get("STUB_REFUSES"):
                return self._send(500, {"error": "model requires more system memory than is available"})
            if DIES == "chat" and Handler.chats > int(AFTER or 0):
                print("fatal error: the stub was told to die", flush=True)
                os._exit(2)
            said = {"role": "assistant", "content": os.environ.get("STUB_SAYS", "ok")}
            if self.path == "/api/chat":
                return self._send(200, {"model": name, "message": said, "done": True, "done_reason": "stop", "eval_count": 1})
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            choice = {"index": 0, "message": said, "finish_reason": "stop"}
            return self._send(200, {"id": "x", "object": "chat.completion", "model": name, "choices": [choice], "usage": usage})
        return self._send(404, b"404 page not found", "text/plain")

    def _create(self, body: dict[str, Any]) -> None:
        if DIES == "create":
            print("fatal error: the stub was told to die", flush=True)
            os._exit(2)
        missing = [digest for digest in body["files"].values() if not self.store.blob(digest).exists()]
        if missing:
            return self._send(400, {"error": f"blob {missing[0]} not found"})
        name = body["model"] if ":" in body["model"] else body["model"] + ":latest"
        known = {key: body[key] for key in ("files", "template", "system", "parameters", "license") if key in body}
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        size = sum(self.store.blob(digest).stat().st_size for digest in body["files"].values())
        name = self.store.model(name).name
        self.store.model(name).write_text(json.dumps({**known, "name": name, "model": name, "digest": digest, "size": size}))
        said = [{"status": "using existing layer"}, {"status": "writing manifest"}, {"status": "success"}]
        lines = said if body.get("stream", True) else said[-1:]
        return self._send(200, "".join(json.dumps(line) + "\n" for line in lines).encode(), "application/x-ndjson")

    def log_message(self, *args: object) -> None:
        print(self.command, self.path, flush=True)


def serve(address: str, models: Path) -> None:
    host, _, port = address.rpartition(":")
    Handler.store = Store(models)
    server = ThreadingHTTPServer((host or "127.0.0.1", int(port)), Handler)
    print(f"Listening on {address}", flush=True)
    server.serve_forever(0.01)


if __name__ == "__main__":
    if sys.argv[1:] == ["--version"]:
        print(f"Warning: could not connect to a running Ollama instance\nWarning: client version is {VERSION}")
    else:
        serve(os.environ["OLLAMA_HOST"], Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models"))
