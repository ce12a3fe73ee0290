"""A whole run that needs nothing done: the same parameters, data, code and packages, and every artefact as it was verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pipeline import config, lock
from pipeline.files import sha256_json, sha256_tree
from pipeline.hashes import HashCache
from pipeline.manifest import Manifest
from pipeline.runs import RunFolder

_SECTION = "finished"
_CODE = Path(__file__).parents[1]
_LOCAL = ("BASE", "DATA", "EVAL_DATA")


def inputs(run: RunFolder, stages: Sequence[str], parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the outcome of a run depends on; None when that cannot be told, as for a hub id that may have moved on."""
    hashes, named = HashCache(run.output / ".base"), {}
    for name in _LOCAL:
        value = parameters.get(name)
        if value is None or (name, value) in (("BASE", "embedded"), ("DATA", "soc")):
            continue
        path = Path(str(value))
        if not path.exists():
            return None
        named[name] = hashes.tree(path)
    return {
        "stages": list(stages),
        "parameters": {k: v for k, v in parameters.items() if k not in ("FORCE", "OUTPUT")},
        "files": named,
        "code": _code(),
        "packages": sha256_json(sorted(f"{d.metadata['Name']} {d.version}" for d in distributions())),
        "settings": sha256_json([asdict(setting) for setting in config.resolved()]),
    }


def is_current(run: RunFolder, wanted: Mapping[str, Any] | None) -> str | None:
    """When the run was finished and verified with exactly these inputs, None when something is to do."""
    manifest = Manifest(run.manifest)
    before = manifest.data.get(_SECTION)
    if wanted is None or not isinstance(before, dict) or not manifest.holds(before, wanted):
        return None
    return str(before["finished_at"])


def record(run: RunFolder, wanted: Mapping[str, Any] | None, seconds: float) -> None:
    """Note that a run was finished and verified."""
    if wanted is None:
        return
    artefacts = [run.adapter, run.merged, run.gguf, run.modelfile, run.heldout, run.report / "report.json"]
    artefacts += [run.reference("base"), run.reference("tuned")]
    with lock.held(run, "run"):
        manifest = Manifest(run.manifest)
        entry = manifest.entry(wanted, artefacts, {"passed": True}, seconds)
        with manifest.changing() as data:
            data[_SECTION] = entry


def _code() -> str:
    """Hash of the product's own code, so that a change of it is not slept through."""
    files = sorted(p for part in ("pipeline", "training", "notebooks") for p in (_CODE / part).rglob("*.*") if p.is_file())
    kept = [p for p in files if "__pycache__" not in p.parts and p.relative_to(_CODE).parts[:2] != ("training", "output")]
    return sha256_json([f"{p.relative_to(_CODE)} {sha256_tree(p)}" for p in kept])
