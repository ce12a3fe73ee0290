"""A proxy set in the environment is for other hosts: requests to this machine's own servers must not go through it."""

from __future__ import annotations

import os

_HERE = ("127.0.0.1", "localhost", "::1")
_NAMES = ("NO_PROXY", "no_proxy")


def spare_loopback() -> None:
    """Add this machine to ``NO_PROXY`` and ``no_proxy``, for this process and what it starts; what they hold is kept."""
    given = {name: os.environ.get(name, "") for name in _NAMES}
    for name, other in zip(_NAMES, reversed(_NAMES), strict=True):
        # most clients read only the lower-case name where both are set, so an absent one starts from the other
        kept = [part.strip() for part in (given[name] or given[other]).split(",") if part.strip()]
        # "*" means no proxy at all, and some clients know it only when it stands alone
        if kept != ["*"]:
            kept += [host for host in _HERE if host not in kept]
        os.environ[name] = ",".join(kept)
