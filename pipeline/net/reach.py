"""One GET to someone else's server, with words for every way it can go wrong; nothing is raised and no redirect is followed."""

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from pipeline.errors import PipelineError
from pipeline.net.client import client_settings, of_socks, proxy_of
from pipeline.runs.text import without_password

TIMEOUT = 5.0
_MOST_BYTES = 4 << 20
_KEY = ("key", "{root} refuses the API key ({status}): correct it, or set one")
# status -> name of the failure, what it means and what to do
_REFUSALS = {
    401: _KEY,
    403: _KEY,
    404: ("not_found", "{root} has no {path} (404): another server listens there, or the base URL has a path too much"),
    503: ("loading", "{root} is up but not ready (503): the model may still be loading"),
}


@dataclass(frozen=True)
class Reached:
    """What came back: parsed JSON when ``ok``, else ``detail`` says what happened and what to do. ``kind`` names the failure."""

    ok: bool
    data: Any = None
    status: int | None = None
    latency_ms: float | None = None
    kind: str = ""
    detail: str = ""


async def get_json(root: str, path: str, api_key: str = "", timeout: float = TIMEOUT) -> Reached:
    """GET ``root + path`` within ``timeout`` seconds in all; the key goes to this host only."""
    begun = time.perf_counter()
    shown = without_password(root)
    try:
        proxy = proxy_of(root)
    except PipelineError as error:
        return _failed("proxy", f"{error.message}: {error.remedy}", begun)
    except ValueError:
        return _failed("url", f"{shown!r} is not a URL: write http://host:port/v1", begun)
    if proxy:
        shown = f"{shown} through {proxy}"
    try:
        async with (
            asyncio.timeout(timeout),
            httpx.AsyncClient(**client_settings(root, api_key, timeout)) as client,
            client.stream("GET", root + path) as answer,
        ):
            body = await _read(answer)
        return _judged(answer, body, shown, path, _ms(begun))
    except (TimeoutError, httpx.TimeoutException):
        words = f"{shown} did not answer within {timeout:g} s: it hangs, is overloaded or still starting"
        return _failed("timeout", words, begun)
    except httpx.ConnectError as error:
        if proxy:
            return _failed("proxy", f"no connection to {shown}: {proxy.remedy}", begun)
        return _failed(*_not_connected(error, shown), begun)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        return _failed("url", f"{shown!r} is not a URL: write http://host:port/v1", begun)
    except (UnicodeError, httpx.LocalProtocolError, ValueError):
        # the key is in the headers, so the exception's own words are not repeated
        return _failed("key", "the request cannot be sent: the API key or URL has characters that HTTP does not allow", begun)
    except httpx.HTTPError as error:
        said = type(error).__name__
        if proxy and isinstance(error, httpx.ProxyError):
            return _failed("proxy", f"{shown}: {error}: {proxy.remedy}", begun)
        return _failed("protocol", f"{shown} broke off the answer ({said}): something else than HTTP may listen there", begun)
    except Exception as error:
        if proxy is None or not of_socks(error):
            raise
        return _failed("proxy", f"{shown}: it speaks no SOCKS: {proxy.remedy}", begun)


async def _read(answer: httpx.Response) -> bytes:
    body = bytearray()
    async for part in answer.aiter_bytes():
        body += part
        if len(body) > _MOST_BYTES:
            break
    return bytes(body)


def _judged(answer: httpx.Response, body: bytes, root: str, path: str, latency: float) -> Reached:
    status = answer.status_code
    if answer.has_redirect_location or answer.is_redirect:
        kind, words = "redirect", _redirected(root, answer.headers)
    elif status >= 400:
        kind, words = _REFUSALS.get(status, ("status", "{root}{path} answered {status}: look into that server's log"))
        words = words.format(root=root, path=path, status=status)
    else:
        try:
            return Reached(True, json.loads(body) if body.strip() else None, status, latency)
        except (ValueError, RecursionError):  # the second: nested a hundred thousand deep
            kind, words = "not_json", f"{root}{path} answered something that is not JSON: another kind of server listens there"
    return Reached(False, None, status, latency, kind, words)


def _redirected(root: str, headers: Mapping[str, str]) -> str:
    target = without_password(str(headers.get("location", "")))[:200]
    host = urlsplit(target).netloc
    if host and host != urlsplit(root).netloc:
        return f"{root} redirects to another host ({target}); not followed, because the API key would go there: set that URL yourself"
    return f"{root} redirects to {target}; not followed: set the URL it redirects to"


def _not_connected(error: httpx.ConnectError, root: str) -> tuple[str, str]:
    causes = _causes(error)
    if any(isinstance(cause, ssl.SSLError) for cause in causes) or "SSL" in str(error):
        return "tls", f"{root} does not speak TLS as asked: use http:// for a local server, or trust its certificate"
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes) or "refused" in str(error):
        return "refused", f"nothing listens at {root} (connection refused): start the server there, or correct the port"
    if any(words in str(error) for words in ("Name or service", "nodename", "resolution")):
        return "name", f"the host name in {root} is not known: correct it, or check the network"
    return "connect", f"no connection to {root}: check host, port and network"


def _causes(error: BaseException) -> list[BaseException]:
    causes: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and len(causes) < 10:
        causes += [following, *(following.exceptions if isinstance(following, BaseExceptionGroup) else ())]
        following = following.__cause__ or following.__context__
    return causes


def _failed(kind: str, detail: str, begun: float) -> Reached:
    return Reached(False, None, None, _ms(begun), kind, detail)


def _ms(begun: float) -> float:
    return round((time.perf_counter() - begun) * 1000, 1)
