"""Whether a certificate is about the files as they are now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.hashes import HashCache
from pipeline.runs import RunFolder


def changed_files(run: RunFolder, certificate: Mapping[str, Any]) -> list[str]:
    """Artefacts of a certificate that are gone or have another SHA-256 now; files that did not change are not read again."""
    cache = HashCache(run.path)
    artefacts: Mapping[str, str] = certificate["subject"].get("artefacts") or {}
    return [name for name, sha256 in artefacts.items() if not (run.path / name).exists() or cache.tree(run.path / name) != sha256]
