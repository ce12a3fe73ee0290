"""``granite-pipeline card`` and ``push``: the model card, and a certified run on a model hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder


def register(app: typer.Typer) -> None:
    """Add the ``card`` and ``push`` verbs."""
    app.command("card")(card)
    app.command("push")(push)


def card(
    run: Annotated[str, typer.Option("--run", "--name", help="Name of the run.")] = DEFAULT_NAME,
    output: Annotated[Path, typer.Option("--output", help="Folder that holds the runs.")] = DEFAULT_OUTPUT,
) -> None:
    """Write the run's model card, README.md in the hub's format, from its manifest and certificate.

    Example: granite-pipeline card --run generic
    """
    from pipeline.certify.card import write_card

    typer.echo(str(write_card(RunFolder(run, output))))


def push(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Model repository on the hub.")],
    run: Annotated[str, typer.Option("--run", "--name", help="Name of the run.")] = DEFAULT_NAME,
    output: Annotated[Path, typer.Option("--output", help="Folder that holds the runs.")] = DEFAULT_OUTPUT,
    parts: Annotated[str, typer.Option("--parts", help="Comma-separated: merged,gguf,adapter.")] = "merged,gguf,adapter",
    public: Annotated[bool, typer.Option("--public", help="A new repository is public; else private.")] = False,
    uncertified: Annotated[
        bool, typer.Option("--uncertified", help="Even without a certificate that proves every link.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be uploaded.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """Upload a certified run to a model hub: merged weights, GGUF, Modelfile, adapter, card, manifest and certificate.

    The certificate must prove every link (not --offline) and be about the files as they are now. Manifest and certificate
    go without command lines, environments, folders of this machine and the cases of your own checks. HF_TOKEN gives the
    right to write. With --dry-run nothing leaves this machine.

    Example: granite-pipeline push me/granite-soc --run generic --dry-run
    """
    from pipeline.certify.hub import plan, require_current_certificate
    from pipeline.certify.hub import push as upload

    folder = RunFolder(run, output)
    if not uncertified:
        require_current_certificate(folder)
    uploads = plan(folder, tuple(part.strip() for part in parts.split(",")))
    if as_json:
        listed = [{"path": one.path, "bytes": one.bytes, "file": str(one.file)} for one in uploads]
        typer.echo(json.dumps({"repository": repository, "dry_run": dry_run, "files": listed}))
    else:
        table = Table("file", "MB", title=f"{'would go' if dry_run else 'going'} to {repository}", title_justify="left")
        for one in uploads:
            table.add_row(one.path, f"{one.bytes / 1e6:.1f}")
        Console(stderr=True).print(table)
    if not dry_run:
        address = upload(folder, repository, uploads, private=not public)
        Console(stderr=True).print(f"pushed: {address}", markup=False)
