"""Everything that can be set for a fine-tune, in one place, with its default."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pipeline.errors import InputError
from pipeline.runs.files import absolute
from training.datasets.turns import Greeting, Reading, Repeated

Method = Literal["lora", "qlora", "full"]
Trainer = Literal["auto", "unsloth", "hf"]

_Word = TypeVar("_Word", bound=str)
_GREETINGS: tuple[Greeting, ...] = get_args(Greeting)
_REPEATS: tuple[Repeated, ...] = get_args(Repeated)

_ANY = 2**63 - 1
_OPTIONAL = ("revision", "eval_data", "max_rows", "max_steps", "learning_rate")
_WHOLE = {
    **dict.fromkeys(("rank", "alpha", "batch_size", "gradient_accumulation", "max_length", "save_steps"), (1, _ANY)),
    **dict.fromkeys(("max_rows", "max_steps"), (1, _ANY)),
    "warmup_steps": (0, _ANY),
    "seed": (0, 2**32 - 1),  # numpy takes no larger one
}
_REAL: dict[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(("epochs", "learning_rate"), ("greater than 0", lambda value: 0 < value < math.inf)),
    "weight_decay": ("of at least 0", lambda value: 0 <= value < math.inf),
    "dropout": ("of at least 0 and less than 1", lambda value: 0 <= value < 1),
    "eval_share": ("between 0 and 1", lambda value: 0 < value < 1),
}


@dataclass(frozen=True)
class FinetuneParameters:
    """Parameters of one fine-tune; the same ones drive unsloth and transformers + PEFT."""

    base: str = "embedded"
    revision: str | None = None
    data: str = "soc"
    eval_data: str | None = None
    eval_share: float = 0.1
    max_rows: int | None = None
    method: Method = "lora"
    trainer: Trainer = "auto"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    learning_rate: float | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 4
    gradient_accumulation: int = 1
    warmup_steps: int = 5
    weight_decay: float = 0.0
    max_length: int = 1024
    save_steps: int = 50
    seed: int = 7
    processes: int | str = "auto"
    columns: str = ""
    ignore: tuple[str, ...] = ()
    greeting: Greeting = "refuse"
    repeated: Repeated = "refuse"
    skip_bad: bool = False

    def __post_init__(self) -> None:
        _choice("method", self.method, get_args(Method))
        _choice("trainer", self.trainer, get_args(Trainer))
        self._divide()
        object.__setattr__(self, "columns", ",".join(_words("columns", self.columns)))
        object.__setattr__(self, "ignore", _words("ignore", self.ignore))
        if not isinstance(self.skip_bad, bool):
            raise InputError(f"skip_bad={self.skip_bad!r} must be True or False")
        self.reading()  # a mapping that is none is said now
        for name, value in vars(self).items():
            if value is None and name in _OPTIONAL:
                continue
            if name in _WHOLE and not (_is(value, int) and _WHOLE[name][0] <= value <= _WHOLE[name][1]):
                lowest, highest = _WHOLE[name]
                most = f" and at most {highest}" if highest < _ANY else ""
                raise InputError(f"{name}={value!r} must be a whole number of at least {lowest}{most}")
            if name in _REAL and not (_is(value, int, float) and _REAL[name][1](value)):
                raise InputError(f"{name}={value!r} must be a number {_REAL[name][0]}")
            if name in ("base", "revision", "data", "eval_data") and not (_is(value, str) and value):
                raise InputError(f"{name}={value!r} must be text")
        # the same file is the same training, however it was typed and wherever the notebook runs
        for name in _PATHS:
            if getattr(self, name):
                object.__setattr__(self, name, absolute(getattr(self, name)))

    def _divide(self) -> None:
        """``processes`` as a number where it is one; refused when a step's rows cannot be divided over so many."""
        given = self.processes
        count = int(given) if isinstance(given, str) and given.isdecimal() else given
        object.__setattr__(self, "processes", count)
        if count == "auto":
            return
        if not _is(count, int) or int(count) < 1:
            raise InputError(f"processes={given!r} must be auto or a whole number of at least 1")
        if int(count) > 1 and self.trainer == "unsloth":
            raise InputError(f"unsloth trains in one process, not in {count}", remedy="use --trainer hf, or --processes 1")
        if _is(self.rows_a_step, int) and self.rows_a_step % int(count):
            said = f"a step's {self.rows_a_step} rows (--batch-size times --gradient-accumulation) cannot be divided over {count}"
            raise InputError(f"{said} processes", remedy="choose --batch-size or --gradient-accumulation so that they can")

    @property
    def rows_a_step(self) -> int:
        """Rows of one optimizer step, over all processes."""
        return self.batch_size * self.gradient_accumulation

    @property
    def peak_learning_rate(self) -> float:
        """What was asked for, else what suits: the small embedded base bears twenty times the usual rate of LoRA."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.method == "full":
            return 2e-5
        return 4e-3 if self.base == "embedded" else 2e-4

    @classmethod
    def from_notebook(cls, names: Mapping[str, Any]) -> "FinetuneParameters":
        """Take each field from the notebook variable of the same name in capitals."""
        return cls(**{field.name: names[field.name.upper()] for field in fields(cls) if field.name.upper() in names})

    def beside(self, folder: Path) -> dict[str, str]:
        """The paths among the parameters, as they are seen from a folder."""
        paths = {name: getattr(self, name) for name in _PATHS if getattr(self, name) and Path(getattr(self, name)).is_absolute()}
        return {name: os.path.relpath(path, folder.resolve()) for name, path in paths.items()}

    def reading(self) -> Reading:
        """How rows are to be read."""
        return reading(self.columns, self.ignore, self.greeting, self.repeated)

    def to_json(self) -> dict[str, Any]:
        """All parameters as a dict, the learning rate as it is in force; how rows are read, and processes, only where chosen."""
        chosen = {name: value for name, value in asdict(self).items() if name not in _CHOSEN or value != _CHOSEN[name]}
        return {**chosen, "learning_rate": self.peak_learning_rate}


_PATHS = ("base", "data", "eval_data")
# of a fine-tune's inputs: where base and data lie, for their hashes count, how often it is saved, and who computes it
_NOT_CONTENT = {"parameters": (*_PATHS, "revision", "save_steps", "processes"), "base": ("id", "revision", "note")}


def content(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the outcome of a fine-tune depends on, of its recorded inputs: a base or data file that was moved is the same one."""
    kept = {part: said for part, said in inputs.items() if part != "beside"}
    for part, names in _NOT_CONTENT.items():
        if isinstance(kept.get(part), Mapping):
            kept[part] = {name: value for name, value in kept[part].items() if name not in names}
    return kept


