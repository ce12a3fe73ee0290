"""The options that verbs share, each declared once, and what is made of them: NAME=VALUE pairs, lists, an agent's run."""

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Generic, NamedTuple, TypeVar

from typer import Argument, Option

from pipeline import engines
from pipeline.errors import InputError
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder

Run = Annotated[str, Option("--run", "--name", help="Name of the run, one folder below --output.")]
SomeRun = Annotated[str | None, Option("--run", "--name", help="Use what this run exported.")]
Agent = Annotated[str | None, Option("--agent", help="Use the run, backend and model that agents.yaml gives this agent.")]
Output = Annotated[Path, Option("--output", help="Folder that holds the runs.")]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object.")]
Backends = Annotated[str, Option("--backends", help="Comma-separated: vllm,llamacpp,ollama,openai.")]
OnlyEngine = Annotated[str, Argument(help="Only this engine.")]
ServedName = Annotated[str | None, Option("--served-model-name", help="Name that clients use.")]
ModelPath = Annotated[Path | None, Option("--model", "--gguf", help="This model folder or GGUF instead of a run's.")]
Purposed = Annotated[str, Option("--purpose", help="verify (fast start), serve, throughput or latency.")]
_SET = (
    "Your own value instead of the planned one: max-num-seqs=8, max-model-len=32k (1k is 1024 tokens), enforce-eager "
    "(a switch alone), dtype=auto (the plan's choice). Repeatable."
)
Set = Annotated[list[str] | None, Option("--set", metavar="KEY[=VALUE]", help=_SET)]
_MACHINES = "Another machine: rtx4060, l4, 2xa10g, h100, cpu-2c-24g, cpu-16c-64g-bf16, ..., a JSON file or inline JSON."
Hardware = Annotated[str | None, Option("--hardware", metavar="NAME|FILE.json|JSON", help=_MACHINES)]
Nodes = Annotated[int, Option("--nodes", min=1, help="Hold one model on so many equal machines; --hardware is one of them.")]
Host = Annotated[str, Option("--host", help="Address to bind; anything but 127.0.0.1 is reachable by others.")]
Port = Annotated[int, Option("--port", help="Port; 0 picks a free one.")]
Detach = Annotated[bool, Option("--detach", help="Leave it running and return.")]
Stop = Annotated[bool, Option("--stop", help="Stop the one that was left running.")]
EvalData = Annotated[str | None, Option("--eval-data", help="Held-out rows; else a share of --data is held out.")]
_STAGES = "Do it again even when nothing changed: all, or finetune, merge, gguf, modelfile, evaluate, verify."
Force = Annotated[str, Option("--force", metavar="[STAGE]", help=_STAGES)]
_COLUMNS = "Which of your columns is which, e.g. prompt=question,completion=answer."
_IGNORE = "Leave out a key of the rows that would be refused, or used. Repeatable."
_GREETING = "An assistant's turn before the first question: refuse, keep (no loss on it) or drop."
_REPEATED = "User turns that follow each other: refuse, keep or join."
Columns = Annotated[str, Option("--columns", metavar="OURS=YOURS,...", help=_COLUMNS)]
Ignore = Annotated[list[str] | None, Option("--ignore", metavar="KEY", help=_IGNORE)]
Greeting = Annotated[str, Option("--greeting", help=_GREETING)]
Repeated = Annotated[str, Option("--repeated", help=_REPEATED)]
SkipBad = Annotated[bool, Option("--skip-bad", help="Go on without rows that are refused; they are named and counted.")]
RemoteOk = Annotated[bool, Option("--remote-ok", help="Allow sending the model to an Ollama on another machine.")]
Template = Annotated[Path | None, Option("--template", help="A chat template (.jinja) instead of a run's.")]

_RunName = TypeVar("_RunName", str, str | None)


class Chosen(NamedTuple, Generic[_RunName]):
    """What is meant by the words of a verb: a run, an engine ("" for none named) and the name its model is served under."""

    run: _RunName
    engine: str
    model: str | None


def chosen(
    agent: str | None, run: _RunName, engine: str = "", model: str | None = None, *, word: str = "engine"
) -> Chosen[_RunName]:
    """The words as given, or with what agents.yaml says of the agent; InputError naming both when another one was given.

    ``word`` is what the verb calls its engine.
    """
    if agent is None:
        return Chosen(run, engine, model)
    from pipeline import config
    from pipeline.operate.agents import Agents

    found = Agents.load(config.load().agents_file).get(agent)
    _agree(f"--agent {agent} is run {found.run}", "--run", found.run, None if run == DEFAULT_NAME else run)
    if found.backend:
        _agree(f"--agent {agent} has backend {found.backend}", word, found.backend, engine)
    if found.model:
        _agree(f"--agent {agent} has model {found.model}", "--served-model-name", found.model, model)
    return Chosen(found.run, found.backend or engine, found.model or model)


def folder(agent: str | None, run: str | None, output: Path = DEFAULT_OUTPUT) -> RunFolder:
    """The folder of the run that is meant."""
    meant = chosen(agent, run).run
    return RunFolder(DEFAULT_NAME if meant is None else meant, output)


def _agree(said: str, word: str, wanted: str, given: str | None) -> None:
    if given and given != wanted:
        raise InputError(f"{said}, {word} says {given}", remedy="give one of the two")


def pair(option: str, text: str, *, form: str = "NAME=VALUE", bare: str | None = None, remedy: str = "") -> tuple[str, str]:
    """The two sides of NAME=VALUE; a NAME alone means ``bare``, or is refused when that is None."""
    name, equals, value = text.partition("=")
    if not name.strip() or (not equals and bare is None):
        raise InputError(f"{option} {text!r} is not {form}", remedy=remedy)
    return name.strip(), value if equals else str(bare)


def overrides(given: Iterable[str] | None) -> dict[str, str]:
    """What ``--set`` says, for every verb alike; values are read by ``Overrides.of``, to which an empty one is a switch alone."""
    remedy = "for example --set max_model_len=32k, or --set enforce_eager for a switch"
    return dict(pair("--set", text, form="KEY=VALUE", bare="", remedy=remedy) for text in given or ())


def allow_remote(given: bool) -> None:
    """What ``--remote-ok`` says, by the variables that say the same: the notebooks' kernels have to know it too."""
    if given:
        os.environ.update({f"{engine.prefix}_REMOTE_OK": "1" for engine in engines.every() if engine.creates_model})


def listed(text: str) -> list[str]:
    """The words of a comma-separated list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def require_known(kind: str, word: str, known: Collection[str]) -> None:
    """Raise InputError, with the known words, when a word is none of them."""
    if word not in known:
        raise InputError(f"no {kind} {word!r}", remedy="use " + ", ".join(known))
