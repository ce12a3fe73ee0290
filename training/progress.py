"""Progress bars with time left, on stderr in a terminal and as a widget in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], label: str, *, shown: bool = True) -> Iterator[T]:
    """Yield the items while a bar shows how many are done and how long the rest will take."""
    from tqdm.auto import tqdm

    yield from tqdm(items, desc=label, disable=not shown, leave=True)
