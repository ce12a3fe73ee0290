"""Requests that only this machine should send: what a browser says of the page that asks, and of the name it asked for."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.reach import is_local


def from_here(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """False for a page of another site (``Origin``), and for a name that was made to point here (``Host``: DNS rebinding)."""
    for name, value in headers:
        text = value.decode("latin-1")
        if name.lower() == b"origin" and not _loopback(text):
            return False
        if name.lower() == b"host" and not _loopback(f"http://{text}"):
            return False
    return True


def _loopback(url: str) -> bool:
    try:
        return is_local(url)
    except ValueError:
        return False
