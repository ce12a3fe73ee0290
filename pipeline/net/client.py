"""The one HTTP client: proxies, keys, time limits and errors are the same for every request, in plain and asynchronous code."""

import asyncio
import ssl
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import httpx

from pipeline.errors import EngineError, InputError, ModelError
from pipeline.net.loopback import is_here
from pipeline.runs.text import without_password

T = TypeVar("T")
# an answer may take minutes on a CPU, a connection may not
TIMEOUT = httpx.Timeout(300, connect=10)
# what a server says when the chat template, not the server, refuses the messages
_TEMPLATE_REFUSED = (400, 422, 500)
_EVIDENCE = 2000


class Refused(EngineError):
    """A server answered with an error: ``status`` and ``text`` are its own."""

    def __init__(self, message: str, status: int, text: str) -> None:
        super().__init__(message, evidence=text[:_EVIDENCE])
        self.status = status
        self.text = text


class Unanswered(EngineError):
    """A server did not answer, broke off or said something that is not JSON; ``cause`` is the client's own error."""

    def __init__(self, message: str, cause: Exception) -> None:
        super().__init__(f"{message}: {cause!r}")
        self.cause = cause

    @property
    def timed_out(self) -> bool:
        """True when the server may still be at work on the answer."""
        return isinstance(self.cause, httpx.TimeoutException)


def client_settings(url: str, key: str, timeout: float | httpx.Timeout) -> dict[str, Any]:
    """What every client of a server (``url`` without ``/v1``) is made with."""
    # a proxy set in the environment is for other hosts, never for this machine; a connection kept open may be closed by
    # the server in the moment it is used again, which looks like a failure
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    trusted = {"trust_env": not is_here(url), "verify": tls()}
    return {"base_url": url, "headers": bearer(key), "timeout": timeout, "limits": limits, **trusted}


def open_client(url: str, key: str = "", timeout: float | httpx.Timeout = TIMEOUT) -> httpx.Client:
    """A client for one server (``url`` without ``/v1``), to be closed by the caller; InputError for a URL or key HTTP forbids."""
    with _usable(url):
        return httpx.Client(**client_settings(url, key, timeout))


def open_async(url: str, key: str = "", timeout: float | httpx.Timeout = TIMEOUT) -> httpx.AsyncClient:
    """As :func:`open_client`, for asynchronous code."""
    with _usable(url):
        return httpx.AsyncClient(**client_settings(url, key, timeout))


def bearer(key: str) -> dict[str, str]:
    """The header that carries a key; none without one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextmanager
def product_errors(request: str) -> Iterator[None]:
    """Turn what the client raises during a request into Unanswered that names the request."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise Unanswered(f"{request} does not answer", error) from None


def json_of(answer: httpx.Response, who: str) -> dict[str, Any]:
    """The JSON of an answer; Refused with the server's words for an error status, ValueError for anything but JSON."""
    if answer.is_error:
        raise Refused(f"{who} {answer.request.url.path} answered {answer.status_code}", answer.status_code, answer.text)
    said: dict[str, Any] = answer.json()
    return said


def post(client: httpx.Client, path: str, body: Mapping[str, Any], who: str = "POST") -> dict[str, Any]:
    """POST JSON and return the JSON answer; Refused or Unanswered begin with ``who``."""
    with product_errors(f"{who} {client.base_url.join(path)}"):
        return json_of(client.post(path, json=dict(body)), who)


async def post_async(client: httpx.AsyncClient, path: str, body: Mapping[str, Any], who: str = "POST") -> dict[str, Any]:
    """As :func:`post`, in asynchronous code."""
    with product_errors(f"{who} {client.base_url.join(path)}"):
        return json_of(await client.post(path, json=dict(body)), who)


async def get_async(client: httpx.AsyncClient, path: str, who: str = "GET") -> dict[str, Any]:
    """As :func:`post_async`, for a GET."""
    with product_errors(f"{who} {client.base_url.join(path)}"):
        return json_of(await client.get(path), who)


def ask(client: httpx.Client, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """As :func:`post`, for a path that renders messages: ModelError where the chat template refuses them."""
    try:
        return post(client, path, body)
    except Refused as refused:
        if refused.status in _TEMPLATE_REFUSED:
            raise ModelError(refused.message, evidence=refused.evidence) from None
        raise


def status_of(url: str, timeout: float = 2.0) -> int:
    """The status a GET of a URL ends with, 0 when nothing speaks HTTP there."""
    try:
        return httpx.get(url, timeout=timeout, trust_env=not is_here(url), verify=tls()).status_code
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return 0


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine; inside a running event loop (a notebook's) it gets a loop of its own in a thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, work).result()


@cache
def tls() -> ssl.SSLContext:
    """Which certificates are trusted: the usual authorities and the system's own. Loading takes longer than a request."""
    context = httpx.create_ssl_context()
    context.load_default_certs()
    return context


@contextmanager
def _usable(url: str) -> Iterator[None]:
    try:
        yield
    except (httpx.InvalidURL, ValueError):
        # the key is in the headers, so the error's own words are not repeated
        words = "the API key or URL has characters that HTTP does not allow"
        raise InputError(f"no request can be sent to {without_password(url)!r}: {words}") from None