# how rows are read and by how many processes, and the values under which nothing was chosen: a run from before there was a
# choice is the same run
_CHOICES = ("columns", "ignore", "greeting", "repeated", "skip_bad", "processes")
_CHOSEN = {field.name: field.default for field in fields(FinetuneParameters) if field.name in _CHOICES}


def reading(columns: str = "", ignore: Sequence[str] = (), greeting: str = "refuse", repeated: str = "refuse") -> Reading:
    """The Reading of ``ours=theirs,...`` and keys to leave out.

    Raises InputError when a side is missing, a name is given twice, or ``greeting`` or ``repeated`` is none of theirs.
    """
    pairs = [(ours.strip(), theirs.strip()) for ours, _, theirs in (pair.partition("=") for pair in columns.split(",") if pair)]
    known = dict(pairs)
    if not all(map(all, pairs)) or len(known) < len(pairs) or len(set(known.values())) < len(pairs):
        raise InputError(
            f"columns={columns!r} must name each column once", remedy="for example prompt=question,completion=answer"
        )
    left_out = frozenset(ignore)
    return Reading(known, left_out, _choice("greeting", greeting, _GREETINGS), _choice("repeated", repeated, _REPEATS))


def _choice(name: str, value: Any, known: tuple[_Word, ...]) -> _Word:
    if value not in known:
        raise InputError(f"{name}={value!r} is not known", remedy=f"use one of {', '.join(known)}")
    return value  # type: ignore[no-any-return]


def _words(name: str, value: object) -> tuple[str, ...]:
    """Words separated by commas, out of a list (each as it is, with its commas), or out of a dict."""
    if isinstance(value, Mapping):
        value = [f"{ours}={theirs}" for ours, theirs in value.items()]
    words = value.split(",") if isinstance(value, str) else value
    if words is None:
        return ()
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise InputError(f"{name}={value!r} must be text or a list of texts")
    return tuple(sorted({word.strip() for word in words if word.strip()}))


def _is(value: object, *kinds: type) -> bool:
    """Whether a value is of these kinds; True is no number here."""
    return isinstance(value, kinds) and not isinstance(value, bool)
