"""This machine as a server's address: which URLs mean it and need no proxy, who may ask it, which of its ports are free."""

import contextlib
import os
import re
import socket
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit

import psutil

from pipeline.errors import EnvironmentFailure, InputError

HERE = ("127.0.0.1", "localhost", "::1")
_NO_PROXY = ("NO_PROXY", "no_proxy")
# what clients are told to ask directly; the last is where a server for all of this machine's addresses may be asked
_SPARED = (*HERE, "0.0.0.0")


def is_local(url: str) -> bool:
    """True for a URL on this machine."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        # a name such as 127.0.0.1.example is no address: anyone may own it
        return ip_address(host).is_loopback
    return host == "localhost"


def is_here(url: str) -> bool:
    """As :func:`is_local`, or the address that means all of this machine's: where a server started from here may answer."""
    return is_local(url) or urlsplit(url).hostname in ("0.0.0.0", "::")


def same_place(url: str, other: str) -> bool:
    """True for two URLs of one server: the names of this machine, and the address that means all of them, are equal."""
    with contextlib.suppress(ValueError):  # what is no URL is no place
        return _place(url) == _place(other)
    return False


def _place(url: str) -> tuple[str, str, int | None, str]:
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, "localhost" if is_here(url) else parts.hostname or "", port, parts.path.rstrip("/")


def from_here(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request is one that only this machine should send, by what a browser says of the page and of the name it asks.

    False for a page of another site (``Origin``), and for a name that was made to point here (``Host``: DNS rebinding).
    """
    before = {b"origin": "", b"host": "http://"}
    asked = [(name.lower(), value.decode("latin-1")) for name, value in headers]
    try:
        return all(is_local(before[name] + value) for name, value in asked if name in before)
    except ValueError:
        return False


def spare_loopback() -> None:
    """Add this machine to ``NO_PROXY`` and ``no_proxy``, for this process and what it starts; what they hold is kept.

    A ``socks://`` proxy, as desktops write it, becomes ``socks5://``, which is meant: clients know no other name for it.
    """
    for name, value in os.environ.items():
        if name.lower().endswith("_proxy") and value.startswith("socks://"):
            os.environ[name] = value.replace("socks", "socks5", 1)
    given = {name: os.environ.get(name, "") for name in _NO_PROXY}
    for name, other in zip(_NO_PROXY, reversed(_NO_PROXY), strict=True):
        # most clients read only the lower-case name where both are set, so an absent one starts from the other
        kept = _parts(given[name] or given[other])
        # httpx reads the lower-case name and fails at a network of IPv6 addresses; Go, which knows them, reads the other
        if name == "no_proxy":
            kept = [part for part in kept if part.count(":") < 2 or "/" not in part]
        # "*" means no proxy at all, and some clients know it only when it stands alone
        if "*" in kept:
            kept = ["*"]
        else:
            kept += [host for host in _SPARED if host not in kept]
        os.environ[name] = ",".join(kept)


def spared(url: str) -> bool:
    """Whether a URL is asked without a proxy: it is this machine's, or NO_PROXY excepts it.

    NO_PROXY holds names (and with them all below), addresses and networks, each with or without a port, or ``*``.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or {"https": 443}.get(parts.scheme, 80)
    except ValueError:  # no URL; whoever asks it says so
        return False
    excepted = _parts(os.environ.get("no_proxy") or "") + _parts(os.environ.get("NO_PROXY") or "")
    return is_here(url) or any(_excepts(part.lower(), host, port) for part in excepted)


def _parts(value: str) -> list[str]:
    """The entries of a NO_PROXY, in the forms that every client reads: no brackets, no ``*.`` before a domain."""
    found = [part for part in re.split(r"[,\s]+", value) if part]
    return [part[1:-1] if re.fullmatch(r"\[.*\]", part) else part[1:] if part.startswith("*.") else part for part in found]


def _excepts(part: str, host: str, port: int) -> bool:
    if part == "*":
        return True
    with contextlib.suppress(ValueError):
        network = ip_network(part, strict=False)
        try:
            return ip_address(host) in network
        except ValueError:
            return False
    name, _, number = part.rpartition("://")[2].partition(":")
    name = name.lstrip(".")
    return bool(name) and number in ("", str(port)) and (host == name or host.endswith(f".{name}"))


def claim(host: str, port: int) -> int:
    """``port`` when nothing listens there, a free one for 0; EnvironmentFailure naming the holder, InputError for IPv6."""
    if ":" in host:
        remedy = "use --host 127.0.0.1, or 0.0.0.0 for others"
        raise InputError(f"{host} is an IPv6 address, which nothing here binds", remedy=remedy)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            words = f"port {port} on {host} is not free ({error.strerror})"
            remedy = "choose another with --port (0 picks a free one), or stop what holds it"
            raise EnvironmentFailure(words, evidence=holder(port), remedy=remedy) from None
        return int(probe.getsockname()[1])


def listening(host: str, port: int) -> bool:
    """True when something accepts connections on a port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def towards(host: str) -> tuple[str, str]:
    """This machine's address and network interface on the way to a host; nothing is sent. EnvironmentFailure when there is none."""
    try:
        family, kind, protocol, _, there = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(there)
            address = str(probe.getsockname()[0])
    except OSError as error:
        remedy = "give an address that this machine reaches"
        raise EnvironmentFailure(f"no way from here to {host} ({error.strerror or error})", remedy=remedy) from None
    interfaces = psutil.net_if_addrs().items()
    found = next((name for name, own in interfaces if any(one.address.partition("%")[0] == address for one in own)), "")
    if not found:
        raise EnvironmentFailure(f"no network interface here has the address {address}, from which {host} is reached")
    return address, found


def holder(port: int) -> str:
    """Which process listens on a port, as a person would want to read it; empty when that cannot be seen."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                return f"held by process {process.pid}: {' '.join(process.cmdline())[:160]}"
    return ""
