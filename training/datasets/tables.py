"""Rows that a library reads: Parquet files, and datasets on the hub."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, EnvironmentFailure, MissingDependency
from training.datasets.rows import Record


@dataclass(frozen=True)
class HubId:
    """A dataset on the hub: ``owner/name``, a revision (None: the default branch), a configuration (None: the only one), a split."""

    name: str
    revision: str | None = None
    split: str = "train"
    config: str | None = None

    def __str__(self) -> str:
        return f"hub:{self.name}" + (f"@{self.revision}" if self.revision else "") + (f":{self.config}" if self.config else "")


def parquet_rows(path: Path) -> Iterator[Record]:
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


def hub_rows(place: HubId) -> Iterator[Record]:
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
