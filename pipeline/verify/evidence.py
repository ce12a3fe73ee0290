"""What one backend said while it was up: prompts it was fed, answers, next-token distributions, the file it serves."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import httpx

from pipeline import engines
from pipeline.engines.base import Engine
from pipeline.errors import PipelineError
from pipeline.model.tokenizer import Tokenizer
from pipeline.report.check import Check
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_tree
from pipeline.serve.artefacts import written_after
from pipeline.serve.start import Endpoint
from pipeline.verify import checks
from pipeline.verify.distributions import Reference
from pipeline.verify.material import Material
from pipeline.verify.prober import Prober, ask_all
from pipeline.verify.score import Answer

_CONCURRENCY = 16


@dataclass(frozen=True)
class Plan:
    """How much to ask: rows (numbers of held-out rows) and next-token positions of each row and control."""

    rows: tuple[int, ...]
    positions: int

    def probes(self, rows: Sequence[int]) -> list[int]:
        """Numbers of the probes to ask: the first ``positions`` of each row that is asked (all, when there are fewer)."""
        taken: dict[int, int] = {}
        chosen = []
        for i, row in enumerate(rows):
            taken[row] = taken.get(row, 0) + 1
            if taken[row] <= self.positions:
                chosen.append(i)
        return chosen


@dataclass(frozen=True)
class Evidence:
    """Everything the links 3 to 6 are judged on, for one backend; ``problems`` says what it could not be asked.

    ``loaded_sha256`` is the file's hash when the server had started, ``file_newer`` that the file was written after that.
    """

    engine: str
    version: str | None
    dtype: str
    rows: tuple[int, ...]
    answers: tuple[Answer, ...]
    parity: Check | None
    probes: Mapping[int, Mapping[int, float]]
    controls: Mapping[int, Mapping[int, float]]
    file: str | None
    file_sha256: str | None
    tokenised: tuple[int, int] | None
    seconds: float
    problems: Mapping[str, str] = field(default_factory=dict)
    loaded_sha256: str | None = None
    file_newer: bool = False

    def answer_to(self, row: int) -> Answer | None:
        """The answer to a held-out row, None when it was not asked."""
        return self.answers[self.rows.index(row)] if row in self.rows else None


async def collect(endpoint: Endpoint, run: RunFolder, material: Material, reference: Reference, plan: Plan) -> Evidence:
    """Question one endpoint; what it cannot answer is noted, not raised, except answers to chats (EngineError)."""
    begun, problems, engine = time.monotonic(), {}, engines.get(endpoint.engine)
    rows = [material.rows[i] for i in plan.rows]
    async with Prober(endpoint, material.max_tokens) as prober:
        answers, _ = await ask_all(prober, rows, _CONCURRENCY, lambda: None)
        parity = await checks.parity(prober, rows, [material.prompts[i] for i in plan.rows])
    with httpx.Client(base_url=endpoint.url, headers=endpoint.headers, timeout=300) as client:
        chosen = plan.probes([probe.row for probe in reference.held_out])
        chosen = [i for i in chosen if reference.held_out[i].row in plan.rows]
        controls = plan.probes([probe.row for probe in reference.controls])
        tops: dict[str, dict[int, dict[int, float]]] = {"probes": {}, "controls": {}}
        try:
            for name, numbers, probes in (("probes", chosen, reference.held_out), ("controls", controls, reference.controls)):
                found = engine.next_tokens(client, endpoint.model, [probes[i].ids for i in numbers])
                tops[name] = dict(zip(numbers, found, strict=True))
        except PipelineError as error:
            problems["logprobs"] = error.message
        file = engine.loaded_file(client, endpoint.model)
        file = None if file == endpoint.model else file
        tokenised = _tokenised(client, engine, run, [material.prompts[i][0] for i in plan.rows])
    sha256 = sha256_tree(Path(file)) if file and Path(file).exists() else None
    return Evidence(
        endpoint.engine, endpoint.version, engine.served_dtype(endpoint.server.argv if endpoint.server else ()), plan.rows, tuple(answers), parity, tops["probes"], tops["controls"],
        file, sha256, tokenised, round(time.monotonic() - begun, 1), problems, endpoint.sha256,
        written_since(Path(file), endpoint.server.started_at) if file and endpoint.server else False,
    )  # fmt: skip


def written_since(path: Path, started_at: str) -> bool:
    """Whether a file, or one in a folder, was written after a server's start (ISO, whole seconds); False when it is not here."""
    return written_after(path, datetime.fromisoformat(started_at).timestamp() + 1)


def _tokenised(client: httpx.Client, engine: Engine, run: RunFolder, texts: Sequence[str]) -> tuple[int, int] | None:
    """The engine's own tokenizer on the conversation suite and the prompts: how many texts give the tokenizer's IDs, of how many."""
    if not texts or engine.tokenize(client, texts[0]) is None:
        return None
    tokenizer = Tokenizer(run.merged)
    every = [*suite_texts(run), *texts]
    return sum(engine.tokenize(client, text) == tokenizer.encode(text) for text in every), len(every)


def suite_texts(run: RunFolder) -> list[str]:
    """Every conversation of the suite as the run's chat template renders it; those it refuses are left out."""
    from pipeline.errors import ModelError
    from pipeline.prompts.chat import ChatTemplate
    from pipeline.prompts.conversation import load_suite
    from pipeline.prompts.renderers import render_chat

    template, texts = ChatTemplate.from_folder(run.merged), []
    for conversation in load_suite():
        try:
            texts.append(render_chat(template, conversation, datetime(2026, 1, 1)))
        except ModelError:
            continue
    return texts
