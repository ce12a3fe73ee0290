"""What engines sample with where a request names nothing: the facts declared, and the flags that set it for a run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest
from small_run import smollm_gguf

from pipeline import engines
from pipeline.engines.llamacpp_server import parameters, parser
from pipeline.machine.named import hardware_from
from pipeline.model.model import Model
from pipeline.modelfile.grammar import parse_modelfile
from pipeline.modelfile.modelfile import build_modelfile
from pipeline.net.chat import SAMPLING, greedy, plain
from pipeline.planning.plan import Plan, Request
from pipeline.prompts.chat import ChatTemplate
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.serve import server, start
from pipeline.serve.start import Options, Target, request_for

DOCS = Path(__file__).parents[3] / "docs"
SET = {"vllm": ["--override-generation-config", '{"temperature": 0, "top_p": 1}'], "llamacpp": ["--temp", "0", "--top-p", "1"]}


def _plan(engine: str, machine: str, sampling: Mapping[str, float], **overrides: str) -> Plan:
    request = Request(Model.from_shape("granite-4.0-350m"), hardware_from(machine), "serve", "m", overrides, sampling=sampling)
    return engines.get(engine).plan(request)


def test_one_source_of_a_runs_settings(embedded: ChatTemplate) -> None:
    modelfile = parse_modelfile(build_modelfile(gguf="m.gguf", template=embedded, parameters={"num_ctx": 512}))
    assert {name: [f"{value:g}"] for name, value in SAMPLING.items()}.items() <= modelfile.parameters.items()
    body = greedy("m", [], 1)
    assert body["temperature"] == SAMPLING["temperature"]
    assert plain(body | SAMPLING) == {"model": "m", "messages": [], "max_tokens": 1}


@pytest.mark.parametrize("machine", ["cpu-2c-24g", "l4"])
@pytest.mark.parametrize("engine", SET)
def test_a_run_is_served_with_its_settings_as_the_default_and_another_model_is_not(engine: str, machine: str) -> None:
    words = _plan(engine, machine, SAMPLING).arguments
    at = words.index(SET[engine][0])
    assert words[at : at + len(SET[engine])] == SET[engine]
    assert not set(SET[engine][::2]) & set(_plan(engine, machine, {}).arguments)


def test_what_the_user_sets_wins() -> None:
    set_by_user = {"vllm": ("override-generation-config", '{"temperature": 0.7}'), "llamacpp": ("temperature", "0.7")}
    for engine, (name, value) in set_by_user.items():
        plan = _plan(engine, "cpu-2c-24g", SAMPLING, **{name: value})
        flag = next(flag for flag in plan.flags if flag.name == SET[engine][0])
        assert (flag.value, flag.source) == (value, "user")
        assert "--temperature" not in plan.arguments


def test_only_a_run_s_model_is_given_a_run_s_settings(base: Path, tmp_path: Path) -> None:
    target = Target(base, "m", tmp_path)
    assert request_for(target, Options(), hardware_from("cpu-2c-24g")).sampling == {}
    target.manifest.write_text("{}")
    assert request_for(target, Options(), hardware_from("cpu-2c-24g")).sampling == SAMPLING


def test_the_page_has_the_declared_table() -> None:
    rows = re.findall(r"^\| (.+) \|$", (DOCS / "operating.md").read_text(encoding="utf-8"), re.MULTILINE)
    table = {cells[0]: cells[1:] for cells in (row.split(" | ") for row in rows)}
    for engine in engines.every():
        known = engine.defaults
        figures = (known.temperature, known.top_p, known.top_k, known.repetition_penalty)
        assert table[engine.title][:4] == ["?" if figure is None else f"{figure:g}" for figure in figures], engine.name
        assert table[engine.title][4].startswith(known.source), engine.name


def test_every_example_that_asks_for_a_chat_sends_a_runs_settings() -> None:
    """OpenAI's and LangChain's clients, curl; BeeAI's model is made with them (:mod:`pipeline.integrations.beeai`)."""
    pages = [*DOCS.glob("*.md"), DOCS.parent / "README.md"]
    blocks = [b for page in pages for b in re.findall(r"```[a-z]*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)]
    asking = [b for b in blocks if re.search(r"chat\.completions|ChatOpenAI\(|/v1/chat/completions", b)]
    assert len(asking) >= 3
    for block in asking:
        for name, value in SAMPLING.items():
            assert re.search(rf'\b{name}"?[=:] ?{value:g}\b', block), block


def test_llama_cpp_s_defaults_are_those_of_the_wheel() -> None:
    xllamacpp = pytest.importorskip("xllamacpp", reason="the wheel is not installed")
    sampling, known = xllamacpp.CommonParams().sampling, engines.get("llamacpp").defaults
    told = (known.temperature, known.top_p, known.top_k, known.repetition_penalty)
    assert (sampling.temp, sampling.top_p, sampling.top_k, sampling.penalty_repeat) == pytest.approx(told)


def test_the_wheel_s_server_takes_them_and_they_win_over_the_file_s() -> None:
    pytest.importorskip("xllamacpp", reason="the wheel is not installed")
    words = ["--model", "m.gguf", "--port", "1", "-c", "512"]
    given = parameters(parser().parse_args([*words, *SET["llamacpp"]])).sampling
    assert (given.temp, given.top_p, given.user_sampling_config) == (0.0, 1.0, 1 << 6 | 1 << 2)
    own = parameters(parser().parse_args(words)).sampling
    assert (round(own.temp, 3), own.user_sampling_config) == (0.8, 0)


@pytest.mark.slow
def test_vllm_s_defaults_are_those_of_its_api() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    code = (
        "import json; from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest as C; "
        "print('FOUND' + json.dumps(C.__private_attributes__['_DEFAULT_SAMPLING_PARAMS'].default))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    said = json.loads(done.stdout.split("FOUND")[1])
    known = engines.get("vllm").defaults
    told = (known.temperature, known.top_p, known.top_k, known.repetition_penalty)
    assert (said["temperature"], said["top_p"], said["top_k"], said["repetition_penalty"]) == told


@pytest.mark.slow
def test_a_real_llama_server_started_for_a_run_answers_a_plain_client_as_one_that_asks_for_greedy(tmp_path: Path) -> None:
    gguf = smollm_gguf()
    target = Target(gguf, "smollm", tmp_path)
    asked = greedy("smollm", [{"role": "user", "content": "Tell me a story about a fox."}], 24)

    def answers(run: RunFolder | None) -> tuple[str, set[str]]:
        """The greedy answer, and those to four plain requests."""
        if run:
            Manifest(target.manifest).append("starts", {})
        endpoint = start.serve("llamacpp", target, Options("verify", owner=os.getpid(), overrides={"ctx-size": "2048"}), print)
        assert endpoint.server is not None
        try:
            with httpx.Client(base_url=endpoint.url, timeout=120) as client:
                said = [client.post("/v1/chat/completions", json=body).json() for body in (asked, *[plain(asked)] * 4)]
        finally:
            server.stop(endpoint.server)
        texts = [answer["choices"][0]["message"]["content"] for answer in said]
        return texts[0], set(texts[1:])

    best, others = answers(None)
    assert others != {best}
    best, others = answers(RunFolder("x", tmp_path))
    assert others == {best}
