"""Settings an engine knows: the installed engine's own parser is asked; ``flags.json`` answers where it is not installed."""

import contextlib
import hashlib
import json
import re
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.engines.base import Engine
from pipeline.errors import EngineError, EnvironmentFailure
from pipeline.planning.overrides import Known
from pipeline.planning.plan import Plan
from pipeline.runs.files import write_json
from pipeline.runs.folder import cache_folder

_HELP_FLAG = re.compile(r"(?<![\w-])(--?[a-zA-Z][\w-]*)")
_TIMEOUT = 180.0


@cache
def listed_flags(engine: str) -> Known:
    """What ``flags.json`` lists for an engine; with ``opposites`` a switch can also be written ``--no-...``."""

    def full(words: str) -> frozenset[str]:
        return frozenset(word if word[0] == "-" or word.isupper() else f"--{word}" for word in listed[words])

    listed: dict[str, Any] = json.loads(Path(__file__).with_name("flags.json").read_text(encoding="utf-8"))[engine]
    starts = ("--", "--no-") if listed["opposites"] else ("--",)
    switches = frozenset(f"{start}{word}" for word in listed["switches"] for start in starts)
    return Known(full("flags"), switches, full("variables"), full("tokens"), full("auto"))


def require_known_flags(engine: Engine, plan: Plan, cache: Path | None = None) -> None:
    """Raise EngineError before launch when the installed engine's own parser, where it can be asked, does not know a flag."""
    known = installed_flags(engine, cache)
    if known and (unknown := [flag.name for flag in plan.flags if flag.name not in known]):
        what = f"{engine.name} {engine.available().version} does not know {', '.join(unknown)}"
        tested = f"install the {engine.name} version this release was tested with (make setup)"
        raise EngineError(what, remedy=f"{tested}, or drop these --set values")


def installed_flags(engine: Engine, cache: Path | None = None) -> frozenset[str]:
    """Every flag the installed engine's parser accepts; empty when it is not installed, takes no flags or does not answer."""
    question = engine.flags_question()
    version = engine.available().version if question else None
    if not question or not version:
        return frozenset()
    digest = hashlib.sha256(json.dumps([version, question, _our_code(question)]).encode()).hexdigest()[:16]
    try:
        stored = cache_folder(cache) / f"flags-{engine.name}-{digest}.json"
    except EnvironmentFailure:
        return _ask(question)
    with contextlib.suppress(OSError, ValueError):
        return frozenset(json.loads(stored.read_text(encoding="utf-8")))
    if flags := _ask(question):
        with contextlib.suppress(OSError):
            write_json(stored, sorted(flags))
    return flags


def _our_code(question: list[str]) -> str:
    """The code of a server that is a module of ours: its flags change without the package it starts."""
    module = find_spec(question[2]) if question[1:2] == ["-m"] and question[2].startswith("pipeline.") else None
    return Path(module.origin).read_text(encoding="utf-8") if module and module.origin else ""


def _ask(question: list[str]) -> frozenset[str]:
    try:
        done = subprocess.run(question, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.SubprocessError):
        return frozenset()
    if done.returncode:
        return frozenset()
    for line in done.stdout.splitlines():
        if line.startswith("FLAGS"):
            return frozenset(json.loads(line.removeprefix("FLAGS")))
    return frozenset(_HELP_FLAG.findall(done.stdout))
