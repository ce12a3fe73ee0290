"""Ask the installed engine which settings it knows, so that no flag of a plan is a surprise ten minutes into a start.

Each question starts the engine's own parser in a process of its own, once per version: the answer is cached in
``~/.cache/granite-pipeline`` (``XDG_CACHE_HOME`` respected).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.engines.base import Engine
from pipeline.errors import EngineError
from pipeline.files import write_json
from pipeline.plan import Plan

# vLLM moved its parser between releases; both places are tried
_VLLM_CODE = """
import json
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser
try:
    from vllm.utils.argparse_utils import FlexibleArgumentParser
except ImportError:
    from vllm.utils import FlexibleArgumentParser
print("FLAGS" + json.dumps(sorted({o for a in make_arg_parser(FlexibleArgumentParser())._actions for o in a.option_strings})))
"""
_HELP_FLAG = re.compile(r"(?<![\w-])(--?[a-zA-Z][\w-]*)")
_TIMEOUT = 180.0


def unknown_flags(engine: Engine, plan: Plan, cache: Path | None = None) -> tuple[str, ...]:
    """Flags of a plan that the installed engine's own parser does not know; empty when the engine cannot be asked."""
    known = installed_flags(engine, cache)
    return tuple(f.name for f in plan.flags if f.name not in known) if known else ()


def require_known_flags(engine: Engine, plan: Plan, cache: Path | None = None) -> None:
    """Raise EngineError before launch when the installed engine would refuse a flag of the plan."""
    if unknown := unknown_flags(engine, plan, cache):
        version = engine.available().version
        raise EngineError(
            f"{engine.name} {version} does not know {', '.join(unknown)}",
            remedy=f"install the {engine.name} version this release was tested with (make setup), or drop these --set values",
        )


def installed_flags(engine: Engine, cache: Path | None = None) -> frozenset[str]:
    """Every flag the installed engine's parser accepts; empty when it is not installed, takes no flags or does not answer."""
    question = _question(engine.name)
    version = engine.available().version if question else None
    if not question or not version:
        return frozenset()
    digest = hashlib.sha256(json.dumps([version, question]).encode()).hexdigest()[:16]
    stored = (cache or _cache()) / f"flags-{engine.name}-{digest}.json"
    if stored.is_file():
        return frozenset(json.loads(stored.read_text(encoding="utf-8")))
    flags = _ask(question)
    if flags:
        write_json(stored, sorted(flags))
    return flags


def _question(engine: str) -> list[str]:
    if engine == "vllm":
        return [os.environ.get("VLLM_PYTHON") or sys.executable, "-c", _VLLM_CODE]
    if engine == "sglang":
        return [os.environ.get("SGLANG_PYTHON") or sys.executable, "-m", "sglang.launch_server", "--help"]
    if engine == "llamacpp":
        program = shutil.which("llama-server")
        return [program, "--help"] if program else [sys.executable, "-m", "pipeline.engines.xllamacpp_server", "--help"]
    return []


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


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "granite-pipeline"
