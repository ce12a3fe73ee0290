"""Places in which people really run this: users without a home or a name, and machines without a network; made with Linux namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOBODY = 54321  # no entry in the user database
# a closed folder above the interpreter (root's own home) is laid over by an empty one that holds the interpreter alone
_AS_NOBODY = """
set -e; closed=$1; prefix=$2; shift 2
if [ -n "$closed" ]; then
  held=$(mktemp -d); mount --bind "$prefix" "$held"
  mount -t tmpfs -o mode=755 none "$closed"; mkdir -p "$prefix"; mount --bind "$held" "$prefix"
fi
exec setpriv --reuid {uid} --regid {uid} --clear-groups --inh-caps=-all "$@"
"""


def _namespaces(*asked: str) -> list[str]:
    """``unshare`` with these; the test is skipped where this user or system cannot."""
    command = ["unshare", *asked]
    if (
        not shutil.which("unshare")
        or not shutil.which("setpriv")
        or subprocess.run([*command, "true"], capture_output=True).returncode
    ):
        pytest.skip("needs root and Linux namespaces (unshare, setpriv)")
    return command


def _run(command: list[str], env: Mapping[str, str], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    given = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=given, cwd=cwd)


def as_nobody(*words: str, cwd: Path, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run this Python as a user without a name, with nothing in the environment but PATH and what is given."""
    prefix = Path(sys.base_prefix)
    closed = next((str(p) for p in reversed(prefix.parents) if not p.stat().st_mode & 0o001), "")
    script = _AS_NOBODY.replace("{uid}", str(NOBODY))
    return _run([*_namespaces("-m"), "sh", "-c", script, "_", closed, str(prefix), sys.executable, *words], env, cwd, timeout)


def offline(*words: str, cwd: Path, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run this Python in a network namespace that has nothing but this machine."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | env
    return _run(
        [*_namespaces("-n"), "sh", "-c", 'ip link set lo up; exec "$@"', "_", sys.executable, *words], given, cwd, timeout
    )
