"""One real vLLM, one base model, the run's LoRA adapter under two names: each answers as the merged model does, the base does not."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import httpx
import pytest

from pipeline.engines.vllm.engine import Vllm
from pipeline.engines.vllm.lora import base_folder, parse
from pipeline.operate.registry import check_vllm_models
from pipeline.runs.folder import RunFolder
from pipeline.serve import artefacts, server, start
from pipeline.serve.start import Options, Target
from pipeline.verify.score import read_held_out

pytestmark = [pytest.mark.long, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def test_two_agents_on_one_base(tmp_path: Path) -> None:
    run = RunFolder("generic", ROOT / "training/output")
    if not run.heldout.is_file() or not Vllm().available().usable:
        pytest.skip("needs a finished run and vLLM: granite-pipeline run")
    loras = tuple(parse("triage=generic,second=generic", run.output))
    target = Target(base_folder(loras, None), "base", tmp_path)
    options = Options("verify", owner=os.getpid(), adapters=loras, overrides={"max-num-seqs": "8"})
    endpoint = start.serve("vllm", target, options, lambda _: None)
    assert endpoint.server is not None
    try:
        rows = read_held_out(run.heldout)[:4]
        told = {s.name: s for s in asyncio.run(check_vllm_models(endpoint.url, output=run.output))}
        answers = {name: [_ask(endpoint.url, name, row.messages) for row in rows] for name in ("base", "triage", "second")}
    finally:
        server.stop(endpoint.server)
    assert set(told) == {"base", "triage", "second"}
    assert told["triage"].artefact == artefacts.of_file(run.adapter)
    assert answers["triage"] == answers["second"]
    expected = [row.expected.strip() for row in rows]
    right = [sum(a.strip() == e for a, e in zip(answers[name], expected, strict=True)) for name in ("base", "triage")]
    assert right[0] == 0
    assert right[1] >= 3


def _ask(url: str, model: str, messages: object) -> str:
    body = {"model": model, "messages": messages, "max_tokens": 128, "temperature": 0}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])
