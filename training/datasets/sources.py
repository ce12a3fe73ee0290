"""What a ``--data`` value means: a file, a folder or glob of files, or a dataset on the hub; and its rows as plain records."""

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import DataError
from pipeline.runs.files import matches, require_path
from training.datasets.rows import Advance, Record, text_rows
from training.datasets.tables import HubId, hub_rows, parquet_rows

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
Files = tuple[Path, ...]


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
        found = [child for child in sorted(path.iterdir()) if child.is_file() and not child.name.startswith(".")]
        return _files(text, [child for child in found if _kind(child)], "has no data file in it")
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
        return hub_rows(place)
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
        return parquet_rows(path)
    for magic, what in _MAGIC.items():
        if start.startswith(magic) and not (path.suffix.lower() == ".gz" and magic == b"\x1f\x8b"):
            raise DataError(f"{path} {what}")
    return text_rows(path, kind, advance)
