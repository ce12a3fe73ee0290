"""What is wrong with a configuration before anything is asked: misspelt variables, values that hide others, contradictions."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pipeline import engines
from pipeline.config import ENV_FILE, Settings, root_url
from pipeline.engines.base import Engine
from pipeline.runs.text import without_password

_PREFIXES = ("LLM", "OPENAI", "GATEWAY", "AGENTS")
# what other programs read under the same prefixes, so not misspelt
_FOREIGN = frozenset({"VLLM_PYTHON", "SGLANG_PYTHON", "OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_BASE"})
_OURS = re.compile(r"(BASE_?URL|MODEL(_?NAME)?|API_?KEY|BACKEND|URL|MODEL_LEN|CTX_SIZE|PARALLEL|MEMORY_UTIL)$")
_SIMILAR = 0.84


@dataclass(frozen=True)
class Notice:
    """One thing worth knowing: ``level`` error stops the verb, warning does not."""

    level: Literal["error", "warning"]
    text: str


def check(settings: Settings, env_file: Path = ENV_FILE, environment: Mapping[str, str] | None = None) -> list[Notice]:
    """Everything that can be said without asking a server, errors first."""
    from dotenv import dotenv_values

    env = dict(os.environ if environment is None else environment)
    in_file = {key: value or "" for key, value in dotenv_values(env_file).items()} if env_file.is_file() else {}
    found = [*contradictions(settings), *misspelt({**in_file, **env}, in_file), *hidden(in_file, env, env_file)]
    return sorted(found, key=lambda notice: notice.level != "error")


def misspelt(variables: Mapping[str, str], in_file: Mapping[str, str]) -> list[Notice]:
    """Variables that look like one of the documented ones and are not read by anything."""
    known = [field.upper() for field in Settings.model_fields] + [v for engine in engines.every() for v in engine.variables()]
    read = _FOREIGN.union(*(engine.flags.variables for engine in engines.every()))
    prefixes = (*_PREFIXES, *(engine.prefix for engine in engines.every()))
    found = []
    for name in sorted(variables):
        if name in known or name in read:
            continue
        near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=_SIMILAR)
        ours = name.startswith(prefixes) and _OURS.search(name)
        if not near and ours:
            near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.6)
        if near and (name in in_file or ours or _ratio(name, near[0]) >= _SIMILAR):
            found.append(Notice("warning", f"{name} is set but nothing reads it: did you mean {near[0]}?"))
    return found


def contradictions(settings: Settings) -> list[Notice]:
    """Settings that cannot both be meant; each notice names both sides."""
    chosen = settings.address()
    found = []
    missing = "BASE_URL" if not chosen.base_url else "MODEL" if not chosen.model else ""
    if missing:
        variable = f"{engines.get(chosen.backend).prefix}_{missing}"
        found.append(Notice("error", f"LLM_BACKEND={chosen.backend}, but {variable} is empty: set {variable}"))
    seen: dict[str, Engine] = {}
    for engine in engines.every():
        url, variable = settings.address(engine.name).base_url, f"{engine.prefix}_BASE_URL"
        if wrong := _not_a_url(variable, url):
            found.append(wrong)
        other = seen.setdefault(root_url(url), engine)
        if url and other is not engine and "url" not in (engine.serves, other.serves):
            both = f"{other.prefix}_BASE_URL and {variable}"
            found.append(Notice("error", f"{both} are both {without_password(root_url(url))}: two engines cannot answer there"))
    return found


def hidden(in_file: Mapping[str, str], env: Mapping[str, str], env_file: Path) -> list[Notice]:
    """Values in ``.env`` that the environment overrides: the usual reason why "LLM_BACKEND changed but the old one is used"."""
    return [
        Notice(
            "warning",
            f"{name}: the environment wins over {env_file}, so the value in the file is not used; unset {name} to use it",
        )
        for name, value in in_file.items()
        if name.lower() in Settings.model_fields and value and env.get(name) not in (None, "", value)
    ]


def served_contradiction(settings: Settings, served: list[str]) -> Notice | None:
    """The selected backend is up but does not serve the configured model."""
    chosen = settings.address()
    engine = engines.get(chosen.backend)
    names = [*served, *(name.removesuffix(engine.tag) for name in served)]
    wrong = next(
        ((v, m) for v, m in (("MODEL", chosen.model), ("ORCHESTRATOR_MODEL", chosen.orchestrator_model)) if m and m not in names),
        None,
    )
    if wrong is None:
        return None
    variable = f"{engine.prefix}_{wrong[0]}"
    return Notice(
        "error",
        f"{variable}={wrong[1]}, but {chosen.backend} at {without_password(chosen.base_url)} serves {', '.join(served) or 'nothing'}: "
        f"set {variable} to one of these, or serve the run under that name",
    )


def _not_a_url(variable: str, value: str) -> Notice | None:
    if not value:
        return None
    try:
        parts = urlsplit(value.strip())
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if good:
        return None
    return Notice("error", f"{variable}={without_password(value)} is not a URL: write http://host:port/v1")


def _ratio(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, name.upper(), other).ratio()
