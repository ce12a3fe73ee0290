"""Files that appear whole or not at all: atomic writes, content hashes, free-space checks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import DiskFull, InputError

_CHUNK = 1 << 20


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_tree(path: Path) -> str:
    """Hex SHA-256 of a file, or of a folder: the digest of its sorted (relative path, file digest) lines."""
    if path.is_file():
        return sha256_file(path)
    lines = [f"{p.relative_to(path).as_posix()} {sha256_file(p)}" for p in sorted(path.rglob("*")) if p.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON-serialisable value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()


def tree_bytes(path: Path) -> int:
    """Size in bytes of a file or of everything below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file under a temporary name beside it, flush it to disk, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode("utf-8") if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(raw)
            out.flush()
            os.fsync(out.fileno())
        # mkstemp makes 0600 files; a report or Modelfile is meant to be read by others on the machine
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises InputError naming the file and line when it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", None)
        where = f"{path}:{line}" if line else str(path)
        raise InputError(f"{where}: not valid JSON ({error})") from None


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Yield a scratch path beside ``final``; on success it replaces ``final`` by rename, on failure it is removed.

    A folder that is replaced is first renamed aside, so a reader never sees a half-filled one.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    target = scratch / final.name
    try:
        yield target
        if final.is_dir():
            final.rename(scratch / "previous")
        target.rename(final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def require_free_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise DiskFull when fewer than ``needed`` bytes are free where ``folder`` is or will be."""
    existing = next(p for p in [folder, *folder.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskFull(
            f"{purpose} needs {needed / 2**30:.2f} GiB in {folder}, only {free / 2**30:.2f} GiB are free",
            remedy="free some space, or choose another folder with --output / OUTPUT=...",
        )
