"""All servers behind one DNS name, `http+dns://name:8000`, as of a headless Service in Kubernetes.

In: the name. Out: a connection for each of its addresses. A later lookup adds connections for new addresses, and keeps
the same ones for old addresses. It sends no requests.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from client.errors import ServiceError, Unreachable
from client.servers.connection import Connection

SUFFIX = "+dns"
"""Follows the scheme of a --server that means all addresses behind its name."""
SCHEMES = {f"http{SUFFIX}": 80, f"https{SUFFIX}": 443}


def is_name(server: str) -> bool:
    """Whether a --server means all addresses behind its name."""
    return urlsplit(server).scheme in SCHEMES


class ServerName:
    """One DNS name, and the connections to its addresses."""

    def __init__(self, server: str, api_key: str | None = None) -> None:
        """Looks nothing up yet. Raises ServiceError if it is not a valid URL."""
        url, self._key = urlsplit(server), api_key
        scheme = url.scheme.removesuffix(SUFFIX)
        checked = Connection(url._replace(scheme=scheme).geturl(), api_key)
        self._name = str(checked).replace(scheme, url.scheme, 1)
        self._url, self._host = url._replace(scheme=scheme), url.hostname or ""
        try:
            self._host.encode("idna")
        except UnicodeError as error:
            raise ServiceError(
                f"{self._name} is not a valid URL: {self._host!r:.100} is no host's name ({error})"
            ) from None
        self._port = url.port or SCHEMES[url.scheme]
        self.connections: dict[str, Connection] = {}
        """Connections by URL, from the last `read`."""

    def __str__(self) -> str:
        return self._name

    async def read(self) -> None:
        """Look up the name. If it has no address now, raises Unreachable and keeps the connections."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise Unreachable(f"{self} has no address now ({error.strerror or error})") from error
        # A server with an address of each family would otherwise count twice.
        family = socket.AF_INET if any(entry[0] == socket.AF_INET for entry in found) else socket.AF_INET6
        urls = sorted({self._at(str(entry[4][0])) for entry in found if entry[0] == family})
        if not urls:
            raise Unreachable(f"{self} has no address now")
        had = self.connections
        self.connections = {url: had.get(url) or Connection(url, self._key, self._host) for url in urls}

    def _at(self, address: str) -> str:
        userinfo, at, _ = self._url.netloc.rpartition("@")
        place = f"[{address}]" if ":" in address else address
        return self._url._replace(netloc=f"{userinfo}{at}{place}:{self._port}").geturl().rstrip("/")


def names_and_urls(servers: Sequence[str], api_key: str | None) -> tuple[list[ServerName], list[Connection]]:
    """The names and the connections of a list of --server, each once. Raises ServiceError for an invalid URL."""
    once = dict.fromkeys(server.rstrip("/") for server in servers)
    if not once:
        raise ServiceError("no server given; give at least one URL")
    try:
        names = [ServerName(server, api_key) for server in once if is_name(server)]
    except ValueError as error:
        raise ServiceError(f"--server is not a valid URL: {error}") from None
    return names, [Connection(server, api_key) for server in once if not is_name(server)]
