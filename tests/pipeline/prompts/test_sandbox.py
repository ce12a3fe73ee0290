from __future__ import annotations

import signal
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from pipeline.errors import ModelError
from pipeline.prompts import sandbox
from pipeline.prompts.chat import EMBEDDED_TEMPLATE, ChatTemplate
from pipeline.prompts.sandbox_worker import compiled

_CHAT = [
    {"role": "user", "content": "Grüße \ud83d\ude00 \u2028 <b>"},
    {"role": "assistant", "content": None, "tool_calls": [{"a": 1.5}]},
]
_TEMPLATE = (
    "{{ strftime_now('%Y') }}{% for m in messages %}{% generation %}<{{ m.role }}>{{ m.content }}{{ m|tojson(indent=1) }}"
    "{% endgeneration %}{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ x }}"
)


def test_the_process_writes_what_jinja_writes_here() -> None:
    now = datetime(2024, 5, 6)
    context = {"messages": _CHAT, "strftime_now": now.strftime, "x": {"k": (1, 2)}}
    assert sandbox.render(_TEMPLATE, context) == compiled(_TEMPLATE).render(context)


def test_lone_surrogates_come_through() -> None:
    assert sandbox.render("{{ a }}", {"a": "\ud800"}) == "\ud800"


def test_our_own_template_is_rendered_here() -> None:
    before = list(sandbox._running)
    ChatTemplate(EMBEDDED_TEMPLATE, {"eos_token": "</s>"}).render([{"role": "user", "content": "x"}])
    assert sandbox._running == before


def test_after_an_endless_one_the_next_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)
    begun = time.monotonic()
    with pytest.raises(ModelError, match="takes longer than"):
        sandbox.render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {})
    assert time.monotonic() - begun < 60  # of hours; generous for a busy machine
    monkeypatch.undo()
    assert sandbox.render("{{ a }}", {"a": 1}) == "1"


def test_after_an_interrupted_one_the_next_gets_its_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sandbox.render("{{ a }}", {"a": 0}) == "0"
    monkeypatch.setattr(sandbox, "SECONDS", 60.0)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            sandbox.render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    monkeypatch.undo()
    assert sandbox.render("{{ a }}", {"a": 1}) == "1"


def test_a_template_of_megabytes_is_none() -> None:
    with pytest.raises(ModelError, match="characters; more than 1048576 is no chat template"):
        sandbox.render("x" * (1 << 20 | 1), {})


def test_threads_get_their_own_answers() -> None:
    found: dict[int, str] = {}

    def work(number: int) -> None:
        found[number] = sandbox.render("{{ a }}", {"a": number})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: str(n) for n in range(20)}


def test_the_process_knows_no_variables_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-value-0815")
    worker = sandbox._Worker()
    try:
        with open(f"/proc/{worker.process.pid}/environ") as environment:
            assert "planted" not in environment.read()
    finally:
        worker.end()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the environment of a process is read from /proc")
def test_the_process_finds_the_libraries_that_this_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nowhere/lib")
    monkeypatch.setenv("PYTHONPATH", "/nowhere/packages")
    monkeypatch.setenv("HF_TOKEN", "planted-value-0815")
    with sandbox._Worker().process as process:
        said = Path(f"/proc/{process.pid}/environ").read_bytes().decode()
        process.kill()
    assert "LD_LIBRARY_PATH=/nowhere/lib\0" in said and "/nowhere/packages\0" in said
    assert "planted-value-0815" not in said
