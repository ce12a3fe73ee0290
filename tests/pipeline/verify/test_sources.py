"""Finding the server that serves this very model; the stub answers as each server does."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from pipeline.errors import InputError
from pipeline.modelfile.template import derive
from pipeline.prompts.parity import Reference
from pipeline.runs.folder import RunFolder
from pipeline.verify.sources import EngineRenderer, Source, choose_renderers, make_renderer


@pytest.fixture
def stub():
    """(base URL, answers by path); an answer is JSON, or a function of the request's JSON."""
    answers = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = answers.get(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200 if found is not None else 404)
            self.end_headers()
            self.wfile.write(json.dumps(found(json.loads(body)) if callable(found) else found).encode())

        do_POST = do_GET  # noqa: N815 - http.server's name

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


@pytest.fixture
def source(embedded, now, tmp_path):
    return Source(Reference(embedded, now), RunFolder("r", tmp_path))


@pytest.fixture
def found_by_itself(stub, monkeypatch):
    """What is chosen when no engine is named, the stub standing on the port of one of them."""

    def choose(name, source):
        port = int(stub[0].rpartition(":")[2])
        monkeypatch.setattr("pipeline.verify.sources._PORTS", {name: port})
        monkeypatch.setattr("pipeline.verify.sources.NAMES", (name,))
        return choose_renderers(None, source)

    return choose


def test_llamacpp_by_its_chat_template(stub, source, found_by_itself):
    url, answers = stub
    answers["/props"] = {"chat_template": source.template.source + "\n"}
    assert found_by_itself("llamacpp", source) == ([EngineRenderer("llamacpp", url)], {})
    answers["/props"] = {"chat_template": "another"}
    chosen, absent = found_by_itself("llamacpp", source)
    assert (chosen, "serves another model" in absent["llamacpp"]) == ([], True)
    assert make_renderer("llamacpp", source, url=url) == EngineRenderer("llamacpp", url)  # asked for: compared as it is


def test_vllm_by_its_folder(stub, source, found_by_itself):
    url, answers = stub
    answers["/v1/models"] = {"data": [{"id": "a", "root": "/elsewhere"}, {"id": "b", "root": str(source.folder)}]}
    assert found_by_itself("vllm", source) == ([EngineRenderer("vllm", url, "b")], {})
    assert choose_renderers(f"vllm={url}/v1#a", source) == ([EngineRenderer("vllm", url, "a")], {})
    answers["/v1/models"] = {"data": [{"id": "only", "root": "org/model"}]}
    assert found_by_itself("vllm", source)[0] == []
    assert choose_renderers(f"vllm={url}", source) == ([EngineRenderer("vllm", url, "only")], {})


def test_ollama_by_its_template(stub, source, found_by_itself):
    url, answers = stub
    templates = {"x:latest": "{{ .Prompt }}", "soc:latest": derive(source.template).text}
    answers["/api/tags"] = {"models": [{"name": name} for name in templates]}
    answers["/api/show"] = lambda asked: {"template": templates[asked["model"]]}
    assert found_by_itself("ollama", source) == ([EngineRenderer("ollama", url, "soc:latest")], {})
    del templates["soc:latest"]
    templates["y:latest"] = ""
    answers["/api/tags"] = {"models": [{"name": name} for name in templates]}
    with pytest.raises(InputError, match="serves another model: x:latest, y:latest") as caught:
        choose_renderers(f"ollama={url}", source)
    assert "#MODEL" in caught.value.remedy
