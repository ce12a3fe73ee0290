"""What one backend said while it was up: prompts it was fed, answers, next-token distributions, the file it serves.

A backend is asked here and nowhere else. ``verify`` judges its evidence into checks, ``certify`` into links; what verify asked
of a server that is still the same one is not asked again.
"""

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from pydantic import TypeAdapter

from pipeline import engines
from pipeline.engines.base import Engine
from pipeline.errors import Interrupted, ModelError, PipelineError
from pipeline.model.gguf import GgufComparison, compare_gguf
from pipeline.model.tokenizer import Tokenizer
from pipeline.modelfile.modelfile import own_system, read_modelfile
from pipeline.net.chat import Streamed
from pipeline.net.client import open_client
from pipeline.net.loopback import is_local
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.conversation import Prompt, load_suite
from pipeline.prompts.renderers import render_chat
from pipeline.report.check import Check
from pipeline.runs.files import read_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import HashCache, sha256_json, sha256_tree
from pipeline.runs.manifest import Manifest
from pipeline.runs.text import masked, relative
from pipeline.serve.artefacts import written_after
from pipeline.serve.start import Endpoint
from pipeline.verify.distributions import Reference, fold
from pipeline.verify.material import Material
from pipeline.verify.prober import Prober, ask_all, opened, parity, with_reasons
from pipeline.verify.probes import injection, structured_output, tool_call
from pipeline.verify.score import Answer, HeldOut

_CONCURRENCY = 32
_STREAMED = 4
# rows that are asked once more as a client asks that names no sampling settings
PLAIN = 16


@dataclass(frozen=True)
class Features:
    """What verify asks beside the held-out prompts: listing, a first answer, attacks, schemas, tool calls, streams.

    ``streamed`` are the numbers of the rows whose answers were streamed (empty: the first ones), ``alone`` their answers unstreamed and
    asked alone too: another batch may tip a near-tie (empty: an older version did not ask). ``plain`` are answers to requests
    without sampling settings, by the number of their row; ``plain_refused`` says of the other rows asked so why they have none.
    """

    listed: tuple[str, ...]
    first: Answer
    probed: tuple[Check, ...]
    streams: tuple[Streamed, ...]
    streamed: tuple[int, ...] = ()
    alone: tuple[Answer, ...] = ()
    plain: Mapping[int, Answer] = field(default_factory=dict)
    plain_refused: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """Everything that one backend is judged on; ``problems`` says what it could not be asked. Paths of the run are relative to it.

    ``loaded_sha256`` is the file's hash when the server had started, ``file_newer`` that the file was written after that.
    ``process`` and ``asked`` tell the server and the prompts apart from others; ``reused`` says when the answers were given,
    where an earlier interrogation asked for them. Of an engine that loads a copy of its own making, ``copy`` compares it with the
    run's file; ``unread`` says why a file that the engine names is not compared. Where the adapter was served unmerged, ``file`` is
    the adapter, and ``base_sha256`` the hash of the base it is applied to ("" where that cannot be read here). ``as_text``: tokens were told by their text, and
    ``unsaid`` positions could not be asked so.
    """

    engine: str
    version: str | None
    dtype: str
    rows: tuple[int, ...]
    answers: tuple[Answer, ...]
    parity: Check | None = None
    probes: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    controls: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    file: str | None = None
    file_sha256: str | None = None
    tokenised: tuple[int, int] | None = None
    seconds: float = 0.0
    problems: Mapping[str, str] = field(default_factory=dict)
    loaded_sha256: str | None = None
    file_newer: bool = False
    features: Features | None = None
    model: str = ""
    launched: Mapping[str, Any] = field(default_factory=dict)
    tokens_per_second: float = 0.0
    at: str = ""
    reused: str | None = None
    process: tuple[int, float] | None = None
    asked: str = ""
    copy: GgufComparison | None = None
    unread: str = ""
    as_text: bool = False
    unsaid: int = 0
    base_sha256: str | None = None

    def answer_to(self, row: int) -> Answer | None:
        """The answer to a held-out row, None when it was not asked."""
        return self.answers[self.rows.index(row)] if row in self.rows else None

    @property
    def origin(self) -> dict[str, Any]:
        """Which server said this and when, for the certificate."""
        stated = {"at": self.at, "answers_at": self.reused or self.at, "prompts": len(self.rows), "version": self.version}
        return {**stated, "answers_by": "verify" if self.reused else "certify", "loaded_sha256": self.loaded_sha256}

    def speaks_for(self, endpoint: Endpoint, run: RunFolder, file: str | None, material: Material) -> bool:
        """Whether this endpoint would answer these prompts as it did then: the same process, file and prompts.

        Only of a server from here that tells which file it loaded: another may have been given a new model meanwhile.
        """
        if file is None or endpoint.server is None or self.process != _process(endpoint):
            return False
        if self.loaded_sha256 is None or self.loaded_sha256 != endpoint.sha256:
            return False
        if self.copy is not None:  # named by its own hash
            same = self.file == relative(file, run.path) and not self.copy.problems
        else:
            # remembered hashes are enough here: the file is read whole once its server has been asked
            same = Path(file).exists() and HashCache(run.path).tree(Path(file)) == self.loaded_sha256
        if not same:
            return False
        return max(self.rows, default=0) < len(material.rows) and self.asked == _asked(material, self.rows)


