"""SHA-256 of files, folders and JSON values; a file's is remembered, so that a model is read once and not by every stage.

A remembered hash is believed while inode, size, modification and change time are those it was made at; not the device number, for a
shared folder has another one on each machine. A file that changed less than two seconds before it was read is read again next time:
a second change could fall into the same clock tick.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import EnvironmentFailure
from pipeline.runs.files import write_atomic
from pipeline.runs.folder import cache_folder, writable

NAME = ".hashes.json"
_SETTLED_NS = 2_000_000_000


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_tree(path: Path, file_hash: Callable[[Path], str] = sha256_file) -> str:
    """Hex SHA-256 of a file, or of a folder: the digest of its sorted (relative path, file digest) lines."""
    return file_hash(path) if path.is_file() else tree_digest(sha256_files(path, file_hash))


def sha256_files(folder: Path, file_hash: Callable[[Path], str] = sha256_file) -> dict[str, str]:
    """Hex SHA-256 of every file of a folder by its path relative to it, sorted as :func:`sha256_tree` counts them."""
    return {p.relative_to(folder).as_posix(): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def tree_digest(files: Mapping[str, str]) -> str:
    """The digest of a folder from those of its files, as :func:`sha256_files` orders them."""
    return hashlib.sha256("\n".join(f"{name} {digest}" for name, digest in files.items()).encode()).hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON-serialisable value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()


class HashCache:
    """Remembered hashes in ``folder/.hashes.json`` and, of folders that cannot be written, in :func:`cache_folder`.

    A missing or damaged file of them only costs time.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._known = _read(self.path)
        # a folder of runs is not made for this alone
        self._kept = folder.parent.is_dir()
        if not writable(folder):
            with contextlib.suppress(EnvironmentFailure):
                self.path = cache_folder() / NAME
                self._known |= _read(self.path)
        self._changed = False

    def tree(self, path: Path) -> str:
        """Hex SHA-256 of a file or folder, as :func:`sha256_tree` defines it."""
        digest = sha256_tree(path, self._file)
        self._keep()
        return digest

    def files(self, folder: Path) -> dict[str, str]:
        """Hex SHA-256 of every file of a folder, as :func:`sha256_files` defines them."""
        found = sha256_files(folder, self._file)
        self._keep()
        return found

    def _keep(self) -> None:
        if self._changed:
            with contextlib.suppress(OSError):  # a full disk must not fail what only saves time
                if self._kept:
                    self._known = {name: entry for name, entry in self._known.items() if Path(name).exists()}
                    write_atomic(self.path, json.dumps(self._known))
            self._changed = False

    def _file(self, path: Path) -> str:
        name, before = str(path.resolve()), path.stat()
        seen = [before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns]
        entry = self._known.get(name)
        if isinstance(entry, list) and len(entry) == 2 and entry[0] == seen:
            return str(entry[1])
        digest = sha256_file(path)
        after = path.stat()
        same = (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
        if same and time.time_ns() - max(before.st_mtime_ns, before.st_ctime_ns) > _SETTLED_NS:
            self._known[name] = [seen, digest]
            self._changed = True
        return digest


def _read(path: Path) -> dict[str, list[object]]:
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
        return known if isinstance(known, dict) else {}
    return {}
