"""Connections that another thread can abort, so that closing never waits for a silent server.

OpenConnections.new_pool --> urllib3's pool, which notes every connection that it opens
OpenConnections.break_off --> all waiting reads and writes fail at once
"""

import socket
import threading
from contextlib import suppress
from urllib.request import getproxies, proxy_bypass
from weakref import WeakSet

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool


class OpenConnections:
    """The connections of one store; thread-safe."""

    def __init__(self) -> None:
        self._all = WeakSet[HTTPConnection]()
        self._lock = threading.Lock()

    def new_pool(self, scheme: str, host: str, num: int) -> urllib3.PoolManager:
        """Return a pool of at most `num` connections to each host, or to the system's proxy."""
        note = self._note

        class PlainConnection(HTTPConnection):
            def connect(self) -> None:
                super().connect()
                note(self)

        class TlsConnection(HTTPSConnection):
            def connect(self) -> None:
                super().connect()
                note(self)

        # urllib3's own connections do not fit its declared protocols either.
        class PlainPool(HTTPConnectionPool):
            ConnectionCls = PlainConnection  # type: ignore[assignment]

        class TlsPool(HTTPSConnectionPool):
            ConnectionCls = TlsConnection  # type: ignore[assignment]

        proxy = getproxies().get(scheme)
        if proxy and not proxy_bypass(host):
            pool = urllib3.ProxyManager(proxy, maxsize=num, block=True)
        else:
            pool = urllib3.PoolManager(maxsize=num, block=True)
        classes: dict[str, type[HTTPConnectionPool]] = {"http": PlainPool, "https": TlsPool}
        pool.pool_classes_by_scheme = classes  # type: ignore[assignment]
        return pool

    def break_off(self) -> None:
        """Abort all transfers."""
        with self._lock:
            connections = list(self._all)
        for connection in connections:
            if connection.sock is not None:
                with suppress(OSError):  # closed already
                    # SSLSocket's own method would remove the TLS layer under a reader.
                    socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

    def _note(self, connection: HTTPConnection) -> None:
        with self._lock:
            self._all.add(connection)
