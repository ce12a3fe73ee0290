"""Finding the server that serves this very model; the stub answers as each server does."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from pipeline.errors import EngineError, InputError
from pipeline.net.loopback import claim
from pipeline.prompts.parity import Reference
from pipeline.runs.folder import RunFolder
from pipeline.serve import records
from pipeline.serve.records import Ready
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
    """What is chosen of one engine when none is named, the stub standing at its configured address."""

    def choose(name, source):
        monkeypatch.setenv(f"{name.upper()}_BASE_URL", stub[0])
        chosen, absent = choose_renderers(None, source)
        return [renderer for renderer in chosen if renderer.name == name], absent

    return choose


def test_llamacpp_by_the_file_it_loaded(stub, source, found_by_itself):
    url, answers = stub
    answers["/v1/models"] = {"data": [{"id": "soc"}]}
    answers["/props"] = {"model_path": str(source.run.gguf)}
    assert found_by_itself("llamacpp", source)[0] == [EngineRenderer("llamacpp", url, "soc")]
    answers["/props"] = {"model_path": "/another.gguf"}
    chosen, absent = found_by_itself("llamacpp", source)
    assert (chosen, "serves another model: soc" in absent["llamacpp"]) == ([], True)
    assert make_renderer("llamacpp", source, url=url) == EngineRenderer("llamacpp", url, "soc")  # asked for: compared as it is


def test_vllm_by_its_folder(stub, source, found_by_itself):
    url, answers = stub
    answers["/v1/models"] = {"data": [{"id": "a", "root": "/elsewhere"}, {"id": "b", "root": str(source.run.merged)}]}
    assert found_by_itself("vllm", source)[0] == [EngineRenderer("vllm", url, "b")]
    assert choose_renderers(f"vllm={url}/v1#a", source) == ([EngineRenderer("vllm", url, "a")], {})
    answers["/v1/models"] = {"data": [{"id": "only", "root": "org/model"}]}
    assert found_by_itself("vllm", source)[0] == []
    assert choose_renderers(f"vllm={url}", source) == ([EngineRenderer("vllm", url, "only")], {})


def test_ollama_by_the_run_s_own_record(stub, source, found_by_itself):
    url, answers = stub
    answers["/api/tags"] = {"models": [{"name": "x:latest", "digest": "1"}, {"name": "soc:latest", "digest": "2"}]}
    records.mark_ready(source.run.servers, "ollama", None, Ready(url, "soc", digest="2"))
    assert found_by_itself("ollama", source)[0] == [EngineRenderer("ollama", url, "soc:latest")]
    answers["/api/tags"]["models"][1]["digest"] = "made again by someone else"
    with pytest.raises(InputError, match="serves another model: x:latest, soc:latest") as caught:
        choose_renderers(f"ollama={url}", source)
    assert "#MODEL" in caught.value.remedy


def test_nothing_at_the_configured_address(source, monkeypatch):
    monkeypatch.setenv("VLLM_BASE_URL", f"http://127.0.0.1:{claim('127.0.0.1', 0)}/v1")
    with pytest.raises(EngineError, match=r"no vllm server at .*connection refused"):
        choose_renderers("vllm", source)