@dataclass(frozen=True)
class Plan:
    """How much to ask: numbers of held-out rows, next-token positions of each row and control of ``reference``, features.

    ``known`` is what an earlier interrogation found, of which answers and parity are taken where it speaks for this server.
    """

    rows: tuple[int, ...]
    positions: int = 0
    reference: Reference | None = None
    features: bool = False
    known: Evidence | None = None

    def probes(self, rows: Sequence[int]) -> list[int]:
        """Numbers of the probes to ask: the first ``positions`` of each row that is asked (all, when there are fewer)."""
        return [i for i, row in enumerate(rows) if rows[:i].count(row) < self.positions]


async def interrogate(
    endpoint: Endpoint, run: RunFolder, material: Material, plan: Plan, progress: Callable[[str], None] = lambda _: None
) -> Evidence:
    """Question one endpoint; what it cannot answer is noted, not raised, except answers to chats (EngineError)."""
    engine, begun, at = engines.get(endpoint.engine), time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    system = own_system(read_modelfile(run.modelfile)) if engine.creates_model and run.modelfile.is_file() else ""
    with open_client(endpoint.url, endpoint.api_key) as client:
        file = engine.loaded_file(client, endpoint.model)
        file = None if file == endpoint.model else file
        base = engine.loaded_file(client, endpoint.base) if endpoint.base else None
        known = plan.known if plan.known and plan.known.speaks_for(endpoint, run, file, material) else None
        rows = tuple(row for row in plan.rows if known is None or row not in known.rows)
        said = await _chats(endpoint, material, rows, plan.features, system, progress)
        if known:
            now, rows = said["parity"], known.rows + rows
            # of two sets of rows, what is wrong with either
            both = now if known.parity is None or (now and now.status != "passed") else known.parity
            said |= {"answers": known.answers + said["answers"], "parity": both, "reused": known.at}
        if plan.reference:
            said |= _distributions(client, endpoint, plan, plan.reference, material.yardstick.tokenizer)
            said["tokenised"] = _tokenised(client, engine, run, [material.prompts[i][0] for i in plan.rows])
    if file:
        said |= _loaded(Path(file), endpoint, engine, run)
    if endpoint.base:
        there = Path(base or "")
        said["base_sha256"] = sha256_tree(there) if base and is_local(endpoint.url) and there.is_dir() else ""
    return Evidence(
        engine=endpoint.engine,
        version=endpoint.version,
        dtype=engine.served_dtype(endpoint.server.argv if endpoint.server else ()),
        rows=rows,
        file=relative(file, run.path),
        loaded_sha256=endpoint.sha256,
        model=endpoint.model,
        launched=launched(endpoint, run),
        process=_process(endpoint),
        asked=_asked(material, rows),
        at=at,
        seconds=round(time.monotonic() - begun, 1),
        **said,
    )


