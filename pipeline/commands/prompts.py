"""``granite-pipeline render``, ``parity`` and ``modelfile``: prompts as each engine makes them."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from pipeline.commands import options, show
from pipeline.errors import InputError, at
from pipeline.modelfile import modelfile as made_for
from pipeline.modelfile.grammar import parse_modelfile
from pipeline.prompts.conversation import Conversation, read_messages, read_tools
from pipeline.prompts.parity import require_same
from pipeline.runs.files import write_atomic
from pipeline.runs.folder import DEFAULT_OUTPUT
from pipeline.verify.sources import compare_here, make_renderer, print_matrix, prompt_text, read_source


def render(
    messages: Annotated[Path, Option(help="JSON file: a list of messages, or {'messages': [...]}.")],
    tools: Annotated[Path | None, Option(help="JSON file: a list of tools in OpenAI's form.")] = None,
    run: options.SomeRun = None,
    template: options.Template = None,
    renderer: Annotated[str, Option(help="jinja, transformers, go, llamacpp, vllm or ollama.")] = "jinja",
    url: Annotated[str | None, Option(help="Base URL of the engine (default: its usual local port).")] = None,
    model: Annotated[
        str | None, Option(help="Model name on the engine (default: the one with this chat template, or its only one).")
    ] = None,
    prefill: Annotated[bool, Option("--continue", help="Continue the last (assistant) message.")] = False,
    now: Annotated[datetime | None, Option(help="Clock that dated templates see.")] = None,
    output: options.Output = DEFAULT_OUTPUT,
    agent: options.Agent = None,
) -> None:
    """Print the exact prompt that a renderer makes of a conversation, and nothing else.

    Example: granite-pipeline render --run generic --messages chat.json --renderer go
    """
    source = read_source(options.chosen(agent, run).run, template, output, now)
    chat = Conversation("stdin", read_messages(messages), read_tools(tools) if tools else None, None, prefill)
    maker = make_renderer(renderer, source, url=url, model=model)
    with at(str(messages)):
        text = prompt_text(maker, chat, source)
    typer.echo(text, nl=False)


def parity(
    run: options.SomeRun = None,
    template: options.Template = None,
    engines: Annotated[
        str | None,
        Option(
            help="Comma-separated: chat, transformers, go, merged, gguf, modelfile, llamacpp, vllm, ollama; NAME=URL#MODEL for a "
            "server elsewhere."
        ),
    ] = None,
    start: Annotated[
        bool, Option("--start", help="Start the run's llama.cpp, vLLM and Ollama where installed, and stop them again.")
    ] = False,
    remote_ok: options.RemoteOk = False,
    as_json: options.AsJson = False,
    output: options.Output = DEFAULT_OUTPUT,
    agent: options.Agent = None,
) -> None:
    """Compare the prompt of every renderer with the tokenizer's, over the conversation suite.

    Without --engines all that are here are compared: the run's own files (merged, gguf, modelfile), its servers that are up
    (--start brings them up), and servers on the usual local ports that serve this model; what is left out is named. The truth is
    the chat template the run was trained with; end and pad tokens are checked too. Exit code 1 when anything differs for no
    listed reason.

    Examples:
      granite-pipeline parity --start
      granite-pipeline parity --run generic --engines chat,gguf,llamacpp=http://127.0.0.1:8005
    """
    options.allow_remote(remote_ok)
    source = read_source(options.chosen(agent, run).run, template, output, None)
    if start and source.run is None:
        raise InputError("--start starts the servers of a run", remedy="give --run instead of --template")
    found = compare_here(source, engines, start=start)
    if as_json:
        show.as_json(found.to_json(), indent=None, ascii_only=False)
    else:
        print_matrix(found.matrix, found.absent, found.problems, show.console())
    require_same(found.matrix, found.problems)


def modelfile(
    run: options.SomeRun = None,
    gguf: Annotated[Path | None, Option(help="A GGUF instead of a run; the Modelfile goes to stdout.")] = None,
    template: options.Template = None,
    system: Annotated[str | None, Option(help="System message for requests that bring none.")] = None,
    num_ctx: Annotated[int | None, Option(min=1, help="Context length (default: the model's, at most 8192).")] = None,
    parameter: Annotated[list[str] | None, Option(help="NAME=VALUE; repeat for several (stop).")] = None,
    license_file: Annotated[Path | None, Option(help="Text for LICENSE.")] = None,
    explain: Annotated[bool, Option("--explain", help="Say which renderer each Ollama generation uses; write nothing.")] = False,
    output: options.Output = DEFAULT_OUTPUT,
    agent: options.Agent = None,
) -> None:
    """Write the Ollama Modelfile of a run, or print one for any GGUF.

    The TEMPLATE is derived from the model's chat template and gives the same prompts; a chat template for which none can be
    proven is refused. Example: granite-pipeline modelfile --run generic --num-ctx 8192
    """
    run = options.chosen(agent, run).run
    if run is not None and gguf is not None:
        raise InputError("give --run or --gguf, not both")
    wanted = _parameters(parameter or [], num_ctx)
    license_text = _read_text(license_file) if license_file else None
    this = options.folder(None, run, output)
    told = (system, wanted, license_text)
    made = made_for.for_gguf(gguf, template, *told) if gguf else made_for.for_run(this, *told)
    if explain:
        for choice in made_for.explain(parse_modelfile(made.text), made.jinja):
            typer.echo(f"Ollama {choice.generation}: {choice.renderer}; {choice.reason}")
    elif gguf:
        typer.echo(made.text, nl=False)
    else:
        write_atomic(this.modelfile, made.text)
        typer.echo(this.modelfile)


def _parameters(given: list[str], num_ctx: int | None) -> dict[str, str | int | list[str]]:
    pairs = [options.pair("--parameter", item) for item in given]
    made: dict[str, str | int | list[str]] = dict(pairs)
    if "stop" in made:
        made["stop"] = [value for name, value in pairs if name == "stop"]
    return made | ({"num_ctx": num_ctx} if num_ctx else {})


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
