"""The run's manifest: every stage appends what it read, with which parameters, and the hashes of what it made.

A run folder can be moved: artefacts and what was started are named relative to it, and the run is called as its folder is.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.runs import lease
from pipeline.runs.files import read_json, tree_bytes, write_json
from pipeline.runs.hashes import HashCache, sha256_json, tree_digest
from pipeline.runs.text import masked, relative

SCHEMA = 1
_KEPT = 20
_Json = Mapping[str, Any]
Counts = Callable[[_Json], _Json]


@dataclass(frozen=True)
class Seal:
    """An artefact as its stage left it; ``files`` has the hash of each file of a folder (empty where an older version wrote it)."""

    sha256: str
    bytes: int
    files: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        return {name: value for name, value in asdict(self).items() if name != "files" or value}


@dataclass(frozen=True)
class StageRecord:
    """What a finished stage recorded; ``key`` is the hash of ``inputs``, artefacts are named relative to the run folder."""

    key: str
    inputs: _Json
    artefacts: Mapping[str, Seal]
    result: dict[str, Any]
    seconds: float
    finished_at: str
    raw: _Json = field(repr=False, compare=False)

    @property
    def intact(self) -> bool | None:
        """Whether the record is as it was written; None when an older version wrote no seal."""
        return seal_holds(self.raw)

    @classmethod
    def from_json(cls, raw: _Json) -> "StageRecord":
        """Read what the manifest holds of a stage; KeyError, TypeError or AttributeError when it is something else."""
        sealed_as = {name: {**seen, "files": {**seen.get("files", {})}} for name, seen in raw["artefacts"].items()}
        artefacts = {name: Seal(**_known(Seal, seen)) for name, seen in sealed_as.items()}
        inputs, result = {**raw.get("inputs", {})}, {**raw["result"]}
        return cls(raw["key"], inputs, artefacts, result, raw["seconds"], raw["finished_at"], raw)


@dataclass(frozen=True)
class BaseRecord:
    """The base model a training began with: id or folder, hub revision (None for a folder), hash of its files, what it is."""

    id: str = ""
    revision: str | None = None
    sha256: str = ""
    note: str = ""


@dataclass(frozen=True)
class TrainingRecord:
    """What the fine-tune recorded: what it was given (``base``, ``data`` hashes by part, ``parameters``), then what came of it.

    ``beside`` has the paths among the parameters as seen from the run folder: who moves that may move all of it.

    ``history`` has a record a logged step, ``eval_loss`` is the held-out loss ``before`` and ``after``, ``system`` the system
    message that all rows share, ``date`` what dated chat templates were told, ``account`` what became of the rows' keys,
    ``base_folder`` where a hub's snapshot lay. What an older version did not record is empty.
    """

    base: BaseRecord
    data: Mapping[str, str]
    parameters: _Json
    beside: Mapping[str, str] = field(default_factory=dict)
    method: str = ""
    trainer: str = ""
    dtype: str = ""
    steps: int = 0
    train_seconds: float = 0.0
    tokens_per_second: float = 0.0
    rows: _Json = field(default_factory=dict)
    eval_loss: Mapping[str, float] = field(default_factory=dict)
    history: Sequence[_Json] = ()
    system: str | None = None
    date: str | None = None
    account: _Json = field(default_factory=dict)
    base_folder: str = ""

    @classmethod
    def of(cls, record: StageRecord) -> "TrainingRecord":
        """Take the fields from the fine-tune's record."""
        given = {"data": {}, "parameters": {}, **record.inputs}
        base = BaseRecord(**_known(BaseRecord, given.get("base", {})))
        return cls(**_known(cls, {**record.result, **given, "base": base}))

    def places(self, run: Path) -> list[dict[str, Any]]:
        """The parameters as they were, then with paths as they are seen from the run folder now: hashes say which are meant."""
        moved = {
            name: path for name, seen in self.beside.items() if (path := str((run / seen).resolve())) != self.parameters[name]
        }
        return [dict(self.parameters), *([{**self.parameters, **moved}] if moved else [])]

    @property
    def full(self) -> bool:
        """True after full fine-tuning: ``adapter/`` is then a whole model."""
        return bool(self.parameters.get("method") == "full")

    @property
    def cut_short(self) -> bool:
        """True for a training that was limited on purpose (steps, rows, less than one epoch): a try-out or a test."""
        asked = self.parameters
        return asked.get("max_steps") is not None or asked.get("max_rows") is not None or asked.get("epochs", 1) < 1


