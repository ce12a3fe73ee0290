"""``--agent`` for every verb that takes a run, added in one place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.models import OptionInfo

from pipeline.config import load
from pipeline.errors import InputError
from pipeline.operate.agents import Agents
from pipeline.runs.folder import DEFAULT_NAME

_NAMED = {"--run", "--name"}
# parameters of verbs that say what an agent's backend and model say, with the words a person gives them
_BACKEND = {"engine": "engine", "service": "service"}
_MODEL = {"name": "--served-model-name"}


def add_agent_option(app: typer.Typer) -> None:
    """Give ``--agent`` to every verb that takes a run: it stands for the run, backend and model that agents.yaml names."""
    for command in app.registered_commands:
        parameter = _run_parameter(command.callback)
        if command.callback is not None and parameter:
            command.callback = _with_agent(command.callback, parameter)


def _run_parameter(callback: Callable[..., Any] | None) -> str | None:
    """The name of the parameter that holds the run, when the verb has one."""
    if callback is None:
        return None
    hints = inspect.get_annotations(callback, eval_str=True)
    if "agent" in hints:
        return None
    for name, hint in hints.items():
        # inside Annotated, typer keeps the first option string where a default would stand
        options = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, OptionInfo)]
        declared = {word for option in options for word in (option.default, *(option.param_decls or ()))}
        if declared & _NAMED:
            return name
    return None


def _with_agent(callback: Callable[..., Any], parameter: str) -> Callable[..., Any]:
    @functools.wraps(callback)
    def verb(*args: Any, agent: str | None = None, **values: Any) -> Any:
        if agent is not None:
            found = Agents.load(load().agents_file).get(agent)
            _set(values, parameter, "--run", found.run, f"--agent {agent} is run {found.run}")
            for words, given in ((_BACKEND, found.backend), (_MODEL, found.model)):
                for name in (words.keys() & values.keys()) - {parameter} if given else ():
                    kind = "backend" if words is _BACKEND else "model"
                    _set(values, name, words[name], str(given), f"--agent {agent} has {kind} {given}")
        return callback(*args, **values)

    option = Annotated[
        str | None, typer.Option("--agent", help="Use the run, backend and model that agents.yaml gives this agent.")
    ]
    signature = inspect.signature(callback, eval_str=True)
    added = inspect.Parameter("agent", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
    verb.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])  # type: ignore[attr-defined]
    verb.__annotations__ = {**inspect.get_annotations(callback, eval_str=True), "agent": option}
    return verb


def _set(values: dict[str, Any], name: str, word: str, wanted: str, said: str) -> None:
    """Put the agent's value in a parameter that was left out; InputError naming both when another one was given."""
    if values.get(name) not in (None, "", DEFAULT_NAME, wanted):
        raise InputError(f"{said}, {word} says {values[name]}", remedy="give one of the two")
    values[name] = wanted
