"""``SPEC.yaml`` of a sweep: which runs there are, each with its notebook parameters; all of it is checked before anything starts.

base: embedded                  # as DATA, EVAL_DATA and any other parameter it may stand below parameters or in a run, too
data: alerts.jsonl              # paths are those beside the spec
stages: [01_finetune, 02_export]
parameters: {EPOCHS: 2}         # what all runs share
runs:                           # named runs, each with what is its own ...
  triage: {DATA: triage.jsonl, RANK: 32}
grid: {SEED: [1, 2, 3]}         # ... times every combination of these; without runs the spec's name is the run's
resources: {cpus: 4, gpus: 1, memory_gib: 24}   # of one run
metric: exact
"""

import ast
import glob
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import batch, engines
from pipeline.errors import InputError, at
from pipeline.runs.files import absolute, matches
from pipeline.runs.folder import RunFolder
from pipeline.sweep.document import Document

DEFAULT_STAGES = ("01_finetune", "02_export")
RESULTS = PAGE, RECORD = "sweep.html", "sweep.json"
_SHORT = {"base": "BASE", "data": "DATA", "eval_data": "EVAL_DATA"}
_KEYS = (*_SHORT, "stages", "parameters", "runs", "grid", "resources", "metric")
_PATHS = ("BASE", "DATA", "EVAL_DATA")
_BACKENDS = ("BACKENDS", "SERVE")
# what a sweep says itself, and what would do every run again whenever the sweep goes on
_RESERVED = {
    "NAME": "the names below runs, and the values of grid, are the runs' names",
    "OUTPUT": "give granite-pipeline sweep --output",
    "FORCE": "granite-pipeline run --name NAME --force does one run again",
}
_MOST_RUNS = 100_000
Check = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its name, and its notebook parameters by name."""

    name: str
    parameters: Mapping[str, Any]

    def argv(self, stages: Sequence[str], output: Path) -> list[str]:
        """The words after ``granite-pipeline`` that do this run."""
        given = [word for name, value in self.parameters.items() for word in ("-p", f"{name}={_word(value)}")]
        return ["run", "--name", self.name, "--output", str(output), "--stages", ",".join(stages), *given]


@dataclass(frozen=True)
class Resources:
    """What one run is given: cores, GPUs (a half is one GPU for two runs) and memory in GiB; None: not said."""

    cpus: float | None = None
    gpus: float | None = None
    memory_gib: float | None = None


@dataclass(frozen=True)
class Sweep:
    """A whole spec, checked."""

    path: Path
    stages: tuple[str, ...]
    runs: tuple[Run, ...]
    resources: Resources
    metric: str

    @property
    def varied(self) -> tuple[str, ...]:
        """The parameters that are not the same in all runs."""
        names = dict.fromkeys(name for run in self.runs for name in run.parameters)
        seen = {name: {json.dumps(run.parameters.get(name), sort_keys=True) for run in self.runs} for name in names}
        return tuple(name for name in names if len(seen[name]) > 1)


def load(path: Path, check: Check) -> Sweep:
    """Read and check a spec; ``check`` is given parameters and raises InputError for a value that cannot be.

    InputError names the file, its line and the key of the first thing that is wrong.
    """
    return _Reader(path, check).sweep()


class _Reader:
    """One reading of one file, whose errors name the line and the key."""

    def __init__(self, path: Path, check: Check) -> None:
        self.path, self.check = path, check
        self.document = Document(path)
        self.data, self._where, self._wrong = self.document.data, self.document.where, self.document.wrong
        if not self.data:
            raise InputError(f"{path} holds no sweep", remedy=f"its keys are {', '.join(_KEYS)}; see docs/scale.md")

    def sweep(self) -> Sweep:
        self._known(self.data, _KEYS, "")
        self.stages = stages = self._stages()
        self.declared = {name: text for names in batch.declared_by(stages, {}).values() for name, text in names.items()}
        runs = list(self._runs())
        return Sweep(self.path, stages, tuple(runs), self._resources(), self._metric(stages))

    def _known(self, found: Mapping[str, Any], keys: Sequence[str], above: str) -> None:
        from difflib import get_close_matches

        for name in found:
            if name not in keys:
                near = get_close_matches(name, keys, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                inner = f"{above}.{name}" if above else name
                raise self._wrong(inner, "no such key", f"{hint}Known: {', '.join(keys)}")

    def _mapping(self, key: str, found: Any) -> dict[str, Any]:
        if found is not None and not isinstance(found, dict):
            raise self._wrong(key, f"{found!r} is not a mapping of names to values", f"for example {key}: {{EPOCHS: 2}}")
        return found or {}

    def _stages(self) -> tuple[str, ...]:
        found = self.data.get("stages")
        if found is None:
            return DEFAULT_STAGES
        wanted = [word.strip() for word in found.split(",")] if isinstance(found, str) else found
        if not isinstance(wanted, list) or not wanted:
            raise self._wrong("stages", f"{found!r} is not a list of notebooks", f"some of {', '.join(batch.STAGES)}")
        if unknown := [word for word in wanted if word not in batch.STAGES]:
            raise self._wrong("stages", f"no notebook {unknown[0]!r}", f"known: {', '.join(batch.STAGES)}")
        return tuple(stage for stage in batch.STAGES if stage in wanted)

    def _resources(self) -> Resources:
        found = self._mapping("resources", self.data.get("resources"))
        names = tuple(Resources.__dataclass_fields__)
        self._known(found, names, "resources")
        for name, value in found.items():
            least = 0 if name == "gpus" else 1e-6
            fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value < 1e6
            if not fits or (name == "gpus" and value > 1 and value != int(value)):
                number = "a number of at least 0, whole above 1" if name == "gpus" else "a number greater than 0"
                raise self._wrong(f"resources.{name}", f"{value!r} is not {number}", "leave it out when it does not matter")
        return Resources(**found)

    def _metric(self, stages: Sequence[str]) -> str:
        found = self.data.get("metric")
        if found is None:
            return default_metric(stages)
        if not isinstance(found, str) or not found:
            raise self._wrong("metric", f"{found!r} is not the name of a score", "for example exact, or eval_loss")
        with at(f"{self._where('metric')}: metric"):
            require_metric(found, stages)
        return found

    def _runs(self) -> Iterator[Run]:
        shared = self._mapping("parameters", self.data.get("parameters"))
        shared = self._parameters("parameters", shared)
        for key, name in _SHORT.items():
            if key in self.data:
                if name in shared:
                    raise self._wrong(f"parameters.{name}", f"{key} says it already", "leave one of the two")
                shared[name] = self._parameter(key, name, self.data[key])
        named = self._mapping("runs", self.data.get("runs"))
        own = {name: self._parameters(f"runs.{name}", self._mapping(f"runs.{name}", given)) for name, given in named.items()}
        grid = self._grid({"parameters": shared, **{f"runs.{name}": given for name, given in own.items()}})
        if not own and not grid:
            raise InputError(f"{self.path} names no run", remedy="give runs (by name), a grid (parameters with lists), or both")
        total = max(len(own), 1)
        for several in grid.values():
            total *= len(several)
        if total > _MOST_RUNS:
            raise self._wrong("grid", f"{total:,} runs are more than {_MOST_RUNS:,}", "use fewer values, or several specs")
        taken: dict[str, str] = {}
        for name, given in (own or {self.path.stem: {}}).items():
            for chosen in itertools.product(*grid.values()):
                values = dict(zip(grid, chosen, strict=True))
                whole = "-".join([name, *(f"{key}{_spelled(value)}" for key, value in values.items())])
                said = f"runs.{name}" if own else "grid"
                self._usable(whole, said)
                told = " ".join([said, *(f"{key}={_word(value)}" for key, value in values.items())])
                if whole in taken:
                    what = f"its run {whole} has the name of {taken[whole]}"
                    raise self._wrong(said, f"{told}: {what}", "name these runs yourself, below runs")
                taken[whole] = told
                parameters = {**shared, **given, **values}
                with at(f"{self._where(said)}: {told}"):
                    self.check(parameters)
                yield Run(whole, parameters)

    def _usable(self, name: str, key: str) -> None:
        with at(f"{self._where(key)}: {key}"):
            RunFolder(name)
        if name in RESULTS:
            raise self._wrong(key, f"a run cannot be called {name}, as the sweep's own result is", "use another name")

    def _grid(self, others: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for name, values in self._mapping("grid", self.data.get("grid")).items():
            key = f"grid.{name}"
            if not isinstance(values, list) or not values:
                raise self._wrong(key, f"{values!r} is not a list of values", f"for example {name}: [1, 2, 3]")
            for place, given in others.items():
                if name in given:
                    raise self._wrong(key, f"{place} gives {name} too", "leave one of the two")
            found[name] = [self._parameter(f"{key}[{i}]", name, value) for i, value in enumerate(values)]
            for i, value in enumerate(found[name]):
                if any(_word(value) == _word(before) for before in found[name][:i]):
                    raise self._wrong(f"{key}[{i}]", f"{_word(value)} is there twice", "leave one of the two")
        return found

    def _parameters(self, key: str, given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._parameter(f"{key}.{name}", name, value) for name, value in given.items()}

    def _parameter(self, key: str, name: str, value: Any) -> Any:
        """One parameter, checked as far as that can be done without reading the data; paths are absolute then."""
        if name in _RESERVED:
            raise self._wrong(key, f"{name} is not a sweep's to give", _RESERVED[name])
        with at(f"{self._where(key)}: {key}"):
            if name not in self.declared:
                batch.declared_by(self.stages, {name: value})
            _require_kind(value, self.declared[name])
            if name in _PATHS and isinstance(value, str):
                value = _source(name, value, self.path.absolute().parent)
            if name in _BACKENDS:
                for backend in value:
                    engines.get(backend)
            self.check({name: value})
        return value


def default_metric(stages: Sequence[str]) -> str:
    """The score that runs are compared by where none is named: what the export measures, else the held-out loss."""
    return "exact" if "02_export" in stages else "eval_loss"


def require_metric(metric: str, stages: Sequence[str]) -> None:
    """Raise InputError for a score that none of the stages measures."""
    if metric != "eval_loss" and "02_export" not in stages:
        known = "eval_loss is what 01_finetune measures"
        raise InputError(f"{metric!r} is measured by 02_export, which is not among the stages", remedy=known)


def _require_kind(value: Any, default: str) -> None:
    """Refuse a value of another kind than the notebook's default, where that tells one."""
    known = ast.literal_eval(default)
    kinds: dict[type, tuple[tuple[type, ...], str]] = {
        bool: ((bool,), "true or false"),
        list: ((list,), "a list"),
        dict: ((dict,), "a mapping"),
        int: ((int, float), "a number"),
        float: ((int, float), "a number"),
        str: ((str, list, dict), "text"),
    }
    wanted = kinds.get(type(known))
    if wanted is None:
        return
    fits = isinstance(value, wanted[0]) and (isinstance(known, bool) or not isinstance(value, bool))
    optional = value is None and not isinstance(known, bool | list | dict)
    if not fits and not optional:
        raise InputError(f"{value!r} is not {wanted[1]}", remedy=f"its default is {default}")


def _source(name: str, value: str, folder: Path) -> str:
    """A base or data as it is seen from everywhere: paths are those beside the spec; InputError where there is none."""
    if value in ("soc", "embedded") or value.startswith("hub:"):
        return value
    path = str(folder / Path(value).expanduser())
    if Path(path).exists() or (glob.has_magic(path) and matches(path)):
        return absolute(path)
    if name != "BASE" or value.startswith(("/", ".", "~")) or value.count("/") != 1:
        raise InputError(f"there is no {path}", remedy="paths are those beside the spec, or absolute ones")
    return value


def _word(value: Any) -> str:
    """A value as ``run -p`` takes it: JSON, or the text itself where that cannot be read as anything else."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            if value not in ("True", "False", "None"):
                return value
    return json.dumps(value)


def _spelled(value: Any) -> str:
    """A value as part of a run's name."""
    if isinstance(value, str) and "/" in value:
        value = Path(value).stem
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
