"""Ports on this machine: find a free one, or say who holds the one that was asked for."""

from __future__ import annotations

import contextlib
import socket

import psutil

from pipeline.errors import EnvironmentFailure, InputError


def claim(host: str, port: int) -> int:
    """``port`` when nothing listens there, a free one for 0; EnvironmentFailure naming the holder, InputError for IPv6."""
    if ":" in host:
        raise InputError(
            f"{host} is an IPv6 address, which nothing here binds", remedy="use --host 127.0.0.1, or 0.0.0.0 for others"
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EnvironmentFailure(
                f"port {port} on {host} is not free ({error.strerror})",
                evidence=holder(port),
                remedy="choose another with --port (0 picks a free one), or stop what holds it",
            ) from None
        return int(probe.getsockname()[1])


def listening(host: str, port: int) -> bool:
    """True when something accepts connections on a port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def holder(port: int) -> str:
    """Which process listens on a port, as a person would want to read it; empty when that cannot be seen."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                return f"held by process {process.pid}: {' '.join(process.cmdline())[:160]}"
    return ""
