"""Files that appear whole or not at all: atomic writes, content hashes, free-space checks."""

import errno
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import DiskFull, InputError
from pipeline.runs import lease

# what staged() and write_atomic() leave beside a final name when they are killed
_SCRATCH = re.compile(r"\.[^/]+\.[a-z0-9_]{8}")
_PREVIOUS = "previous"
# what --base and --data call the built-in ones, whatever folder lies about under the name
_BUILT_IN = ("embedded", "soc")
_NO_SUCH_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
# a disk with less than this is as good as full: libraries that hide ENOSPC are told apart by it
_FULL_BYTES = 1 << 18


def tree_bytes(path: Path) -> int:
    """Size in bytes of a file or of everything below a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def write_atomic(path: Path, data: str | bytes, mode: int | None = None) -> None:
    """Write a file under a temporary name beside it, flush it, then rename it into place; ``mode`` None: as the umask says.

    LeaseLost, and the file stays as it was, when it lies in a run that another process has taken over from this one.
    """
    lease.require_held(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode("utf-8") if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(raw)
            out.flush()
            os.fsync(out.fileno())
        if mode is None:
            open_up(Path(name))
        else:
            os.chmod(name, mode)
        with lease.publishing(path):
            os.replace(name, path)
        _sync_folder(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def open_up(path: Path) -> None:
    """Give a file, or every file in a folder, the permissions that the umask says: a server may run as another user.

    ``tempfile`` and safetensors make files that nobody else can read, whatever the umask.
    """
    umask = os.umask(0)
    os.umask(umask)
    for part in path.rglob("*") if path.is_dir() else [path]:
        if part.is_file() and not part.is_symlink():
            part.chmod((0o777 if part.stat().st_mode & 0o100 else 0o666) & ~umask)


def read_object(path: Path) -> dict[str, Any]:
    """As :func:`read_json`, for a file that must hold a JSON object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: must be a JSON object, this is {type(value).__name__}")
    return value


def read_utf8(path: Path) -> str:
    """Text of a UTF-8 file; InputError names the byte that is not UTF-8, or says why the file cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text (byte {error.start})", remedy="save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def absolute(value: str) -> str:
    """A path or glob that exists, made absolute; any other value (a built-in name, a hub id) as it is."""
    if value in _BUILT_IN:
        return value
    require_path(Path(value))
    if not Path(value).exists() and glob.has_magic(value) and matches(value):
        return str(Path.cwd() / value)
    return str(Path(value).resolve()) if Path(value).exists() else value


def matches(pattern: str) -> list[Path]:
    """Files and folders that a glob matches, sorted."""
    return [Path(found) for found in sorted(glob.glob(pattern))]  # noqa: PTH207 - Path.glob takes no absolute pattern


def require_path(path: Path) -> None:
    """Raise InputError when the system cannot even say whether a path is there (a name is too long, a folder is closed)."""
    try:
        path.exists()
    except OSError as error:
        raise _bad_path(error) from None


def path_refused(error: OSError) -> InputError | None:
    """The InputError for an OSError that is about a path the user gave, None for any other."""
    return _bad_path(error) if error.errno in _NO_SUCH_PATH else None


def _bad_path(error: OSError) -> InputError:
    shown = str(error.filename)
    return InputError(f"{shown[:200]}{'...' if len(shown) > 200 else ''}: {error.strerror}", remedy="check the path")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises InputError naming the file and line when it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{path}{line}: not valid JSON ({error})") from None


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Yield a scratch path beside ``final``; on success it replaces ``final`` by rename, on failure it is removed.

    Everything in it is flushed to disk before the rename, and has the permissions that the umask says. A folder that is replaced
    is first renamed aside, so a reader never sees a half-filled one; it is put back when something stops this between the two
    renames, by :func:`sweep` after a kill. LeaseLost, and ``final`` stays as it was, in a run that another process has taken over.
    """
    lease.require_held(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    target = scratch / final.name
    try:
        yield target
        open_up(target)
        sync_tree(target)
        with lease.publishing(final):
            if final.is_dir():
                final.rename(scratch / _PREVIOUS)
            target.rename(final)
        _sync_folder(final.parent)
    finally:
        _put_back(scratch, final)
        shutil.rmtree(scratch, ignore_errors=True)


def _put_back(scratch: Path, final: Path) -> None:
    """Give a folder that was being replaced its name again when its successor never took it."""
    if (scratch / _PREVIOUS).exists() and not final.exists():
        (scratch / _PREVIOUS).rename(final)


def sync_tree(path: Path) -> None:
    """Flush a file, or a folder and everything below it, to disk: after a power cut a renamed file must not be empty."""
    for part in [path, *(path.rglob("*") if path.is_dir() else [])]:
        if not part.is_symlink():
            _sync_folder(part)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def leftovers(folder: Path) -> list[Path]:
    """Scratch files and folders that killed writers left directly in a folder."""
    return [p for p in sorted(folder.iterdir()) if _SCRATCH.fullmatch(p.name)] if folder.is_dir() else []


def sweep(folder: Path) -> int:
    """Remove killed writers' scratch from a folder that no one else writes to; returns the bytes freed.

    A folder that was being replaced is put back under its name when its successor never took it.
    """
    freed = 0
    for scratch in leftovers(folder):
        final = folder / scratch.name[1:].rpartition(".")[0]
        _put_back(scratch, final)
        freed += tree_bytes(scratch)
        remove(scratch)
    return freed


def remove(path: Path) -> None:
    """Remove a file, a link (never what it points to) or a folder; what is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def disk_errors_named(folder: Path) -> Iterator[None]:
    """A disk that fills up in spite of the check before is a DiskFull, whichever library met it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFull) or not is_disk_full(error, folder):
            raise
        evidence = f"{str(error)[-500:]}\n{_free(folder) / 2**20:.1f} MiB are free now"
        remedy = "free some space and run again: it continues where it was; finished results are untouched"
        raise DiskFull(f"the disk under {folder} is full", evidence=evidence, remedy=remedy) from error


def is_disk_full(error: Exception, folder: Path) -> bool:
    """Whether an error means that the disk is full: by its number, by its words, or because nothing is free."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return True
    # torch's file writer says neither; its half-written file is still there
    return isinstance(error, OSError | RuntimeError) and _free(folder) < _FULL_BYTES


def _free(folder: Path) -> int:
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    return shutil.disk_usage(existing).free


def require_free_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise DiskFull when fewer than ``needed`` bytes are free where ``folder`` is or will be."""
    free = _free(folder)
    if free < needed:
        lacking = f"{purpose} needs {needed / 2**30:.2f} GiB in {folder}, only {free / 2**30:.2f} GiB are free"
        raise DiskFull(lacking, remedy="free some space, or choose another folder with --output / OUTPUT=...")
