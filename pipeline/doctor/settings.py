"""What is wrong with a configuration before anything is asked: misspelt variables, values that hide others, contradictions."""

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from dotenv import dotenv_values

from pipeline import engines
from pipeline.config import ENV_FILE, Settings, root_url
from pipeline.doctor.findings import Facts, Finding, Status, worst_first
from pipeline.engines.base import Engine
from pipeline.operate import registry
from pipeline.runs.text import without_password

_PREFIXES = ("LLM", "OPENAI", "GATEWAY", "AGENTS")
# what other programs read under the same prefixes, so not misspelt
_FOREIGN = frozenset({"VLLM_PYTHON", "SGLANG_PYTHON", "OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_BASE"})
_OURS = re.compile(r"(BASE_?URL|MODEL(_?NAME)?|API_?KEY|BACKEND|URL|MODEL_LEN|CTX_SIZE|PARALLEL|MEMORY_UTIL)$")
# how alike a name must be to be called misspelt; one that has a prefix and an ending of ours may be less so
_SIMILAR, _SIMILAR_WITH_PREFIX = 0.84, 0.6
_ASK_SECONDS = 2.0


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
    statuses = await registry.check(address, timeout=_ASK_SECONDS)
    served = [status.name for status in statuses if status.available]
    if not served:
        words = statuses[0].detail or "it serves no model"
        return [_about(f"the selected backend {address.backend} is not usable now: {words}", "warn")]
    return [found for found in [served_contradiction(settings, served)] if found]


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
    try:
        parts = urlsplit(value.strip())
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
