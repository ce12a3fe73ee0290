"""``granite-pipeline card`` and ``push``: the model card, and a certified run on a model hub."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.commands import options, show
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT


def card(run: options.Run = DEFAULT_NAME, output: options.Output = DEFAULT_OUTPUT, agent: options.Agent = None) -> None:
    """Write the run's model card, README.md in the hub's format, from its manifest and certificate.

    Example: granite-pipeline card --run generic
    """
    from pipeline.certify.hub import write_card

    typer.echo(str(write_card(options.folder(agent, run, output))))


def push(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Model repository on the hub.")],
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    parts: Annotated[str, typer.Option("--parts", help="Comma-separated: merged,gguf,adapter.")] = "merged,gguf,adapter",
    public: Annotated[bool, typer.Option("--public", help="A new repository is public; else private.")] = False,
    uncertified: Annotated[
        bool, typer.Option("--uncertified", help="Even without a certificate that proves every link.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be uploaded.")] = False,
    agent: options.Agent = None,
    as_json: options.AsJson = False,
) -> None:
    """Upload a certified run to a model hub: merged weights, GGUF, Modelfile, adapter, card, manifest and certificate.

    The certificate must prove every link (not --offline) and be about the files as they are now. Manifest and certificate
    go without command lines, environments, folders of this machine and the cases of your own checks. HF_TOKEN gives the
    right to write. With --dry-run nothing leaves this machine.

    Example: granite-pipeline push me/granite-soc --run generic --dry-run
    """
    from pipeline.certify.hub import plan, require_current_certificate
    from pipeline.certify.hub import push as upload

    this = options.folder(agent, run, output)
    if not uncertified:
        require_current_certificate(this)
    uploads = plan(this, tuple(options.listed(parts)))
    if as_json:
        files = [{"path": one.path, "bytes": one.bytes, "file": str(one.file)} for one in uploads]
        show.as_json({"repository": repository, "dry_run": dry_run, "files": files}, indent=None)
    else:
        title = f"{'would go' if dry_run else 'going'} to {repository}"
        show.table(title, ("file", "MB"), ((one.path, f"{one.bytes / 1e6:.1f}") for one in uploads), err=True)
    if not dry_run:
        show.line(f"pushed: {upload(this, repository, uploads, private=not public)}", err=True)