def launched(endpoint: Endpoint, run: RunFolder) -> dict[str, Any]:
    """Which server it was and how it was started, as the report has it; paths below the run folder are relative to it."""
    plan, process = endpoint.plan or {}, endpoint.server
    said = {
        "engine_version": endpoint.version,
        "argv": list(process.argv) if process else None,
        "env": process.env if process else None,
        "sha256": endpoint.sha256,
        "ready_seconds": endpoint.ready_seconds,
        "reasons": plan.get("reasons", []),
        "memory_gib": plan.get("memory_gib"),
        "memory_measured_gib": round(process.memory_gib(), 2) if process else None,
    }
    return {name: relative(value, run.path) for name, value in said.items()}


async def _chats(
    endpoint: Endpoint, material: Material, numbers: Sequence[int], more: bool, system: str, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Answers and parity of held-out prompts (``system``: the engine's own message), and ``more``: what else chats show."""
    rows, count, features = [material.rows[i] for i in numbers], 0, None
    progress(f"{endpoint.engine}: {len(rows)} prompts" if rows else f"{endpoint.engine}: asked by verify already")

    def done() -> None:
        nonlocal count
        count += 1
        if count % 20 == 0 or count == len(rows):
            progress(f"{endpoint.engine}: {count} of {len(rows)} prompts answered")

    async with Prober(endpoint, material.max_tokens, material.yardstick) as prober:
        if more:
            listed, (first, _) = await prober.models(), await prober.chat(rows[0])
            probed = [await injection(prober, material.yardstick), await structured_output(prober, rows[0])]
            probed.append(await tool_call(prober, material.yardstick.template.source))
            streams = await _streams(prober, material, numbers)
            alone = tuple([(await prober.chat(material.rows[i]))[0] for i in streams])
            features = Features(tuple(listed), first, tuple(probed), tuple(streams.values()), tuple(streams), alone)
        same = await parity(prober, rows, [material.prompts[i] for i in numbers]) if rows else None
        same = same and await opened(same, prober, system)
        planned = int((endpoint.plan or {}).get("max_num_seqs") or _CONCURRENCY)
        together = max(1, min(_CONCURRENCY, planned))
        answers, speed = await ask_all(prober.chat, rows, together, done)
        if features:
            asked = [number for number in numbers if not prober.obstacle(material.rows[number])][:PLAIN]
            plain, refused = await _plain(prober, material, asked, together)
            features = replace(features, plain=plain, plain_refused=refused)
        same = same and with_reasons(same, prober)
    return {"answers": tuple(answers), "parity": same, "features": features, "tokens_per_second": speed}


async def _plain(
    prober: Prober, material: Material, numbers: Sequence[int], together: int
) -> tuple[dict[int, Answer], dict[int, str]]:
    """Answers to requests without sampling settings by the number of their row, and of rows without one why: no failure."""

    async def ask(row: HeldOut) -> tuple[Answer | str, int]:
        try:
            return await prober.plain(row)
        except Interrupted:
            raise
        except PipelineError as error:  # a sampled tool call that its engine cannot read is a 500
            return str(error), 0

    said, _ = await ask_all(ask, [material.rows[i] for i in numbers], together, lambda: None)
    every = list(zip(numbers, said, strict=True))
    return {i: one for i, one in every if isinstance(one, Answer)}, {i: one for i, one in every if isinstance(one, str)}


async def _streams(prober: Prober, material: Material, numbers: Sequence[int]) -> dict[int, Streamed]:
    """The first answers, streamed, by the number of their row."""
    found: dict[int, Streamed] = {}
    for number in numbers:
        if len(found) < _STREAMED and (streamed := await prober.stream(material.rows[number])):
            found[number] = streamed
    return found


def _loaded(file: Path, endpoint: Endpoint, engine: Engine, run: RunFolder) -> dict[str, Any]:
    """What there is to say of the file that a server names: its hash, and its content where it is a copy of the run's."""
    if not is_local(endpoint.url):
        return {"unread": f"{engine.title} runs on another machine"}
    try:
        file.stat()
        sha256 = sha256_tree(file)
        named = file.name.removeprefix("sha256-")
        if engine.copies_file and sha256 != named:
            return {"unread": f"the file of that name here is another one ({sha256[:12]})"}
        copy = compare_gguf(run.gguf, file) if engine.copies_file else None
        # a copy is made after its server has started
        newer = not engine.copies_file and endpoint.server is not None and written_since(file, endpoint.server.started_at)
    except OSError as error:
        return {"unread": f"{error.strerror or error}".lower()}
    except ModelError as error:
        return {"unread": error.message}
    return {"file_sha256": sha256, "file_newer": newer, "copy": copy}


def _distributions(
    client: httpx.Client, endpoint: Endpoint, plan: Plan, reference: Reference, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Next-token distributions at held-out positions of the rows asked and at the controls'; or why there are none."""
    engine, held_out, controls = engines.get(endpoint.engine), reference.held_out, reference.controls
    asked = {
        "probes": [(i, held_out[i].ids) for i in plan.probes([p.row for p in held_out]) if held_out[i].row in plan.rows],
        "controls": [(i, controls[i].ids) for i in plan.probes([p.row for p in controls])],
    }
    tops: dict[str, Any] = {"as_text": engine.tells_texts, "unsaid": 0}
    alike = tokenizer.alike if engine.tells_texts else {}
    try:
        for name, every in asked.items():
            prompts = [(i, Prompt(tokenizer.decode(ids), ids)) for i, ids in every]
            # an answer cut between two tokens may be other tokens when it is read again
            chosen = [
                (i, one) for i, one in prompts if not engine.tells_texts or tuple(tokenizer.encode(one.text or "")) == one.ids
            ]
            tops["unsaid"] += len(every) - len(chosen)
            said = engine.next_tokens(client, endpoint.model, [one for _, one in chosen], tokenizer)
            tops[name] = {i: fold(top, alike) for (i, _), top in zip(chosen, said, strict=True)}
    except PipelineError as error:
        tops["problems"] = {"logprobs": error.message}
    return tops


def _process(endpoint: Endpoint) -> tuple[int, float] | None:
    return (endpoint.server.pid, endpoint.server.started) if endpoint.server else None


def _asked(material: Material, rows: Sequence[int]) -> str:
    """Hash of the prompts and of how long an answer may be."""
    # before calls were told apart, such rows were asked without them
    told = {i: ["calls"] if material.rows[i].marks or material.rows[i].documents else [] for i in rows}
    return sha256_json([material.max_tokens, [[i, *material.prompts[i], *told[i]] for i in rows]])


_STORED = TypeAdapter(dict[str, Evidence])


def stored(evidence: Mapping[str, Evidence]) -> Any:
    """Evidence by backend as plain JSON, without secrets."""
    return masked(_STORED.dump_python(dict(evidence), mode="json"))


def restored(data: Any) -> dict[str, Evidence]:
    """What :func:`stored` made; nothing when it is something else."""
    try:
        return _STORED.validate_json(json.dumps(data))
    except ValueError:
        return {}


def read_evidence(run: RunFolder) -> dict[str, Evidence]:
    """What the run's last verification collected, by backend; empty unless it is as it was written down."""
    stage = Manifest(run.manifest).stage("verify")
    seal = stage.artefacts.get(run.evidence.relative_to(run.path).as_posix()) if stage and stage.intact else None
    if seal is None or not run.evidence.is_file() or sha256_tree(run.evidence) != seal.sha256:
        return {}
    return restored(read_json(run.evidence))


def written_since(path: Path, started_at: str) -> bool:
    """Whether a file, or one in a folder, was written after a server's start (ISO, whole seconds); False when it is not here."""
    return written_after(path, datetime.fromisoformat(started_at).timestamp() + 1)


def _tokenised(client: httpx.Client, engine: Engine, run: RunFolder, texts: Sequence[str]) -> tuple[int, int] | None:
    """The engine's own tokenizer on the conversation suite and the prompts: how many texts give the tokenizer's IDs, of how many."""
    if not texts or engine.tokenize(client, texts[0]) is None:
        return None
    tokenizer, template = Tokenizer(run.merged), ChatTemplate.from_folder(run.merged)
    every = list(texts)
    for conversation in load_suite():
        with contextlib.suppress(ModelError):  # the template refuses it
            every.append(render_chat(template, conversation, datetime(2026, 1, 1)))
    return sum(engine.tokenize(client, text) == tokenizer.encode(text) for text in every), len(every)
