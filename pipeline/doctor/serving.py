"""Why an application does not get its answer: misspelt or contradicting settings, connection refused, a model that is not served,
an old backend still used, a server that died. Each examiner looks for one cause; nothing is changed.
"""

import contextlib
import difflib
import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from dotenv import dotenv_values

from pipeline import engines
from pipeline.config import ENV_FILE, Settings, root_url
from pipeline.deploy.compose import PROJECT
from pipeline.doctor.findings import Examiner, Facts, Finding, Status, worst_first
from pipeline.engines.base import Engine
from pipeline.net.client import wait_for
from pipeline.net.loopback import same_place
from pipeline.net.reach import get_json
from pipeline.operate import registry, services
from pipeline.operate.registry import ModelStatus
from pipeline.operate.services import start_logs
from pipeline.runs.text import mask, without_password
from pipeline.serve import records
from pipeline.serve.server import classify, end_of

_PREFIXES = ("LLM", "OPENAI", "GATEWAY", "AGENTS")
# what other programs read under the same prefixes, so not misspelt
_FOREIGN = frozenset({"VLLM_PYTHON", "SGLANG_PYTHON", "OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_BASE"})
_OURS = re.compile(r"(BASE_?URL|MODEL(_?NAME)?|API_?KEY|BACKEND|URL|MODEL_LEN|CTX_SIZE|PARALLEL|MEMORY_UTIL)$")
# how alike a name must be to be called misspelt; one that has a prefix and an ending of ours may be less so
_SIMILAR, _SIMILAR_WITH_PREFIX = 0.84, 0.6
_ASK_SECONDS = 3.0
_LONGEST_LOG = 1 << 20


def settings(facts: Facts) -> list[Finding]:
    """Contradictions, misspelt variables, and values that the environment hides."""
    return check(facts.settings, facts.env_file)


def check(settings: Settings, env_file: Path = ENV_FILE, environment: Mapping[str, str] | None = None) -> list[Finding]:
    """Everything that can be said without asking a server, worst first."""
    env = dict(os.environ if environment is None else environment)
    read = dotenv_values(env_file, encoding="utf-8-sig") if env_file.is_file() else {}
    in_file = {name: value or "" for name, value in read.items()}
    return worst_first([*contradictions(settings), *misspelt({**in_file, **env}), *hidden(in_file, env, env_file)])


def misspelt(names: Iterable[str]) -> Iterator[Finding]:
    """Variables that look like one of the documented ones and are not read by anything."""
    every = list(engines.every())
    known = [field.upper() for field in Settings.model_fields] + [v for engine in every for v in engine.variables()]
    read = _FOREIGN.union(known, *(engine.flags.variables for engine in every))
    prefixes = (*_PREFIXES, *(engine.prefix for engine in every))
    for name in sorted(name for name in names if name not in read):
        ours = name.startswith(prefixes) and _OURS.search(name)
        near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=_SIMILAR_WITH_PREFIX if ours else _SIMILAR)
        if near:
            yield _about(f"{name} is set but nothing reads it: did you mean {near[0]}?", "warn")


def contradictions(settings: Settings) -> Iterator[Finding]:
    """Settings that cannot both be meant; each finding names both sides."""
    chosen = settings.address()
    missing = [suffix for suffix, value in (("BASE_URL", chosen.base_url), ("MODEL", chosen.model)) if not value]
    if missing:
        variable = f"{engines.get(chosen.backend).prefix}_{missing[0]}"
        yield _about(f"LLM_BACKEND={chosen.backend}, but {variable} is empty: set {variable}")
    first_at: dict[str, Engine] = {}
    for engine in engines.every():
        url, variable = settings.address(engine.name).base_url, f"{engine.prefix}_BASE_URL"
        named = settings.named_servers(engine.name)
        usable = [url for url in named.values() if _is_url(url)]
        if any(not same_place(usable[0], url) for url in usable[1:]):
            said = " and ".join(f"{name}={without_password(url)}" for name, url in named.items())
            yield _about(f"{said} name two servers: {variable} is used; unset one of them")
        elif named and variable not in named and variable.lower() in settings.model_fields_set:
            used, there = next(iter(named.items()))
            if not same_place(url := engine.url(), there):
                words = f"{variable}={url} is the default and counts as unset: {used}={without_password(there)} is used"
                yield _about(words, "warn")
        url, variable = settings.address(engine.name).base_url, next(iter(named), variable)
        if url and not _is_url(url):
            yield _about(f"{variable}={without_password(url)} is not a URL: write http://host:port/v1")
        other = first_at.setdefault(root_url(url), engine)
        if url and other is not engine and "url" not in (engine.serves, other.serves):
            both = f"{other.prefix}_BASE_URL and {variable}"
            yield _about(f"{both} are both {without_password(root_url(url))}: two engines cannot answer there")


def hidden(in_file: Mapping[str, str], env: Mapping[str, str], env_file: Path) -> Iterator[Finding]:
    """Values in ``.env`` that the environment overrides: the usual reason why "LLM_BACKEND changed but the old one is used"."""
    for name, value in in_file.items():
        if name.lower() in Settings.model_fields and value and env.get(name) not in (None, "", value):
            words = f"{name}: the environment wins over {env_file}, so the value in the file is not used"
            yield _about(f"{words}; unset {name} to use it", "warn")


async def ask_selected(settings: Settings) -> list[Finding]:
    """What the selected backend, when it is up, has to say about the model name."""
    address = settings.address()
    if not address.base_url:
        return []
    statuses = await registry.check(address, timeout=2.0)
    served = [status.name for status in statuses if status.available]
    if not served:
        words = statuses[0].detail or "it serves no model"
        return [_about(f"the selected backend {address.backend} is not usable now: {words}", "warn")]
    found = served_contradiction(settings, served)
    return [found] if found else []


