"""Your own checks of a served model: a YAML file of prompts and checks, or a function of yours that asks what it likes.

A YAML file is a list of entries, or ``{system: ..., minimum: 0.9, prompts: [...]}``; an entry has a ``prompt`` (or
``messages``) and a ``check`` with one of ``exact``, ``contains``, ``regex``, ``json_schema``. A function gets ``ask`` (prompt or
messages in, text out) and returns names with True, False or a share from 0 to 1.

Tasks of lm-evaluation-harness (``--tasks``) show what the training made the model forget. The harness is optional and fetches
its tasks' data sets: pip install "lm-eval[api]".
"""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline import engines
from pipeline.errors import EngineError, InputError
from pipeline.net.chat import chat, greedy
from pipeline.net.client import open_client
from pipeline.prompts.conversation import Conversation
from pipeline.prompts.neutralise import control_tokens, neutralise_message
from pipeline.report.check import Check, held, skipped
from pipeline.runs.folder import RunFolder
from pipeline.serve.start import Endpoint

Ask = Callable[[str | Sequence[Mapping[str, Any]]], str]
_TOKENS = 256
_SHOWN = 120
# of one run of the harness
_SECONDS = 3600


class Rule(BaseModel):
    """Exactly one way to judge an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    exact: str | None = None
    contains: str | None = None
    regex: str | None = None
    json_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one(self) -> "Rule":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a check is one of exact, contains, regex, json_schema; this has {', '.join(given) or 'none'}")
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as error:
                raise ValueError(f"the regular expression is wrong: {error}") from None
        return self

    def passes(self, text: str) -> bool:
        """Whether an answer is as it should be."""
        if self.exact is not None:
            return text.strip() == self.exact.strip()
        if self.contains is not None:
            return self.contains in text
        if self.regex is not None:
            return re.search(self.regex, text) is not None
        return _fits(text, self.json_schema or {})


class Entry(BaseModel):
    """A prompt (or messages) and the check of its answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    check: Rule
    name: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _asked(self) -> "Entry":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    @property
    def title(self) -> str:
        """The entry's name, else its prompt."""
        return self.name or self.prompt or str((self.messages or [{}])[-1].get("content", ""))


class Suite(BaseModel):
    """The whole file; ``minimum`` is the share of entries that must pass."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: list[Entry] = Field(min_length=1)
    system: str | None = None
    minimum: float = Field(default=1.0, ge=0, le=1)


def _fits(text: str, schema: Mapping[str, Any]) -> bool:
    import jsonschema

    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, RecursionError, jsonschema.ValidationError):
        return False
    except jsonschema.SchemaError as error:
        raise InputError(f"the JSON schema is wrong: {error.message}") from None
    return True


def read_suite(path: Path) -> Suite:
    """Read a YAML file of checks; InputError names the file and the entry that is wrong."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({error})") from None
    try:
        return Suite.model_validate({"prompts": data} if isinstance(data, list) else data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        remedy = "see granite-pipeline certify --help for the format"
        raise InputError(f"{path}: {where}: {first['msg']}", remedy=remedy) from None


def load_function(spec: str) -> Callable[[Ask], Mapping[str, bool | float]]:
    """Import ``module:function``, from the current folder too; InputError when there is no such thing."""
    module, _, name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"--eval {spec}: {error}", remedy="give module:function, or a .yaml file of checks") from None
    if not callable(found):
        raise InputError(f"--eval {spec}: {name} is not a function")
    return found  # type: ignore[no-any-return]


def load(spec: str) -> Suite | Callable[[Ask], Mapping[str, bool | float]]:
    """A ``--eval`` argument: a YAML file, or module:function. Raises InputError before any server is asked."""
    return read_suite(Path(spec)) if spec.endswith((".yaml", ".yml")) else load_function(spec)


