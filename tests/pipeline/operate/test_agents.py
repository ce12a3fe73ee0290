from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from small_run import make_run
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.commands import serve as serving_verb
from pipeline.errors import InputError
from pipeline.operate.agents import Agents
from pipeline.runs.folder import RunFolder


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "agents.yaml"
    path.write_text(text)
    return path


def test_the_example_in_the_docstring_loads(tmp_path: Path) -> None:
    import pipeline.operate.agents as module

    assert module.__doc__ is not None
    agents = Agents.load(_write(tmp_path, module.__doc__.split("\n\n", 1)[1]))
    assert agents.get("triage-gpu").model_dump() == {"run": "generic", "backend": "vllm", "model": "granite-soc-specialist"}
    assert agents.prices == {"openai": 0.6}
    assert agents.allow_fallback == {"granite-soc-specialist": ["gpt-oss-20b"]}


def test_no_file_is_no_agents(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no agent 'x'"):
        Agents.load(tmp_path / "none").get("x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("agents: {a: {runs: x}}", "agents.a.runs"),
        ("agents: {a: {run: x, backend: tgi}}", "agents.a.backend"),
        ("agents: [", "expected"),
        ("agnts: {}", "agnts"),
    ],
)
def test_a_wrong_file_names_the_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        Agents.load(_write(tmp_path, text))
    assert said in str(caught.value)


def test_a_run_name_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not usable"):
        Agents.load(_write(tmp_path, "agents: {a: {run: ../x}}"))


def test_every_verb_that_takes_a_run_takes_an_agent() -> None:
    taking, with_agent = set(), set()
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        options = {word for parameter in command.params for word in parameter.opts}
        taking |= {name} if "--run" in options else set()
        with_agent |= {name} if "--agent" in options else set()
    assert {"serve", "stop", "status", "verify", "report", "plan", "modelfile", "train", "export", "run"} <= taking
    assert taking <= with_agent


def test_an_agent_stands_for_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTS_FILE", str(_write(tmp_path, "agents: {triage: {run: mine}}")))
    words = ["status", "--agent", "triage", "--output", str(tmp_path), "--json"]
    assert json.loads(CliRunner().invoke(app, words).stdout) == {"run": "mine", "servers": []}
    refused = CliRunner().invoke(app, [*words, "--run", "other"]).exception
    assert isinstance(refused, InputError)
    assert "agent triage is run mine, --run says other" in str(refused)


TWO = "agents: {gpu: {run: mine, backend: llamacpp, model: x}, bare: {run: mine}}"


def _refused(words: list[str]) -> str:
    return str(CliRunner().invoke(app, words).exception)


def test_an_agents_backend_and_model_are_what_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTS_FILE", str(_write(tmp_path, TWO)))
    monkeypatch.setenv("LLM_BACKEND", "vllm")
    asked: list[tuple[str, str, Path]] = []
    monkeypatch.setattr(
        serving_verb, "run_server", lambda engine, target, *_, **__: asked.append((engine, target.name, target.model))
    )
    run = make_run(RunFolder("mine", tmp_path))
    words = ["serve", "--output", str(tmp_path), "--agent", "gpu"]
    for more in ([], ["llamacpp"], ["--served-model-name", "x"]):
        assert CliRunner().invoke(app, [*words[:1], *more, *words[1:]]).exception is None
    assert asked == [("llamacpp", "x", run.gguf)] * 3
    assert "--agent gpu has backend llamacpp, engine says vllm" in _refused(["serve", "vllm", *words[1:]])
    assert "--agent gpu has model x, --served-model-name says y" in _refused([*words, "--served-model-name", "y"])
    assert len(asked) == 3


def test_the_other_verbs_take_the_agents_backend_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTS_FILE", str(_write(tmp_path, TWO)))
    words = ["--agent", "gpu", "--output", str(tmp_path)]
    assert "run mine has no llamacpp log" in _refused(["logs", *words])
    assert "--agent gpu has backend llamacpp, service says vllm" in _refused(["systemd", "vllm", *words])
    assert "run mine has no server log" in _refused(["logs", "--agent", "bare", "--output", str(tmp_path)])