def served_contradiction(settings: Settings, served: list[str]) -> Finding | None:
    """The selected backend is up but does not serve the configured model."""
    chosen = settings.address()
    engine = engines.get(chosen.backend)
    names = [*served, *(name.removesuffix(engine.tag) for name in served)]
    for suffix, model in (("MODEL", chosen.model), ("ORCHESTRATOR_MODEL", chosen.orchestrator_model)):
        if model and model not in names:
            variable = f"{engine.prefix}_{suffix}"
            where = f"{chosen.backend} at {without_password(chosen.base_url)}"
            words = f"{variable}={model}, but {where} serves {', '.join(served) or 'nothing'}"
            return _about(f"{words}: set {variable} to one of these, or serve the run under that name")
    return None


def _about(words: str, status: Status = "fail") -> Finding:
    return Finding("settings", status, words)


def _is_url(value: str) -> bool:
    with contextlib.suppress(ValueError):
        parts = urlsplit(value.strip())
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    return False


def backend(facts: Facts) -> Iterator[Finding]:
    """Connection refused, a wrong key, a model that is not served - for the backend in LLM_BACKEND."""
    address = facts.settings.address()
    statuses = wait_for(registry.check(address, timeout=_ASK_SECONDS, output=facts.run.output))
    wanted = registry.same_model(statuses, address.model) or statuses[0]
    name = f"{address.backend} answers"
    if wanted.available:
        yield Finding(name, "ok", f"{wanted.name} at {without_password(address.base_url)}")
    else:
        # a server that is not started is no fault before anyone needs it
        status: Status = "warn" if wanted.kind == "refused" else "fail"
        yield Finding(name, status, wanted.detail, _remedy(facts, wanted))


def status_api(facts: Facts) -> Iterator[Finding]:
    """A status API that was started before LLM_BACKEND changed keeps the settings of its start; a gateway does not tell its own."""
    wanted = facts.settings.llm_backend
    running = records.running(services.folder(facts.run.output))
    for process in (process for process in running if process.engine == "status-api"):
        seen = wait_for(get_json(process.url, "/api/v1/inference/status", timeout=_ASK_SECONDS))
        used = seen.data.get("backend") if seen.ok and isinstance(seen.data, dict) else None
        if used and used != wanted:
            words = f"LLM_BACKEND={wanted}, but the status API at {process.url} was started with {used}"
            yield Finding("LLM_BACKEND", "fail", words, "settings are read at start: restart it, and your applications")


def last_starts(facts: Facts) -> Iterator[Finding]:
    """Known causes (CUDA out of memory, a taken port, ...) in the newest log of each engine that is not running now."""
    alive = {process.engine for process in facts.servers}
    for engine in engines.NAMES:
        logs = [] if engine in alive else start_logs(facts.run.path, engine)
        if logs and (known := classify(end_of(logs[-1], _LONGEST_LOG))):
            evidence = f"{known.cause} ({logs[-1]}: {mask(known.line)[:160]})"
            yield Finding(f"last start of {engine}", "warn", evidence, known.remedy)


def containers(_: Facts) -> Iterator[Finding]:
    """Containers of our compose file that failed, with the known cause or the last line of their log, secrets masked."""
    words = ["ps", "-a", "--filter", "status=exited", "--filter", f"label=com.docker.compose.project={PROJECT}"]
    for line in _docker(*words, "--format", "{{json .}}").splitlines():
        try:
            entry = json.loads(line)
            name, status = str(entry["Names"]), str(entry["Status"])
        except (ValueError, KeyError, TypeError):
            continue
        if status.startswith("Exited (0)"):  # it was done, or was asked to stop
            continue
        log = _docker("logs", "--tail", "200", name)
        known = classify(log)
        last = (log.strip().splitlines() or ["its log is empty"])[-1]
        remedy = known.remedy if known else f"docker logs {name}"
        yield Finding(f"container {name}", "warn", f"{status}: {known.cause if known else mask(last)[:200]}", remedy)


APPLICATIONS: tuple[Examiner, ...] = (settings, backend, status_api, last_starts, containers)


def _remedy(facts: Facts, status: ModelStatus) -> str:
    """The next step for an unavailable model; a server of the run at another address is the likeliest mistake."""
    address, run = facts.settings.address(), facts.run.name
    engine = engines.get(address.backend)
    prefix = engine.prefix
    if status.kind == "refused":
        if url := next((process.url for process in facts.servers if process.engine == engine.name), ""):
            return f"{engine.name} of run {run} runs at {url}: set {prefix}_BASE_URL={url}/v1"
        return f"granite-pipeline serve {address.backend} --run {run}" if engine.serves != "url" else "start that server"
    if status.kind == "model" and engine.creates_model:
        return f"granite-pipeline serve {engine.name} --run {run} creates it; or set {prefix}_MODEL to one of these"
    if status.kind == "model":
        return f"set {prefix}_MODEL to a name that is served, or serve the run as --served-model-name {address.model}"
    if status.kind == "key":
        return f"correct {engine.key_variable or 'OPENAI_COMPATIBLE_API_KEY'}"
    return f"correct {prefix}_BASE_URL, or look into that server's log"


def _docker(*words: str) -> str:
    """What docker says; "" without docker, or when it fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=10, check=True, errors="replace")
        return done.stdout + done.stderr
    return ""
