"""What a ``--data`` value means: a file, a folder or glob of files, or a dataset on the hub; and its rows as plain records."""

import glob
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, EnvironmentFailure, MissingDependency
from pipeline.runs.files import matches, require_path
from training.datasets.rows import Advance, Record, text_rows

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_PACKED = tuple(f"{suffix}.gz" for suffix in SUFFIXES if suffix != ".parquet")
_MAGIC = {
    b"\x1f\x8b": "is gzip-compressed; name it .jsonl.gz or .csv.gz, as what is in it",
    b"PK\x03\x04": "is a ZIP archive or a spreadsheet; unpack it, or save the sheet as CSV",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
    b"PAR1": "is a Parquet file; name it .parquet",
}
# a split may be cut: train[:10%]
_WORD = r"[\w.%+-]+(?:\[[^]]*\][\w.%+:\[\]-]*)?"
_HUB = re.compile(rf"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<one>{_WORD}))?(:(?P<two>{_WORD}))?", re.ASCII)
_HUB_FORM = "hub:owner/name[@revision][:config][:split]"
# what people lay beside their data, which is none
_NOTES = ("", ".md", ".rst", ".py", ".ipynb", ".yaml", ".yml")
Files = tuple[Path, ...]


@dataclass(frozen=True)
class HubId:
    """A dataset on the hub: ``owner/name``, a revision (None: the default branch), a configuration (None: the only one), a split."""

    name: str
    revision: str | None = None
    split: str = "train"
    config: str | None = None

    def __str__(self) -> str:
        return f"hub:{self.name}" + (f"@{self.revision}" if self.revision else "") + (f":{self.config}" if self.config else "")


def resolve(source: str | Path) -> Files | HubId:
    """What a ``--data`` value means: the files of a file name, folder or glob, or ``hub:owner/name[@revision][:config][:split]``.

    ``hub:`` may be left out where no file is meant. Raises DataError when it is none of them.
    """
    text, path = str(source), Path(source)
    require_path(path)
    explicit = text.startswith("hub:")
    hub = _HUB.fullmatch(text.removeprefix("hub:"))
    local = (
        path.exists() or _kind(path) is not None or path.parent.is_dir() or glob.has_magic(path.parts[-1] if path.parts else "")
    )
    if isinstance(source, str) and hub and (explicit or not local):
        split = hub["two"] or hub["one"] or "train"
        return HubId(hub["name"], hub["revision"], split, hub["one"] if hub["two"] else None)
    if explicit:
        raise DataError(f"{text} is not a hub dataset", remedy=f"write {_HUB_FORM}")
    if path.is_dir():
        found = [
            child
            for child in sorted(path.iterdir())
            if not child.name.startswith(".") and (child.is_dir() or child.suffix not in _NOTES)
        ]
        if strange := [child for child in found if _kind(child) is None or child.is_dir()]:
            kind = "a folder" if strange[0].is_dir() else "no data file"
            raise DataError(
                f"{strange[0]} is {kind}, and {text} is read whole", remedy=f"name the files with a glob: '{path}/*.jsonl'"
            )
        return _files(text, found, "has no data file in it")
    if not path.exists() and glob.has_magic(text):
        return _files(text, [path for path in matches(text) if path.is_file()], "matches no file")
    if not path.exists():
        raise DataError(f"{path}: no such file", remedy="check the path; a dataset on the hub is hub:owner/name")
    return _files(text, [path], "")


def records(place: Files | HubId, advance: Advance | None = None) -> Iterator[Record]:
    """Every record of files or of a hub dataset in order; ``advance`` is told the bytes of each text line read.

    Raises DataError when nothing of a file can be read, EnvironmentFailure when the hub does not answer.
    """
    if isinstance(place, HubId):
        return _hub(place)
    return (record for rows in [_rows(path, advance) for path in place] for record in rows)


def _files(text: str, paths: list[Path], none: str) -> Files:
    if not paths:
        raise DataError(f"{text} {none}", remedy=f"data files are {', '.join((*SUFFIXES, '.jsonl.gz'))} and the like")
    if strange := [path for path in paths if _kind(path) is None]:
        raise DataError(f"{strange[0]}: unknown kind of file", remedy=f"use one of {', '.join((*SUFFIXES, *_PACKED))}")
    return tuple(paths)


