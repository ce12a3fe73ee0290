"""The HTTP renderers against a stub that records what it is asked; the real servers are in test_parity_engines."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from pipeline import engines
from pipeline.errors import EngineError, ModelError
from pipeline.prompts.conversation import Conversation, NotApplicable, Prompt
from pipeline.prompts.renderers import GoRenderer
from pipeline.verify.sources import EngineRenderer

USER = {"role": "user", "content": "Hi"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"é": 1}}}],
}
TOOL = {"type": "function", "function": {"name": "f"}}
CHAT = Conversation("c", (USER, CALL, {"role": "tool", "content": "r"}), (TOOL,), ({"text": "d"},))


@pytest.fixture
def stub():
    """(base URL, requests seen, answers by path); an answer is (status, JSON)."""
    seen, answers = [], {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body))
            status, answer = answers[self.path]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen, answers
    server.shutdown()
    server.server_close()


def test_llamacpp(stub):
    url, seen, answers = stub
    answers["/apply-template"], answers["/tokenize"] = (200, {"prompt": "text"}), (200, {"tokens": [1, 2]})
    assert EngineRenderer("llamacpp", url).render(CHAT) == Prompt("text", (1, 2))
    asked = seen[0][1]
    assert asked["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"é": 1}'}
    assert (asked["tools"], asked["chat_template_kwargs"]) == ([TOOL], {"documents": [{"text": "d"}]})
    assert seen[1] == ("/tokenize", {"content": "text", "add_special": True, "parse_special": True})


def test_vllm(stub):
    url, seen, answers = stub
    answers["/tokenize"], answers["/detokenize"] = (200, {"tokens": [3]}), (200, {"prompt": "three"})
    renderer = EngineRenderer("vllm", url, "m")
    prompt = renderer.render(Conversation("c", (USER, {"role": "assistant", "content": "He"}), continued=True))
    assert prompt == Prompt(None, (3,))
    assert {name: seen[0][1][name] for name in ("model", "add_generation_prompt", "continue_final_message")} == {
        "model": "m", "add_generation_prompt": False, "continue_final_message": True,
    }  # fmt: skip
    assert renderer.detokenize(prompt) == "three"
    assert seen[1][1] == {"model": "m", "tokens": [3]}


def test_ollama(stub):
    url, seen, answers = stub
    answers["/api/chat"] = (200, {"_debug_info": {"rendered_template": "text"}})
    chat = Conversation("c", ({"role": "user", "content": [{"type": "text", "text": "a"}]}, CALL), (TOOL,))
    assert EngineRenderer("ollama", url, "m").render(chat) == Prompt("text")
    asked = seen[0][1]
    assert (asked["_debug_render_only"], asked["stream"], asked["tools"]) == (True, False, [TOOL])
    assert asked["messages"][0]["content"] == "a"
    assert asked["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"é": 1}
    answers["/api/chat"] = (200, {"message": {}})
    with pytest.raises(EngineError, match="does not tell"):
        EngineRenderer("ollama", url, "m").render(chat)


def test_documents_cannot_be_sent_to_ollama(stub, now):
    for renderer in (EngineRenderer("ollama", stub[0], "m"), GoRenderer("{{ .Prompt }}", now)):
        with pytest.raises(NotApplicable, match="no documents"):
            renderer.render(CHAT)


@pytest.mark.parametrize(("status", "kind"), [(400, ModelError), (500, ModelError), (404, EngineError), (503, EngineError)])
def test_refusals_keep_the_servers_words(stub, status, kind):
    url, _, answers = stub
    answers["/apply-template"] = (status, {"error": "why"})
    with pytest.raises(kind, match=str(status)) as caught:
        EngineRenderer("llamacpp", url).render(CHAT)
    assert "why" in caught.value.evidence


def test_no_server():
    with pytest.raises(EngineError, match="does not answer"):
        EngineRenderer("llamacpp", "http://127.0.0.1:9").render(CHAT)


def test_a_client_holds_no_connection_between_requests(stub):
    """A cached client that is dropped must leave no socket open: warnings are errors here."""
    from pipeline.verify.sources import _client

    url, _, answers = stub
    answers["/apply-template"], answers["/tokenize"] = (200, {"prompt": "text"}), (200, {"tokens": [1]})
    EngineRenderer("llamacpp", url).render(CHAT)
    assert _client(url, "")._transport._pool.connections == []


def test_ollama_by_both_forms_of_its_api(stub):
    url, seen, answers = stub
    for path in ("/api/chat", "/v1/chat/completions"):
        answers[path] = (200, {"_debug_info": {"rendered_template": path}})
    chat = Conversation("c", ({"role": "user", "content": [{"type": "text", "text": "a"}]}, CALL), (TOOL,))
    doors = EngineRenderer("ollama", url, "m", system="S").doors
    assert [(one.name, one.system, one.render(chat).text) for one in doors] == [
        ("ollama", "S", "/api/chat"), ("ollama/v1", "S", "/v1/chat/completions"),
    ]  # fmt: skip
    assert seen[1][1]["messages"][0]["content"] == [{"type": "text", "text": "a"}]  # as a client sends it
    assert [path.startswith("v1:") for path in doors[1].paths] == [True, True]
    # what this product itself sends there is one text
    assert engines.get("ollama").chat_body(chat)["messages"][0]["content"] == "a"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("Unable to generate parser for this template", "refuses a tool without parameters"),
        ("json: cannot unmarshal array into Go struct field .type of type string", "has no place for such a tool"),
    ],
)
def test_what_ollama_cannot_take_is_not_applicable(stub, said, why):
    url, _, answers = stub
    answers["/api/chat"] = (400, {"error": said})
    with pytest.raises(NotApplicable, match=why):
        EngineRenderer("ollama", url, "m").render(Conversation("c", ({"role": "user", "content": "a"},), (TOOL,)))
    answers["/api/chat"] = (400, {"error": "another reason"})
    with pytest.raises(ModelError):
        EngineRenderer("ollama", url, "m").render(Conversation("c", ({"role": "user", "content": "a"},)))
