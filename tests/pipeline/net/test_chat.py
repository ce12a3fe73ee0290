from __future__ import annotations

import pytest

from pipeline.errors import EngineError, InputError
from pipeline.net.chat import PATH, Reply, chat, chat_async, greedy, hello, stream
from pipeline.net.client import Refused, Unanswered, open_async, open_client, wait_for
from tests.support.servers import free_port
from tests.support.stub_server import serving

ANSWER = {
    "choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}


async def _ask(url: str) -> Reply:
    async with open_async(url) as client:
        return await chat_async(client, hello("m"), "engine:")


def test_a_chat_is_sent_with_the_key_and_read_alike_in_both_ways() -> None:
    with serving({PATH: ANSWER}) as stub, open_client(stub.url, "sk-1") as client:
        wanted = greedy("m", [{"role": "user", "content": "hi"}], 5)
        assert chat(client, wanted) == wait_for(_ask(stub.url)) == Reply("hi", "stop", 1)
        assert stub.seen[0][1]["Authorization"] == "Bearer sk-1" and "Authorization" not in stub.seen[1][1]
        assert wanted["temperature"] == 0 and hello("m")["max_tokens"] == 1


def test_a_refusal_carries_the_status_and_the_servers_words() -> None:
    with serving({PATH: (503, {}, {"error": "loading"})}) as stub, pytest.raises(Refused) as raised:
        wait_for(_ask(stub.url))
    assert raised.value.status == 503 and "loading" in raised.value.evidence
    assert raised.value.message == f"engine: {PATH} answered 503"


@pytest.mark.parametrize("said", [{}, {"choices": []}, {"choices": [{}]}, []])
def test_an_answer_that_is_no_chat_is_shown(said: object) -> None:
    with serving({PATH: said}) as stub, open_client(stub.url) as client, pytest.raises(EngineError, match="no chat answer"):
        chat(client, hello("m"))


def test_nobody_answers_and_too_late_are_told_apart() -> None:
    with open_client(f"http://127.0.0.1:{free_port()}") as client, pytest.raises(Unanswered) as refused:
        chat(client, hello("m"))
    slow = serving({PATH: ANSWER}, delay=0.5)
    with slow as stub, open_client(stub.url, timeout=0.1) as client, pytest.raises(Unanswered) as late:
        chat(client, hello("m"))
    assert (refused.value.timed_out, late.value.timed_out) == (False, True)


def test_a_stream_is_timed_and_must_end_with_its_mark() -> None:
    events = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: {"choices":[{"delta":{"content":"b"}}]}\n\n'

    async def read(url: str) -> object:
        async with open_async(url) as client:
            return await stream(client, hello("m"), "engine:")

    with serving({PATH: events + b"data: [DONE]\n\n"}) as stub:
        got = wait_for(read(stub.url))
        assert getattr(got, "text", "") == "ab" and getattr(got, "chunks", 0) == 2 and stub.bodies[PATH]["stream"] is True
    with serving({PATH: events}) as stub, pytest.raises(EngineError, match="broke off"):
        wait_for(read(stub.url))
    with serving({PATH: (500, {}, {"error": "x"})}) as stub, pytest.raises(Refused, match="streaming"):
        wait_for(read(stub.url))


def test_a_key_that_http_forbids_is_not_shown() -> None:
    with pytest.raises(InputError) as raised:
        open_client("http://user:pw@127.0.0.1:1", "schlüssel")
    assert "schl" not in str(raised.value) and "pw" not in str(raised.value)
