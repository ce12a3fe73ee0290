"""``doctor``: what is wrong here, and how to mend it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from pipeline.commands import options, show
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT

_STYLE = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    base: Annotated[str | None, typer.Option("--base", help="Also ask the hub whether this model may be read.")] = None,
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
    from pipeline.doctor.findings import Facts, examine, worst_first
    from pipeline.doctor.machine import MACHINE
    from pipeline.doctor.serving import APPLICATIONS

    facts = Facts.gather(options.folder(agent, run, output), base)
    found = examine(facts, MACHINE) + worst_first(examine(facts, APPLICATIONS))
    healthy = all(finding.status != "fail" for finding in found)
    if as_json:
        show.as_json({"healthy": healthy, "findings": [finding.to_json() for finding in found]})
    else:
        rows = [
            (Text(f.status, _STYLE[f.status]), f.check, f"{f.evidence}\n→ {f.remedy}" if f.remedy else f.evidence) for f in found
        ]
        show.table("", ("", "check", "what was seen, what to do"), rows)
    if not healthy:
        raise typer.Exit(1)
