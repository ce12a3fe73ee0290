"""``certify``, ``card``, ``push``: prove each link from training to the served answer, and publish what is proven."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from pipeline import config, engines
from pipeline.certify import hub
from pipeline.certify.certificate import place, require_certified
from pipeline.certify.publish import publish, table, write_card
from pipeline.commands import options, show
from pipeline.errors import InputError
from pipeline.runs import lock
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT
from pipeline.verify.distributions import ROWS
from pipeline.verify.verify import BACKENDS

_DEFAULT = ",".join(BACKENDS)


def certify(
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    backends: options.Backends = _DEFAULT,
    prompts: Annotated[int, Option(min=1, help=f"Held-out prompts put to each backend, {ROWS} at most.")] = ROWS,
    own: Annotated[
        list[str] | None,
        Option("--eval", metavar="FILE.yaml|MODULE:FUNCTION", help="Your own checks of each backend. Repeatable."),
    ] = None,
    tasks: Annotated[str, Option(help="lm-evaluation-harness tasks to run against each backend.")] = "",
    sign: Annotated[Path | None, Option(metavar="KEY.pem", help="Sign the certificate (EC key).")] = None,
    public_key: Annotated[
        Path | None, Option(metavar="KEY.pem", help="With --offline: check the signed certificate too.")
    ] = None,
    unmerged: Annotated[
        bool, Option("--unmerged", help="Question the adapter as a server applies it to its base, not the merged model.")
    ] = False,
    offline: Annotated[bool, Option("--offline", help="Only what files prove: no server, no model in memory.")] = False,
    remote_ok: options.RemoteOk = False,
    agent: options.Agent = None,
    as_json: options.AsJson = False,
) -> None:
    """Certify that what is served is what was trained: seven links, each with its figure and the bound it is held to.

    The adapter moved; merged = base + adapter, weight by weight and as distributions; GGUF = merged; each backend = the
    in-process model; tuned is not the base; it stops; the hashes from dataset to launch hold. Writes certificate/ in the run
    folder (certificate.json, junit.xml), adds it to the report, and writes the model card README.md. Exit code 1 when a link
    is broken or nothing is proven for it; the message names it. --offline passes on what files prove, and says what they do not;
    it writes offline.json where a certificate of served models is there.

    With --unmerged a backend that serves adapters by name is questioned: the one at its configured address that lists this run's
    adapter (serve --adapters), else one that is started for it. Served is then base + adapter, held to the same bounds.

    Your own checks: a YAML list of entries with a prompt (or messages) and a check, one of exact, contains, regex, json_schema; or
    module:function, which gets ask(prompt or messages) and returns names with true, false or a share. See docs/examples.

    Examples:
      granite-pipeline certify
      granite-pipeline certify --offline --json
      granite-pipeline certify --run mine --backends llamacpp --eval docs/examples/soc_checks.yaml
    """
    from training.certify import certify
    from training.certify import offline as offline_module

    if public_key is not None and not offline:
        raise InputError("--public-key checks a signed certificate, which only --offline does", remedy="add --offline")
    if unmerged and offline:
        raise InputError("--unmerged questions a server, which --offline does not", remedy="leave one of the two out")
    if unmerged and backends == _DEFAULT:
        backends = ",".join(engine.name for engine in engines.every() if engine.serves_adapters)
    this = options.folder(agent, run, output)
    options.allow_remote(remote_ok)
    if offline:
        certificate = offline_module.certify_offline(this, public_key)
    else:
        scope = certify.Scope(tuple(options.listed(backends)), prompts, own=tuple(own or ()), tasks=tasks, unmerged=unmerged)
        certificate = certify.certify(this, config.load(), scope)
    if sign is not None:
        with lock.held(this, "certify"):
            hub.sign(this, sign)
    # a check of a signed certificate changes nothing
    paths = publish(this, certificate) if public_key is None else None
    if as_json:
        show.as_json(certificate.to_json(), ascii_only=False)
    show.draw(table(certificate), err=True)
    show.line(f"certificate: {place(certificate, this.certificate)}", err=True)
    if paths is not None:
        show.line(f"report: {paths.html}", err=True)
    require_certified(certificate)


def card(run: options.Run = DEFAULT_NAME, output: options.Output = DEFAULT_OUTPUT, agent: options.Agent = None) -> None:
    """Write the run's model card, README.md in the hub's format, from its manifest and certificate.

    Example: granite-pipeline card --run generic
    """
    typer.echo(str(write_card(options.folder(agent, run, output))))


def push(
    repository: Annotated[str, Argument(metavar="OWNER/NAME", help="Model repository on the hub.")],
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    parts: Annotated[str, Option(help="Comma-separated: merged,gguf,adapter.")] = "merged,gguf,adapter",
    public: Annotated[bool, Option("--public", help="A new repository is public; else private.")] = False,
    uncertified: Annotated[bool, Option("--uncertified", help="Even without a certificate that proves every link.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only list what would be uploaded.")] = False,
    agent: options.Agent = None,
    as_json: options.AsJson = False,
) -> None:
    """Upload a certified run to a model hub: merged weights, GGUF, Modelfile, adapter, card, manifest and certificate.

    The certificate must prove every link (not --offline) and be about the files as they are now. Manifest and certificate
    go without command lines, environments, folders of this machine and the cases of your own checks. HF_TOKEN gives the
    right to write. With --dry-run nothing leaves this machine.

    Example: granite-pipeline push me/granite-soc --run generic --dry-run
    """
    this = options.folder(agent, run, output)
    if not uncertified:
        hub.require_current_certificate(this)
    uploads = hub.plan(this, tuple(options.listed(parts)))
    if as_json:
        files = [{"path": one.path, "bytes": one.bytes, "file": str(one.file)} for one in uploads]
        show.as_json({"repository": repository, "dry_run": dry_run, "files": files}, indent=None)
    else:
        title = f"{'would go' if dry_run else 'going'} to {repository}"
        show.table(title, ("file", "MB"), ((one.path, f"{one.bytes / 1e6:.1f}") for one in uploads), err=True)
    if not dry_run:
        show.line(f"pushed: {hub.push(this, repository, uploads, private=not public)}", err=True)