def run_own(spec: str, endpoint: Endpoint, run: RunFolder) -> Check:
    """Put one ``--eval`` to an endpoint."""
    loaded, ask = load(spec), asker(endpoint, run)
    name = re.sub(r"[^A-Za-z0-9_]+", "_", Path(spec).stem if isinstance(loaded, Suite) else spec)
    check_id = f"own.{endpoint.engine}_{name}"
    if isinstance(loaded, Suite):
        return _suite(check_id, loaded, ask)
    try:
        results = {str(key): float(value) for key, value in loaded(ask).items()}
    except EngineError:
        raise
    except Exception as error:  # the user's own code may raise anything
        return Check(check_id, "failed", f"{spec} raised {error!r}", "every result true, or a share of 1")
    wrong = {key: value for key, value in results.items() if value < 1}
    figure = f"{len(results) - len(wrong)} of {len(results)} hold" + "".join(f"; {key} {value:g}" for key, value in wrong.items())
    return held(check_id, bool(results) and not wrong, figure, "every result true, or a share of 1", spec, results=results)


def _suite(check_id: str, suite: Suite, ask: Ask) -> Check:
    start = [{"role": "system", "content": suite.system}] if suite.system else []
    cases = []
    for entry in suite.prompts:
        answer = ask([*start, *(entry.messages or [{"role": "user", "content": entry.prompt}])])
        cases.append({"name": entry.title, "passed": entry.check.passes(answer), "answer": answer})
    wrong = [case for case in cases if not case["passed"]]
    passed = len(cases) - len(wrong)
    figure = f"{passed} of {len(cases)} answers as they should be"
    if wrong:
        figure += f"; first that is not: {str(wrong[0]['name'])[:_SHOWN]!r} answered {str(wrong[0]['answer'])[:_SHOWN]!r}"
    ok = passed >= suite.minimum * len(cases) - 1e-9
    return held(check_id, ok, figure, f"at least {suite.minimum:.0%}", "the suite's own minimum", cases=cases)


def asker(endpoint: Endpoint, run: RunFolder) -> Ask:
    """A function that puts a prompt or messages to an endpoint, greedily, and returns the answer's text."""
    controls = control_tokens(run.merged) if run.merged.is_dir() else frozenset()

    def ask(prompt: str | Sequence[Mapping[str, Any]]) -> str:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]
        asked = Conversation("", tuple(neutralise_message(message, controls) for message in messages))
        body = greedy(endpoint.model, (), _TOKENS) | engines.get(endpoint.engine).chat_body(asked)
        with open_client(endpoint.url, endpoint.api_key) as client:
            return chat(client, body, f"{endpoint.engine}: a question of --eval failed:").text

    return ask


def command(endpoint: Endpoint, run: RunFolder, tasks: str, target: Path) -> list[str]:
    """The harness's argv: completions with log-probabilities, tokenised as the merged model does."""
    arguments = f"model={endpoint.model},base_url={endpoint.url}/v1/completions,tokenizer={run.merged}"
    arguments += ",tokenizer_backend=huggingface,num_concurrent=4"
    harness = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    return [*harness, "--tasks", tasks, "--output_path", str(target)]


def run_tasks(endpoint: Endpoint, run: RunFolder, tasks: str) -> Check:
    """Scores of the tasks; skipped, with the reason, when the harness is not installed or fails."""
    check_id = f"own.{endpoint.engine}_tasks"
    if importlib.util.find_spec("lm_eval") is None:
        return skipped(check_id, 'lm-evaluation-harness is not installed: pip install "lm-eval[api]"')
    with TemporaryDirectory(prefix="lm-eval-") as scratch:
        target = Path(scratch)
        try:
            argv = command(endpoint, run, tasks, target)
            done = subprocess.run(argv, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return skipped(check_id, f"{tasks} took more than {_SECONDS} s")
        found = sorted(target.rglob("results*.json"))
        if done.returncode != 0 or not found:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return skipped(check_id, f"lm-eval ended with exit code {done.returncode}: {last[:300]}")
        return read_results(check_id, json.loads(found[-1].read_text(encoding="utf-8")))


def read_results(check_id: str, results: dict[str, Any]) -> Check:
    """The harness's results file as a finding; its scores are stated, not bounded."""
    scores = {
        f"{task} {metric.partition(',')[0]}": value
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric
    }
    figure = ", ".join(f"{name} {value:.4g}" for name, value in scores.items()) or "no score"
    return Check(check_id, "passed", figure, "stated, not bounded", "lm-evaluation-harness", scores)
