"""Wait for asynchronous work from plain code, in a script or in a notebook."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx

from pipeline.errors import EngineError, ModelError, PipelineError

T = TypeVar("T")


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine; inside a running event loop (a notebook's) it gets a loop of its own in a thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, work).result()


# what a server says when the chat template, not the server, refuses the messages
_REFUSED = (400, 422, 500)


def ask(client: httpx.Client, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """POST JSON to a running server and return its JSON; ModelError or EngineError with the server's own words."""
    try:
        answer = client.post(path, json=dict(body))
        if answer.is_error:
            kind: type[PipelineError] = ModelError if answer.status_code in _REFUSED else EngineError
            raise kind(f"POST {path} answered {answer.status_code}", evidence=answer.text[:2000])
        found: dict[str, Any] = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise EngineError(f"POST {client.base_url.join(path)} does not answer: {error!r}") from None
    return found
