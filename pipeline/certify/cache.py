"""Findings that depend on nothing but files, kept by the hashes of these files, so that a second look costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.certify.finding import Finding
from pipeline.errors import InputError
from pipeline.files import read_json, sha256_json, write_json
from pipeline.result import clean

# bump when a check changes, so that findings of the old one are not used
RECIPE = 2


class Cache:
    """``cache.json`` beside the certificate. It saves time only: hashes are taken anew each time, from the files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._kept = dict(read_json(path)) if path.is_file() else {}
        except (InputError, ValueError, TypeError):
            self._kept = {}

    def get(self, name: str, inputs: Mapping[str, str | None], work: Callable[[], Sequence[Finding]]) -> list[Finding]:
        """The findings kept for these inputs, else those of ``work``; failures and skips are never kept."""
        key = sha256_json({"recipe": RECIPE, "name": name, **inputs})
        known = self._kept.get(name)
        if known and known["key"] == key:
            return [Finding(**entry) for entry in known["findings"]]
        found = list(work())
        if all(finding.status in ("passed", "warning") for finding in found):
            self._kept[name] = {"key": key, "findings": clean([finding.to_json() for finding in found])}
            write_json(self.path, self._kept)
        return found
