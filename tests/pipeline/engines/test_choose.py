from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from pipeline import engines
from pipeline.cli import app
from pipeline.engines.choose import PURPOSES, recommend
from pipeline.errors import InputError
from pipeline.machine.hardware import Cpu, Hardware
from pipeline.machine.named import hardware_from


@pytest.mark.parametrize(
    ("machine", "users", "purpose", "backend"),
    [
        ("cpu-2c-24g", 1, "serve", "llamacpp"),
        ("cpu-2c-24g", 50, "serve", "llamacpp"),
        ("cpu-16c-64g-bf16", 1, "develop", "llamacpp"),
        ("cpu-16c-64g-bf16", 50, "serve", "vllm"),
        ("cpu-16c-64g-bf16", 1, "batch", "vllm"),
        ("rtx4060", 1, "serve", "llamacpp"),
        ("2xa10g", 1, "try", "llamacpp"),
        ("2xa10g", 1, "serve", "vllm"),
        ("h100", 200, "batch", "vllm"),
    ],
)
def test_the_answer_by_machine_users_and_purpose(machine: str, users: int, purpose: str, backend: str) -> None:
    answer = recommend(hardware_from(machine), users, purpose)
    assert answer.backend == backend
    assert answer.command.startswith(f"granite-pipeline serve {backend}")
    assert len(answer.reasons) >= 2


def test_a_machine_too_small_is_sent_elsewhere() -> None:
    answer = recommend(Hardware(Cpu(1), 1.0, 0.8), 1, "try")
    assert answer.backend == "openai"
    assert "OPENAI_COMPATIBLE_BASE_URL" in answer.command


@pytest.mark.parametrize("purpose", PURPOSES)
def test_every_backend_is_chosen_or_argued_against(purpose: str) -> None:
    answer = recommend(hardware_from("l4"), 3, purpose)
    assert {answer.backend, *answer.others} == set(engines.NAMES)


def test_an_unknown_purpose_is_refused() -> None:
    with pytest.raises(InputError, match="no purpose 'win'"):
        recommend(hardware_from("l4"), 1, "win")


def test_the_verb_prints_json() -> None:
    done = CliRunner().invoke(app, ["choose", "--hardware", "h100", "--users", "64", "--json"])
    assert json.loads(done.stdout)["backend"] == "vllm"
