"""``config``, ``models``, ``warmup``, ``choose``, ``doctor``: what applications will find, and what is wrong before they do."""

from typing import Annotated

import typer
from rich.text import Text
from typer import Option

from pipeline import config as settings_file
from pipeline import engines
from pipeline.commands import options, show
from pipeline.doctor.findings import Facts, examine, worst_first
from pipeline.doctor.machine import MACHINE
from pipeline.doctor.serving import APPLICATIONS, ask_selected, check
from pipeline.engines.choose import recommend
from pipeline.errors import EngineError, InputError
from pipeline.machine.named import hardware_from
from pipeline.net.client import wait_for
from pipeline.operate import registry
from pipeline.operate.agents import Agents, Sharing, sharing
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT

_STYLE = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_LEVELS = {"fail": "error", "warn": "warning", "ok": "ok"}


def config(
    offline: Annotated[bool, Option("--offline", help="Do not ask the selected backend which models it has.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Show every setting with its value, where it comes from and what it affects; secrets are masked.

    Misspelt variables are pointed out with the name that was probably meant. Settings that contradict each other, or
    a model that the selected backend (when it is up) does not serve, end with exit code 2.

    Examples:
      granite-pipeline config
      LLM_BACKEND=llamacpp granite-pipeline config --json
    """
    settings = settings_file.load()
    notices = check(settings)
    if not offline:
        notices += wait_for(ask_selected(settings))
    rows, told = settings_file.resolved(), [(_LEVELS[notice.status], notice.evidence) for notice in notices]
    if as_json:
        found = [{"name": r.name, "value": r.value, "source": r.source, "affects": r.description} for r in rows]
        show.as_json({"settings": found, "notices": [{"level": level, "text": text} for level, text in told]})
    else:
        cells = [(row.name, row.value, row.source, row.description) for row in rows]
        show.table("", ("variable", "value", "source", "affects"), cells)
    for level, text in told:
        show.line(f"{level}: {text}", err=True, style="red" if level == "error" else "yellow")
    errors = [text for level, text in told if level == "error"]
    if errors:
        raise InputError(f"{len(errors)} setting(s) contradict each other", evidence="\n".join(errors))


def models(
    backend: Annotated[str, Option(help="Only this backend; default: all that have a URL.")] = "",
    output: options.Output = DEFAULT_OUTPUT,
    as_json: options.AsJson = False,
) -> None:
    """Ask every configured backend which models it serves, and say which of them are this project's fine-tunes.

    Example: granite-pipeline models --backend vllm
    """
    settings = settings_file.load()
    if backend and backend not in engines.NAMES:
        raise InputError(f"no backend {backend!r}", remedy="known: " + ", ".join(engines.NAMES))
    found = wait_for(registry.check_every(settings, backend, output))
    if as_json:
        show.as_json({name: [status.to_json() for status in statuses] for name, statuses in found.items()})
        return
    rows = []
    for name, s in ((name, status) for name, statuses in found.items() for status in statuses):
        ours = f"{s.artefact.run}, {s.artefact.file} {s.artefact.sha256[:12]}" if s.artefact else ""
        rows.append((name, s.name, "yes" if s.available else "no", s.context or "", f"{s.latency_ms or 0:.0f}", ours, s.detail))
    show.table("", ("backend", "model", "available", "context", "ms", "artefact", "detail"), rows)


def warmup(
    agent: Annotated[str | None, Option(help="An agent of agents.yaml, or orchestrator.")] = None, as_json: options.AsJson = False
) -> None:
    """Make the selected backend load its model and answer one token; exit code 3 when it does not.

    Example: granite-pipeline warmup --agent triage
    """
    status = wait_for(registry.warmup_model(settings_file.load(), agent))
    if as_json:
        show.as_json(status.to_json())
    if not status.available:
        raise EngineError(f"model {status.name or '(none configured)'} is not available", evidence=status.detail)
    show.line(f"{status.name} answered after {status.latency_ms:.0f} ms", err=True)


def choose(
    users: Annotated[int, Option(min=1, help="People or agents asking at the same time.")] = 1,
    purpose: Annotated[str, Option(help="try, develop, serve or batch.")] = "serve",
    machine: options.Hardware = None,
    output: options.Output = DEFAULT_OUTPUT,
    as_json: options.AsJson = False,
) -> None:
    """Answer "which backend for me?" from the hardware, the number of users and the purpose, with the reasons.

    Agents of agents.yaml whose runs share a base are proposed for one server with their adapters: what that saves and loses.

    Examples:
      granite-pipeline choose --users 20
      granite-pipeline choose --hardware 2xa10g --users 200 --purpose batch
    """
    answer = recommend(hardware_from(machine), users, purpose)
    shared = sharing(Agents.load(settings_file.load().agents_file), output, hardware_from(machine))
    if as_json:
        show.as_json(answer.to_json() | {"sharing": [one.to_json() for one in shared]})
        return
    show.line(f"{answer.backend}: {answer.command}", style="bold")
    for reason in answer.reasons:
        show.line(f"- {reason}")
    for name, why in answer.others.items():
        show.line(f"not {name}: {why}", style="dim")
    for one in shared:
        _show(one)


def _show(one: Sharing) -> None:
    """One base that several agents share, as said to people."""
    for name, why in one.left_out.items():
        show.line(f"agent {name} keeps a server of its own: {why}", style="yellow")
    if one.refused:
        show.line(f"its base is shared by several agents, and one server for all is not possible: {one.refused}", style="yellow")
        return
    apart, together = one.apart, one.together
    saved = f"{together.words()}, against {apart.words()} for {apart.servers} servers"
    twice = f"with a second copy of each {together.words(2)} against {apart.words(2)}"
    show.line(f"{', '.join(one.agents)} share a base: their adapters on one server take {saved}; {twice}", style="bold")
    show.line(one.command)
    for name, entry in one.agents.items():
        show.line(f"  {name}: {{{', '.join(f'{key}: {value}' for key, value in entry.items())}}}")
    for words in one.lost:
        show.line(f"- lost: {words}")


def doctor(
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    base: Annotated[str | None, Option(help="Also ask the hub whether this model may be read.")] = None,
    agent: options.Agent = None,
    as_json: options.AsJson = False,
) -> None:
    """Check torch, engines, driver, disk, RAM, ports, hub access, a run's files and what applications meet; say how to mend it.

    The last part: contradicting settings, the selected backend refusing connections or lacking the model, a status API that
    still uses an old LLM_BACKEND, known causes in the last server log, containers that failed.

    Nothing is changed. Exit code: 0 when nothing failed (warnings allowed), 1 when something did.

    Examples:
      granite-pipeline doctor
      granite-pipeline doctor --run mine --base ibm-granite/granite-4.0-350m --json
    """
    facts = Facts.gather(options.folder(agent, run, output), base)
    found = examine(facts, MACHINE) + worst_first(examine(facts, APPLICATIONS))
    healthy = all(finding.status != "fail" for finding in found)
    if as_json:
        show.as_json({"healthy": healthy, "findings": [finding.to_json() for finding in found]})
    else:
        told = (f"{f.evidence}\n→ {f.remedy}" if f.remedy else f.evidence for f in found)
        rows = [(Text(f.status, _STYLE[f.status]), f.check, text) for f, text in zip(found, told, strict=True)]
        show.table("", ("", "check", "what was seen, what to do"), rows)
    if not healthy:
        raise typer.Exit(1)
