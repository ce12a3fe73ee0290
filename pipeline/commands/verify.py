"""``verify``: prompts to every backend, judged, with a report; ``report`` draws it again."""

import webbrowser
from typing import Annotated

import typer
from typer import Option

from pipeline import config, engines
from pipeline.certify.replicas import PROMPTS, Replica, Service, ask, require_all
from pipeline.commands import options, show
from pipeline.errors import InputError
from pipeline.report.write import paths_in, render_again, summary_table
from pipeline.runs.files import read_json
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder
from pipeline.verify.assemble import titled
from pipeline.verify.verify import BACKENDS, require_passed
from pipeline.verify.verify import verify as verify_run

_DEFAULT = ",".join(BACKENDS)


def verify(
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    backends: options.Backends = _DEFAULT,
    limit: Annotated[int | None, Option(min=1, help="Only the first N held-out prompts.")] = None,
    replicas: Annotated[
        str | None,
        Option("--replicas", metavar="URL", help="Ask every address behind this URL's name instead, whoever started it."),
    ] = None,
    dtype: Annotated[str, Option(help="With --replicas: the number type they compute in; default: the certificate's.")] = "",
    name: options.ServedName = None,
    remote_ok: options.RemoteOk = False,
    agent: options.Agent = None,
    as_json: options.AsJson = False,
) -> None:
    """Put the held-out prompts to every backend and write report.html, report.json and junit.xml.

    A server of this run that is up is used and left running; a backend that is not is started and stopped again. An Ollama that
    runs already, at OLLAMA_BASE_URL or OLLAMA_HOST, is given the model under a name of its own, which is deleted afterwards; on
    another machine only with --remote-ok. A backend that is not installed is skipped, with the command that installs it. What
    the other backends answered in an earlier verification of the same files stays in the report. Each is also tried with
    control tokens in a user's text, a JSON schema and a demanded tool call. Exit code 1 when any check fails.

    With --replicas nothing is started: every address that the name stands for is asked some prompts and held to the bounds of the
    run's certificate, for the engine in --backends (default: LLM_BACKEND). Exit code 1 names each address that is not this
    fine-tune, 3 each that does not answer; certificate/replicas.json says what each was found to be.

    Examples:
      granite-pipeline verify --backends llamacpp --limit 50
      granite-pipeline verify --run triage --replicas http://triage.models:8003
    """
    this = options.folder(agent, run, output)
    if replicas is not None:
        _replicas(this, replicas, backends, limit or PROMPTS, dtype, name, as_json=as_json)
        return
    if dtype or name:
        raise InputError("--dtype and --served-model-name are for --replicas", remedy="leave them out")
    options.allow_remote(remote_ok)
    # who asks for it wants it asked
    report = verify_run(this, options.listed(backends), config.load(), keep=True, limit=limit, force=True)
    paths = paths_in(this.report)
    if as_json:
        typer.echo(paths.json.read_text(encoding="utf-8"))
    show.draw(summary_table(report), err=True)
    show.line(f"report: {paths.html}", err=True)
    require_passed(report)


def _replicas(run: RunFolder, url: str, backends: str, prompts: int, dtype: str, name: str | None, *, as_json: bool) -> None:
    """Ask every address behind a name and say which is not this run."""
    settings = config.load()
    named = options.listed(backends) if backends != _DEFAULT else [settings.llm_backend]
    if len(named) != 1:
        raise InputError(f"--backends names {len(named)} engines, one is behind a name", remedy="name that engine")
    engine = engines.get(named[0])
    names = (name,) if name else tuple(dict.fromkeys((run.name, settings.address(engine.name).model)))
    service = Service(config.root_url(url), engine.name, names, settings.key(engine.name))
    with show.progress(f"asking {service.url}") as progress:
        found = ask(run, service, prompts, dtype, progress)
    if as_json:
        typer.echo(run.replicas.read_text(encoding="utf-8"))
    rows = [(one.address, one.state, _figure(one)) for one in found]
    show.table(f"{service.url}: run {run.name}", ("address", "state", "figures"), rows, err=True)
    require_all(run, found)


def _figure(one: Replica) -> str:
    """What was found of one address, in a line."""
    return one.words or "; ".join(check.figure for check in one.checks if check.status == "passed")


def report(
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    agent: options.Agent = None,
    as_json: options.AsJson = False,
    open_page: Annotated[bool, Option("--open", help="Open report.html in the browser.")] = False,
) -> None:
    """Draw report.html and junit.xml again from the run's report.json, and print the summary.

    Nothing is measured: `granite-pipeline verify` does that and writes report.json. So the exit code is 0 for
    a failed run too; 2 means that there is no usable report.json.

    Example: granite-pipeline report --run generic --open
    """
    this = options.folder(agent, run, output)
    source, remedy = paths_in(this.report).json, f"granite-pipeline verify --run {this.name}"
    if not source.is_file():
        raise InputError(f"run {this.name!r} has no report yet: {source} does not exist", remedy=remedy)
    result = read_json(source)
    if not isinstance(result, dict):
        raise InputError(f"{source}: not a JSON object", remedy=remedy)
    result = titled(result)
    paths = render_again(result, this.report)
    if as_json:
        files = {"report": str(paths.html), "json": str(paths.json), "junit": str(paths.junit)}
        show.as_json({"run": result["run"], "passed": result["passed"], **files}, indent=None)
    else:
        show.draw(summary_table(result))
        typer.echo(f"report  {paths.html}\njunit   {paths.junit}")
    if open_page and not webbrowser.open(paths.html.resolve().as_uri()):
        typer.echo(f"no browser could be started; open {paths.html} yourself", err=True)
