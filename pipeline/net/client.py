"""The one HTTP client: proxies, keys, time limits and errors are the same for every request, in plain and asynchronous code."""

import asyncio
import os
import re
import ssl
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx

from pipeline.errors import EngineError, InputError, MissingDependency, ModelError, PipelineError
from pipeline.net.loopback import spared
from pipeline.runs.text import without_password

T = TypeVar("T")
# an answer may take minutes on a CPU, a connection may not
TIMEOUT = httpx.Timeout(300, connect=10)
# what a server says when the chat template, not the server, refuses the messages
_TEMPLATE_REFUSED = (400, 422, 500)
_EVIDENCE = 2000
_SOCKS = ("socks5", "socks5h")
# (host, address) while one of several servers of a name is asked
_ONE: ContextVar[tuple[str, str] | None] = ContextVar("one of a name's servers", default=None)


@dataclass(frozen=True)
class Proxy:
    """The proxy that is set for a URL, and the variable (or the system's settings) that it is from."""

    url: str
    source: str

    def __str__(self) -> str:
        return f"the proxy {without_password(self.url)} ({self.source})"

    @property
    def remedy(self) -> str:
        """What to do when it fails."""
        return f"start or correct that proxy, unset {self.source}, or name the host in NO_PROXY"


def proxy_of(url: str) -> Proxy | None:
    """The proxy through which a URL is asked; None where none is set, for this machine and for what NO_PROXY excepts.

    Raises InputError for a value that is no proxy, MissingDependency where a package for SOCKS is not installed.
    """
    if address_of(url):  # a proxy would look the name up again
        return None
    found, scheme = getproxies(), urlsplit(url).scheme
    kind = next((kind for kind in (scheme, "all") if found.get(kind)), None)
    if kind is None or spared(url):
        return None
    names = [name for name in (f"{kind}_proxy", f"{kind.upper()}_PROXY") if os.environ.get(name)]
    given, source = found[kind].strip(), names[0] if names else "the system's settings"
    # desktops write socks:// and mean version 5
    address = re.sub(r"^socks://", "socks5://", given if "://" in given else f"http://{given}")
    try:
        httpx.Proxy(address)
        usable = bool(urlsplit(address).hostname) and (urlsplit(address).port or 1) > 0
    except (ValueError, httpx.InvalidURL):
        usable = False
    if not usable:
        remedy = f"write {source}=http://host:port or socks5://host:port, or unset it"
        raise InputError(f"{source}={without_password(given)} is no proxy", remedy=remedy)
    if address.startswith(_SOCKS) and find_spec("socksio") is None:
        raise MissingDependency(f"{source} is a SOCKS proxy, and socksio is not installed", remedy="make setup")
    return Proxy(address, source)


@contextmanager
def at_address(url: str, address: str) -> Iterator[None]:
    """Let clients that are opened inside connect to one address of a URL's host, without a proxy; Host and TLS keep the name."""
    token = _ONE.set((urlsplit(url).hostname or "", address))
    try:
        yield
    finally:
        _ONE.reset(token)


def address_of(url: str) -> str:
    """The address that :func:`at_address` chose for a URL's host; empty when it is looked up as usual."""
    chosen = _ONE.get()
    return chosen[1] if chosen and chosen[0] == urlsplit(url).hostname else ""


def _readdressed(request: httpx.Request, address: str) -> httpx.Request:
    """The same request, connected elsewhere: its Host header is written already, and TLS asks for the name."""
    extensions = {**request.extensions, "sni_hostname": request.url.host}
    url = request.url.copy_with(host=address)
    return httpx.Request(request.method, url, headers=request.headers, stream=request.stream, extensions=extensions)


class _OneAddress(httpx.HTTPTransport):
    """Connects to an address, whatever the host of the URL."""

    def __init__(self, address: str, settings: Mapping[str, Any]) -> None:
        super().__init__(verify=settings["verify"], limits=settings["limits"])
        self.address = address

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return super().handle_request(_readdressed(request, self.address))