@dataclass(frozen=True)
class ServedRecord:
    """One backend of the last verification: what was started, with which flags, on which file; None where it is not known."""

    engine_version: str | None = None
    argv: Sequence[str] | None = None
    env: Mapping[str, str] | None = None
    sha256: str | None = None
    status: str | None = None
    raw: _Json = field(default_factory=dict, repr=False, compare=False)

    @property
    def intact(self) -> bool:
        """Whether the record has a seal and is as it was written."""
        return bool(seal_holds(self.raw))

    @classmethod
    def from_json(cls, raw: _Json) -> "ServedRecord":
        """Read what the manifest holds of a backend, or what a report entry says of it."""
        return cls(**_known(cls, {**raw, "raw": raw}))

    def to_json(self) -> dict[str, Any]:
        """As the manifest keeps it, with its seal."""
        return sealed({name: value for name, value in vars(self).items() if name != "raw"})


def _known(record: type, raw: _Json) -> dict[str, Any]:
    """What of a JSON object a record has fields for."""
    return {field.name: raw[field.name] for field in fields(record) if field.name in raw}


class Manifest:
    """``manifest.json`` of one run; paths below its folder are stored relative to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"schema": SCHEMA, "run": path.parent.name, "stages": {}}
        if path.exists():
            self.data = _checked(read_json(path), path)

    @property
    def run(self) -> str:
        """Name of the run: its folder's, which may be another one than when it was made."""
        return self.path.absolute().parent.name

    @property
    def stages(self) -> dict[str, StageRecord]:
        """What every finished stage recorded, by its name."""
        return {name: StageRecord.from_json(raw) for name, raw in self.data["stages"].items()}

    def stage(self, name: str) -> StageRecord | None:
        """What a stage recorded; None when it never finished."""
        raw = self.data["stages"].get(name)
        return None if raw is None else StageRecord.from_json(raw)

    @property
    def training(self) -> TrainingRecord | None:
        """What the fine-tune recorded; None when it never finished."""
        record = self.stage("finetune")
        return TrainingRecord.of(record) if record else None

    def require_training(self) -> TrainingRecord:
        """As :attr:`training`; InputError when no whole record of a fine-tune is there."""
        record = self.stage("finetune")
        if record is None or not {"parameters", "base", "data"} <= set(record.inputs):
            name = self.path.parent.name
            raise InputError(f"run {name} has no finished fine-tune", remedy=f"granite-pipeline train --name {name}")
        return TrainingRecord.of(record)

    @property
    def served(self) -> dict[str, ServedRecord]:
        """What the last verification served, by backend."""
        return {name: ServedRecord.from_json(raw) for name, raw in self.data.get("served", {}).items()}

    def holds(self, record: StageRecord | None, inputs: _Json, counts: Counts = dict) -> bool:
        """True when a record was made with these inputs, as far as they count, and its artefacts are on disk unchanged."""
        if record is None or not (record.key == sha256_json(inputs) or _same(record, inputs, counts)):
            return False
        return all(self._unchanged(relative, seen) for relative, seen in record.artefacts.items())

    def record(self, name: str, inputs: _Json, artefacts: list[Path], result: _Json, seconds: float) -> None:
        """Store a finished stage: its inputs, the hash of each artefact and its results; written atomically."""
        self._store(name, self.entry(inputs, artefacts, result, seconds))

    def restate(self, name: str, inputs: _Json) -> None:
        """Give a stage's record inputs that count the same: its base or data lie elsewhere now."""
        self._store(name, {**self.data["stages"][name], "key": sha256_json(inputs), "inputs": dict(inputs)})

    def _store(self, name: str, entry: _Json) -> None:
        record = sealed({key: value for key, value in entry.items() if key != "seal"})
        with self.changing() as data:
            data["stages"][name] = record

    def entry(self, inputs: _Json, artefacts: list[Path], result: _Json, seconds: float) -> dict[str, Any]:
        """What is stored of something that was done: its inputs and their key, the hash of each artefact, its results."""
        return {
            "key": sha256_json(inputs),
            "inputs": dict(inputs),
            "artefacts": {p.relative_to(self.path.parent).as_posix(): self.seal(p).to_json() for p in artefacts if p.exists()},
            "result": dict(result),
            "seconds": round(seconds, 1),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def artefact_sha256(self, stage: str, relative: str) -> str:
        """Recorded hash of an artefact; KeyError when the stage has not made it."""
        return self.stages[stage].artefacts[relative].sha256

    def changed(self) -> list[tuple[str, str, str]]:
        """(stage, artefact, "missing" or "changed") for every artefact that is not as its stage recorded it."""
        return [
            (name, relative, "changed" if (self.path.parent / relative).exists() else "missing")
            for name, stage in self.stages.items()
            for relative, seen in stage.artefacts.items()
            if not self._unchanged(relative, seen)
        ]

    def record_served(self, served: Mapping[str, ServedRecord]) -> None:
        """Store what a verification served, in place of what the one before did; written atomically."""
        with self.changing() as data:
            data["served"] = {name: one.to_json() for name, one in served.items()}

    def append(self, key: str, entry: _Json) -> None:
        """Add a dated entry to a list in the manifest, of which the last twenty are kept; written atomically."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        with self.changing() as data:
            data[key] = [*data.get(key, []), {"at": at, **relative(entry, self.path.parent)}][-_KEPT:]

    @contextmanager
    def changing(self) -> Iterator[dict[str, Any]]:
        """The manifest as it is on disk now, to be changed inside; then written atomically, without secrets.

        No other process writes in between: a server may be started beside a training that holds the run. LeaseLost, and
        nothing is changed, when this process held the run and another one has taken it over: no takeover falls in between.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with lease.publishing(self.path), lease.guarded(self.path.parent):
            if self.path.exists():
                self.data = _checked(read_json(self.path), self.path)
            yield self.data
            write_json(self.path, masked(self.data))

    def _unchanged(self, relative: str, seen: Seal) -> bool:
        path = self.path.parent / relative
        return path.exists() and tree_bytes(path) == seen.bytes and self.sha256(path) == seen.sha256

    def sha256(self, path: Path) -> str:
        """Hash of a file or folder, read again only when the file system says that it changed."""
        return HashCache(self.path.parent).tree(path)

    def seal(self, path: Path) -> Seal:
        """Hash and size of a file or folder as it is now."""
        if path.is_file():
            return Seal(self.sha256(path), tree_bytes(path))
        files = HashCache(self.path.parent).files(path)
        return Seal(tree_digest(files), tree_bytes(path), files)


def _same(record: StageRecord, inputs: _Json, counts: Counts) -> bool:
    """Whether a record that nobody edited has inputs that count as these do."""
    whole = record.intact is not False and record.key == sha256_json(record.inputs)
    return whole and sha256_json(counts(record.inputs)) == sha256_json(counts(inputs))


def sealed(record: _Json) -> dict[str, Any]:
    """A record as the manifest keeps it, without secrets, and its own hash in it."""
    kept = masked(record)
    return {**kept, "seal": _sealed(kept)}


def seal_holds(record: _Json) -> bool | None:
    """Whether a record is as it was written; None for one that has no seal."""
    known = record.get("seal")
    return None if known is None else bool(known == _sealed({key: value for key, value in record.items() if key != "seal"}))


def _checked(data: Any, path: Path) -> dict[str, Any]:
    """The manifest when it has the form that every stage relies on; InputError otherwise."""
    try:
        whole = data["schema"] == SCHEMA and isinstance(data["stages"], dict)
        for raw in data["stages"].values():
            StageRecord.from_json(raw)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise InputError(f"{path} is not a run's manifest", remedy="move it away; the stages then run again")
    return dict(data)


def _sealed(record: _Json) -> str:
    # as it will be read back: tuples are lists then, and keys are text
    return sha256_json(json.loads(json.dumps(record)))
