"""Answers are taken from the last verification only of the very server, file and prompts that they were given by."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from pipeline.engines.llamacpp import LlamaCpp
from pipeline.net.client import Refused, wait_for
from pipeline.report.check import Check
from pipeline.runs.files import write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_file
from pipeline.runs.manifest import Manifest
from pipeline.serve.server import Server
from pipeline.serve.start import Endpoint
from pipeline.verify import evidence as module
from pipeline.verify.assemble import plain_client
from pipeline.verify.evidence import Evidence, Features, Plan, interrogate, read_evidence, restored, stored
from pipeline.verify.material import Material
from pipeline.verify.score import Answer, HeldOut

ROWS = [HeldOut(({"role": "user", "content": f"{i}"},), f"{i}") for i in range(4)]


@pytest.fixture
def endpoint(run: RunFolder) -> Endpoint:
    run.path.mkdir(parents=True)
    run.gguf.write_bytes(b"weights")
    os.utime(run.gguf, (1e9, 1e9))
    started_at = "2026-01-01T00:00:00+00:00"
    server = Server("llamacpp", "http://x", "m", ("llama-server",), {}, 7, 1.5, run.path / "log", started_at, "/health")
    return Endpoint("llamacpp", "http://x", "m", "b1", server, sha256=sha256_file(run.gguf))


@pytest.fixture
def asked(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that were asked."""
    prompts: list[str] = []

    async def ask_all(_: object, rows: list[HeldOut], *__: object) -> tuple[list[Answer], float]:
        prompts.extend(row.prompt for row in rows)
        return [Answer(row.prompt, "stop") for row in rows], 1.0

    async def parity(*_: object) -> Check:
        return Check("llamacpp.prompt_parity", "passed", "equal")

    monkeypatch.setattr(module, "ask_all", ask_all)
    monkeypatch.setattr(module, "parity", parity)
    monkeypatch.setattr(LlamaCpp, "loaded_file", lambda *_: str(run.gguf))
    return prompts


def _material(rows: list[HeldOut] = ROWS) -> Material:
    answers = [Answer(row.expected, "stop") for row in rows]
    return Material(rows, [(row.prompt, [1]) for row in rows], answers, answers, {}, 8, None)  # type: ignore[arg-type]


def _say(
    endpoint: Endpoint, run: RunFolder, rows: tuple[int, ...], known: Evidence | None = None, held_out: list[HeldOut] = ROWS
) -> Evidence:
    return wait_for(interrogate(endpoint, run, _material(held_out), Plan(rows, known=known)))


def test_what_the_same_server_answered_is_not_asked_again(run: RunFolder, endpoint: Endpoint, asked: list[str]) -> None:
    before = replace(_say(endpoint, run, (0, 1, 2)), at="earlier")
    asked.clear()
    now = _say(endpoint, run, (1, 3), before)
    assert asked == ["3"]
    assert now.rows == (0, 1, 2, 3)
    assert [answer.text for answer in now.answers] == ["0", "1", "2", "3"]
    assert (now.origin["answers_by"], now.origin["answers_at"], before.origin["answers_by"]) == ("verify", "earlier", "certify")


def _other_process(endpoint: Endpoint, _: RunFolder) -> Endpoint:
    assert endpoint.server
    return replace(endpoint, server=replace(endpoint.server, pid=8))


def _file_changed(endpoint: Endpoint, run: RunFolder) -> Endpoint:
    run.gguf.write_bytes(b"another")
    return endpoint


CHANGES: dict[str, Callable[[Endpoint, RunFolder], Endpoint]] = {
    "another process": _other_process,
    "somebody else's server": lambda endpoint, _: replace(endpoint, server=None),
    "another file when it started": lambda endpoint, _: replace(endpoint, sha256="0" * 64),
    "a file changed in between": _file_changed,
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_server_or_file_is_asked_anew(run: RunFolder, endpoint: Endpoint, asked: list[str], name: str) -> None:
    before = _say(endpoint, run, (0, 1))
    asked.clear()
    now = _say(CHANGES[name](endpoint, run), run, (0, 1), before)
    assert (asked, now.reused) == (["0", "1"], None)


def test_other_prompts_are_asked_anew(run: RunFolder, endpoint: Endpoint, asked: list[str]) -> None:
    before = _say(endpoint, run, (0, 1))
    for rows in (ROWS[::-1], ROWS[:1]):
        asked.clear()
        _say(endpoint, run, (0,), before, rows)
        assert len(asked) == 1


def test_a_server_that_does_not_tell_its_file_is_asked_anew(
    run: RunFolder, endpoint: Endpoint, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaCpp, "loaded_file", lambda *_: None)
    before = _say(endpoint, run, (0,))
    assert _say(endpoint, run, (0,), before).reused is None


def test_evidence_is_read_only_as_it_was_written_down(run: RunFolder, endpoint: Endpoint, asked: list[str]) -> None:
    said = _say(endpoint, run, (0, 1))
    assert restored(stored({"llamacpp": said})) == {"llamacpp": said}
    assert read_evidence(run) == {}
    write_json(run.evidence, stored({"llamacpp": said}))
    assert read_evidence(run) == {}  # no verification vouches for it
    Manifest(run.manifest).record("verify", {}, [run.evidence], {"passed": True}, 1)
    assert read_evidence(run) == {"llamacpp": said}
    run.evidence.write_text(run.evidence.read_text().replace('"0"', '"1"'))
    assert read_evidence(run) == {}


class _Sampling:
    """A server whose sampled tool call of row 1 cannot be read."""

    async def plain(self, row: HeldOut) -> tuple[Answer, int]:
        if row.prompt == "1":
            raise Refused("ollama: answered 500", 500, "invalid tool call")
        return Answer(row.prompt, "stop"), 1


def test_a_refused_row_of_a_plain_client_is_counted_and_fails_nothing(asked: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    plain, refused = wait_for(module._plain(_Sampling(), _material(), range(3), 2))  # type: ignore[arg-type]
    assert (list(plain), list(refused)) == ([0, 2], [1])
    right = tuple(Answer(str(i), "stop") for i in range(3))
    for rows, status, words in ((plain, "warning", "1 of 3 rows got no answer"), ({}, "skipped", "invalid tool call")):
        features = Features((), right[0], (), (), plain=rows, plain_refused=refused)
        said = Evidence("ollama", "1", "Q8_0", (0, 1, 2), right, features=features)
        assert restored(stored({"ollama": said})) == {"ollama": said}
        check = plain_client(said, _material())
        assert check.status == status and words in check.figure