def _kind(path: Path) -> str | None:
    """The suffix that says how a file is read, without .gz; None when it is no data file."""
    name = path.name.lower()
    packed = next((suffix.removesuffix(".gz") for suffix in _PACKED if name.endswith(suffix)), None)
    return packed or (path.suffix.lower() if path.suffix.lower() in SUFFIXES else None)


def _rows(path: Path, advance: Advance | None) -> Iterator[Record]:
    kind = _kind(path) or ""
    try:
        with path.open("rb") as handle:
            start = handle.read(4)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if kind == ".parquet":
        return _parquet(path)
    for magic, what in _MAGIC.items():
        if start.startswith(magic) and not (path.suffix.lower() == ".gz" and magic == b"\x1f\x8b"):
            raise DataError(f"{path} {what}")
    return text_rows(path, kind, advance)


def _parquet(path: Path) -> Iterator[Record]:
    """Rows counted from 1; a null in a nested object is a key another row has, so it is left out."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingDependency("reading Parquet needs pyarrow", remedy="pip install pyarrow") from None
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(1000):
            for value in _values(path, number, batch):
                number += 1
                yield Record(f"{path}:{number}", _without_nulls(value))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None


def _values(path: Path, before: int, batch: Any) -> list[Any]:
    """The rows of a batch; a value that Python has no room for (a date of the year 12000) is a DataError with its place."""
    try:
        return list(batch.to_pylist())
    except (OverflowError, ValueError) as error:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for number, item in enumerate(column, before + 1):
                try:
                    item.as_py()
                except (OverflowError, ValueError):
                    raise DataError(f"{path}:{number}: {name} cannot be read ({error})") from None
        raise


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _hub(place: HubId) -> Iterator[Record]:
    """Rows of one split, downloaded once into the hub's own cache, counted from 1."""
    try:
        import datasets
    except ImportError:
        remedy = "pip install 'granite-pipeline[train]'"
        raise MissingDependency("reading hub datasets needs the package datasets", remedy=remedy) from None
    # its retries are told line by line in the middle of ours; what failed is told once, below
    http = logging.getLogger("huggingface_hub.utils._http")
    level = http.level
    http.setLevel(logging.ERROR)
    try:
        rows = _loaded(datasets, place)
    except DataError:
        raise
    except Exception as error:  # the library and its HTTP stack raise some twenty unrelated types
        raise _hub_failure(str(place), place.split, error) from None
    finally:
        http.setLevel(level)
    for number, value in enumerate(rows, 1):
        yield Record(f"{place}:{number}", _without_nulls(value))


def _loaded(datasets: Any, place: HubId) -> Any:
    """The split; a single word after the name may be a configuration too, where the dataset has one of that name."""
    try:
        return datasets.load_dataset(
            place.name, *([place.config] if place.config else []), revision=place.revision, split=place.split
        )
    except ValueError as error:
        if "onfig" not in str(error) and "split" not in str(error):
            raise
        configs = datasets.get_dataset_config_names(place.name, revision=place.revision)
        if place.config is None and place.split in configs:
            return datasets.load_dataset(place.name, place.split, revision=place.revision, split="train")
        if len(configs) < 2 or place.config in configs:
            raise
        said, remedy = f"{place} has several configurations: {', '.join(configs[:20])}", f"write hub:{place.name}:{configs[0]}"
        raise DataError(said, remedy=f"{remedy}, and a split after a further colon where it is not train") from None


def _hub_failure(name: str, split: str, error: Exception) -> DataError | EnvironmentFailure:
    """One clear line out of what the datasets library raised, told apart by who can put it right."""
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "DatasetNotFoundError" in kinds:
        remedy = "check the name; a gated or private dataset needs HF_TOKEN and its terms accepted"
        return DataError(f"{name} is not on the hub, or not open to this account", evidence=said, remedy=remedy)
    if kinds & {"ConnectionError", "TimeoutError", "TransportError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        remedy = "check the network and HF_ENDPOINT, or give a local file"
        return EnvironmentFailure(f"{name}: the hub cannot be reached", evidence=said, remedy=remedy)
    if isinstance(error, OSError):
        return EnvironmentFailure(f"{name} could not be downloaded", evidence=said)
    return DataError(
        f"{name} has no usable split {split!r}",
        evidence=said,
        remedy="write hub:owner/name:split, or hub:owner/name:config:split",
    )