class _OneAddressAsync(httpx.AsyncHTTPTransport):
    """As :class:`_OneAddress`, for asynchronous code."""

    def __init__(self, address: str, settings: Mapping[str, Any]) -> None:
        super().__init__(verify=settings["verify"], limits=settings["limits"])
        self.address = address

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await super().handle_async_request(_readdressed(request, self.address))


class Refused(EngineError):
    """A server answered with an error: ``status`` and ``text`` are its own."""

    def __init__(self, message: str, status: int, text: str) -> None:
        super().__init__(message, evidence=text[:_EVIDENCE])
        self.status = status
        self.text = text


class Unanswered(EngineError):
    """A server, or the proxy before it, did not answer, broke off or said something that is not JSON; ``cause`` is the client's error."""

    def __init__(self, message: str, cause: Exception, proxy: Proxy | None = None) -> None:
        super().__init__(f"{message}{f' through {proxy}' if proxy else ''}: {cause!r}", remedy=proxy.remedy if proxy else "")
        self.cause = cause

    @property
    def timed_out(self) -> bool:
        """True when the server may still be at work on the answer."""
        return isinstance(self.cause, httpx.TimeoutException)


def client_settings(url: str, key: str, timeout: float | httpx.Timeout) -> dict[str, Any]:
    """What every client of a server (``url`` without ``/v1``) is made with."""
    # a connection kept open may be closed by the server in the moment it is used again, which looks like a failure
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return {"base_url": url, "headers": bearer(key), "timeout": timeout, "limits": limits, **route(url)}


def route(url: str) -> dict[str, Any]:
    """How a client reaches a URL; httpx' own look at the environment is not wanted: it makes every proxy, also one not needed."""
    proxy = proxy_of(url)
    return {"trust_env": False, "verify": tls(), "proxy": proxy and proxy.url}


def open_client(url: str, key: str = "", timeout: float | httpx.Timeout = TIMEOUT) -> httpx.Client:
    """A client for one server (``url`` without ``/v1``), to be closed by the caller; InputError for a URL or key HTTP forbids."""
    with _usable(url):
        settings, address = client_settings(url, key, timeout), address_of(url)
        return httpx.Client(**settings, transport=_OneAddress(address, settings) if address else None)


def open_async(url: str, key: str = "", timeout: float | httpx.Timeout = TIMEOUT) -> httpx.AsyncClient:
    """As :func:`open_client`, for asynchronous code."""
    with _usable(url):
        settings, address = client_settings(url, key, timeout), address_of(url)
        return httpx.AsyncClient(**settings, transport=_OneAddressAsync(address, settings) if address else None)


def bearer(key: str) -> dict[str, str]:
    """The header that carries a key; none without one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextmanager
def product_errors(request: str) -> Iterator[None]:
    """Turn what the client raises during a request, whose text ends with its URL, into Unanswered that names it."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, httpx.HTTPError | httpx.InvalidURL | ValueError) and not of_socks(error):
            raise
        raise Unanswered(f"{request} does not answer", error, proxy_of(request.rpartition(" ")[2])) from None


def of_socks(error: Exception) -> bool:
    """Whether an error says that what was taken for a SOCKS proxy speaks otherwise; httpx passes on socksio's own."""
    return type(error).__module__.startswith("socksio")


def json_of(answer: httpx.Response, who: str) -> dict[str, Any]:
    """The JSON of an answer; Refused with the server's words for an error status, ValueError for anything but JSON."""
    if answer.status_code == httpx.codes.PROXY_AUTHENTICATION_REQUIRED and (proxy := proxy_of(str(answer.request.url))):
        raise Unanswered(
            f"{who} {answer.request.url} does not answer", ValueError("407: the proxy asks for a name and password"), proxy
        )
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
        return httpx.get(url, timeout=timeout, **route(url)).status_code
    except Exception as error:
        if not isinstance(error, httpx.HTTPError | httpx.InvalidURL | ValueError | PipelineError) and not of_socks(error):
            raise
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
