"""``config``, ``models``, ``warmup``, ``choose``: what applications will find, before they look for it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline import config, engines
from pipeline.config import Settings
from pipeline.doctor.findings import Finding
from pipeline.doctor.settings import check, served_contradiction
from pipeline.errors import EngineError, InputError
from pipeline.net.client import wait_for
from pipeline.operate import registry
from pipeline.operate.registry import ModelStatus
from pipeline.runs.folder import DEFAULT_OUTPUT

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_ASK_SECONDS = 2.0
_LEVELS = {"fail": "error", "warn": "warning", "ok": "ok"}


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command("config")(show_config)
    app.command("models")(models)
    app.command("warmup")(warmup)
    app.command("choose")(choose)


def show_config(
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the selected backend which models it has.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show every setting with its value, where it comes from and what it affects; secrets are masked.

    Misspelt variables are pointed out with the name that was probably meant. Settings that contradict each other, or
    a model that the selected backend (when it is up) does not serve, end with exit code 2.

    Examples:
      granite-pipeline config
      LLM_BACKEND=llamacpp granite-pipeline config --json
    """
    settings = config.load()
    notices = check(settings)
    if not offline:
        notices += wait_for(_asked(settings))
    rows = config.resolved()
    if as_json:
        found = [{"name": r.name, "value": r.value, "source": r.source, "affects": r.description} for r in rows]
        typer.echo(
            json.dumps(
                {"settings": found, "notices": [{"level": _LEVELS[n.status], "text": n.evidence} for n in notices]}, indent=2
            )
        )
    else:
        table = Table("variable", "value", "source", "affects")
        for row in rows:
            table.add_row(row.name, escape(row.value), row.source, row.description)
        Console().print(table)
    for notice in notices:
        style = "red" if notice.status == "fail" else "yellow"
        said = f"{_LEVELS[notice.status]}: {notice.evidence}"
        Console(stderr=True).print(said, style=style, markup=False, highlight=False, soft_wrap=True)
    errors = [notice.evidence for notice in notices if notice.status == "fail"]
    if errors:
        raise InputError(f"{len(errors)} setting(s) contradict each other", evidence="\n".join(errors))


def models(
    backend: Annotated[str, typer.Option("--backend", help="Only this backend; default: all that have a URL.")] = "",
    output: Annotated[Path, typer.Option("--output", help="Folder that holds the runs.")] = DEFAULT_OUTPUT,
    as_json: AsJson = False,
) -> None:
    """Ask every configured backend which models it serves, and say which of them are this project's fine-tunes.

    Example: granite-pipeline models --backend vllm
    """
    settings = config.load()
    if backend and backend not in engines.NAMES:
        raise InputError(f"no backend {backend!r}", remedy="known: " + ", ".join(engines.NAMES))
    found = wait_for(_every(settings, backend, output))
    if as_json:
        plain = {name: [status.to_json() for status in statuses] for name, statuses in found.items()}
        typer.echo(json.dumps(plain, indent=2))
        return
    table = Table("backend", "model", "available", "context", "ms", "artefact", "detail")
    for name, statuses in found.items():
        for s in statuses:
            ours = f"{s.artefact.run}, {s.artefact.file} {s.artefact.sha256[:12]}" if s.artefact else ""
            cells = (s.name, "yes" if s.available else "no", str(s.context or ""), f"{s.latency_ms or 0:.0f}", ours, s.detail)
            table.add_row(name, *(escape(cell) for cell in cells))
    Console().print(table)


def warmup(
    agent: Annotated[str | None, typer.Option("--agent", help="An agent of agents.yaml, or orchestrator.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make the selected backend load its model and answer one token; exit code 3 when it does not.

    Example: granite-pipeline warmup --agent triage
    """
    status = wait_for(registry.warmup_model(config.load(), agent))
    if as_json:
        typer.echo(json.dumps(status.to_json(), indent=2))
    if not status.available:
        raise EngineError(f"model {status.name or '(none configured)'} is not available", evidence=status.detail)
    Console(stderr=True).print(f"{status.name} answered after {status.latency_ms:.0f} ms")


def choose(
    users: Annotated[int, typer.Option("--users", min=1, help="People or agents asking at the same time.")] = 1,
    purpose: Annotated[str, typer.Option("--purpose", help="try, develop, serve or batch.")] = "serve",
    machine: Annotated[str | None, typer.Option("--hardware", help="Another machine, as in plan --hardware.")] = None,
    as_json: AsJson = False,
) -> None:
    """Answer "which backend for me?" from the hardware, the number of users and the purpose, with the reasons.

    Examples:
      granite-pipeline choose --users 20
      granite-pipeline choose --hardware 2xa10g --users 200 --purpose batch
    """
    from pipeline.engines.choose import recommend
    from pipeline.machine.named import hardware_from

    answer = recommend(hardware_from(machine), users, purpose)
    if as_json:
        typer.echo(json.dumps(answer.to_json(), indent=2))
        return
    console = Console()
    console.print(f"{answer.backend}: {answer.command}", style="bold", highlight=False, soft_wrap=True)
    for reason in answer.reasons:
        console.print(f"- {reason}", markup=False, highlight=False, soft_wrap=True)
    for name, why in answer.others.items():
        console.print(f"not {name}: {why}", style="dim", markup=False, highlight=False, soft_wrap=True)


async def _asked(settings: Settings) -> list[Finding]:
    """What the selected backend, when it is up, has to say about the model name."""
    address = settings.address()
    if not address.base_url:
        return []
    statuses = await registry.check(address, timeout=_ASK_SECONDS)
    served = [status.name for status in statuses if status.available]
    if not served:
        words = statuses[0].detail or "it serves no model"
        return [Finding("settings", "warn", f"the selected backend {address.backend} is not usable now: {words}")]
    notice = served_contradiction(settings, served)
    return [notice] if notice else []


async def _every(settings: Settings, backend: str, output: Path) -> dict[str, list[ModelStatus]]:
    names = [name for name in engines.NAMES if backend in ("", name) and settings.address(name).base_url]
    found = await asyncio.gather(*(registry.check(settings.address(name), output=output) for name in names))
    return dict(zip(names, found, strict=True))
