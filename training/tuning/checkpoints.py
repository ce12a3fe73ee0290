"""Checkpoints that can be trusted: each is sealed with the hashes of its files, and only a whole one is resumed from."""

import json
import logging
import re
import shutil
from collections.abc import Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.runs import lease
from pipeline.runs.files import open_up, read_json, read_object, remove, sync_tree, write_json
from pipeline.runs.hashes import sha256_file
from training.parameters import content

log = logging.getLogger(__name__)
SEAL = "sealed.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_INPUTS = "inputs.json"
_WAY = "way.json"


def seal(checkpoint: Path) -> None:
    """Flush a checkpoint to disk, then write the size and SHA-256 of each of its files beside them."""
    open_up(checkpoint)
    sync_tree(checkpoint)
    files = {p.relative_to(checkpoint).as_posix(): p for p in sorted(checkpoint.rglob("*")) if p.is_file() and p.name != SEAL}
    write_json(checkpoint / SEAL, {name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for name, p in files.items()})


def problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None when every file is as it was sealed."""
    path = checkpoint / SEAL
    if not path.is_file():
        return "it was not finished"
    try:
        sealed = read_json(path)
        for name, seen in sealed.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != seen["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {seen['bytes']}"
            if sha256_file(file) != seen["sha256"]:
                return f"{name} has changed"
    except (InputError, AttributeError, KeyError, TypeError):
        return f"{SEAL} cannot be read"
    return None


def found(folder: Path) -> list[Path]:
    """Checkpoints of a folder, newest step first."""
    numbered = [(int(match[1]), p) for p in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(p.name))]
    return [p for _, p in sorted(numbered, reverse=True)]


def latest(folder: Path, inputs: dict[str, Any], way: Sequence[str] = ()) -> str | None:
    """The newest whole checkpoint of exactly this fine-tune; damaged ones and those of another are set aside.

    ``way``: the trainer and the kind of batches, whose order of rows a checkpoint goes on in.
    """
    lease.require_held(folder)
    note, before = folder / _INPUTS, folder / _WAY
    if not _same(note, inputs) or _read_way(before) != list(way):
        if kept := found(folder):
            # hours of work end by no change of a parameter unseen: one earlier training is kept
            aside = folder.with_name(f"{folder.name}-of-other-inputs")
            remove(aside)
            folder.rename(aside)
            log.warning(
                "%s is of a training with other inputs or batches: set aside as %s, training starts over", kept[0].name, aside
            )
        remove(folder)
        write_json(note, inputs)
        write_json(before, {"way": list(way)})
        return None
    for checkpoint in found(folder):
        why = problem(checkpoint)
        if why is None:
            log.info("resuming from %s", checkpoint.name)
            return str(checkpoint)
        aside = folder / f"damaged-{checkpoint.name}"
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        log.warning("%s is not used (%s) and set aside as %s; trying the one before", checkpoint.name, why, aside.name)
    return None


def dated(folder: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with the date that dated chat templates are given: today, or when exactly this fine-tune was begun."""
    try:
        note = read_object(folder / _INPUTS)
        datetime.fromisoformat(note["date"])
    except (InputError, KeyError, TypeError, ValueError):
        note = {}
    with_date = {**inputs, "date": note.get("date")}
    return with_date if _same(folder / _INPUTS, with_date) else {**inputs, "date": date.today().isoformat()}


def step(checkpoint: str | None) -> int:
    """The step a checkpoint was written at; 0 for none."""
    match = _CHECKPOINT.fullmatch(Path(checkpoint or "").name)
    return int(match[1]) if match else 0


def _read_way(path: Path) -> list[str]:
    try:
        return list(read_object(path)["way"])
    except (InputError, KeyError, TypeError):
        return []


def _same(note: Path, inputs: dict[str, Any]) -> bool:
    try:
        return bool(content(read_object(note)) == content(json.loads(json.dumps(inputs))))
    except InputError:
        return False
