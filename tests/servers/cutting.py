"""A proxy between PostgreSQL and its clients that can do what networks and poolers do.

It forwards bytes both ways and knows just enough of the protocol to cut a connection at a commit,
to swallow notifications as a pooler of transactions does, or to hold everything back.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit


class CuttingProxy:
    """Listens on loopback. Use it as a context manager.

    Attributes:
        cut: None, or where to cut the connection of the next COMMIT: `before` it reaches the
            server, or `after` the server has done it and before the client hears of it.
        cuts: How many connections were cut at a commit.
        deaf: Whether notifications are swallowed.
        waits: How often a client was told that the server is ready, for which it waits.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = Path(parse_qs(parts.query)["host"][0]) / ".s.PGSQL.5432"
        self._user = parts.username
        self._database = parts.path.lstrip("/")
        self.cut: str | None = None
        self.cuts = 0
        self.deaf = False
        self.waits = 0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._flowing = threading.Event()
        self._flowing.set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))

    @property
    def url(self) -> str:
        """The URL of the database behind it."""
        port = self._listener.getsockname()[1]
        return f"postgresql://{self._user}:not-a-secret@127.0.0.1:{port}/{self._database}"

    def hold(self) -> None:
        """Let nothing through from now on."""
        self._flowing.clear()

    def release(self) -> None:
        """Let everything through again, what was held back first."""
        self._flowing.set()

    def cut_all(self) -> None:
        """Cut every connection there is."""
        with self._lock:
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        """Begin to listen."""
        self._start(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Cut everything and stop."""
        self.release()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut_all()
        for thread in self._threads:
            thread.join(10)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(str(self._target))
            except OSError:
                client.close()
                server.close()
                continue
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {client, server}
            pair = _Pair(client, server)
            self._start(self._to_server, pair)
            self._start(self._to_client, pair)

    def _to_server(self, pair: _Pair) -> None:
        with pair.closing(self), contextlib.suppress(OSError):
            while data := pair.client.recv(65536):
                self._flowing.wait()
                if b"COMMIT\0" in data and self.cut == "before" and b"pg_notify" not in data:
                    self.cut = None
                    self.cuts += 1
                    return
                if b"COMMIT\0" in data and self.cut == "after" and b"pg_notify" not in data:
                    self.cut = None
                    self.cuts += 1
                    pair.mute = True
                pair.server.sendall(data)

    def _to_client(self, pair: _Pair) -> None:
        with pair.closing(self), contextlib.suppress(OSError):
            if not pair.encrypted():
                return
            while message := pair.message():
                self._flowing.wait()
                if pair.mute:
                    if message[:1] == b"C" and b"COMMIT" in message:
                        return  # it is done
                    continue
                self.waits += message[:1] == b"Z"
                if message[:1] == b"A" and self.deaf:
                    continue
                pair.client.sendall(message)

    def forget(self, pair: _Pair) -> None:
        """Close both ends of a connection."""
        with self._lock:
            for one in (pair.client, pair.server):
                self._open.discard(one)
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()


class _Pair:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.mute = False

    @contextlib.contextmanager
    def closing(self, proxy: CuttingProxy) -> object:  # type: ignore[misc]
        try:
            yield
        finally:
            proxy.forget(self)

    def encrypted(self) -> bool:
        """Forward the server's one-byte answer to a request for encryption, if there is one."""
        first = self.server.recv(1, socket.MSG_PEEK)
        while first in (b"N", b"S") and self._is_alone():
            self.client.sendall(self.server.recv(1))
            first = self.server.recv(1, socket.MSG_PEEK)
        return bool(first)

    def _is_alone(self) -> bool:
        # A message of type N or S has a length after it; the answer to a request has nothing.
        return len(self.server.recv(2, socket.MSG_PEEK)) == 1

    def message(self) -> bytes:
        """Return the next message of the server; empty at the end."""
        head = self._exactly(5)
        if len(head) < 5:
            return b""
        (length,) = struct.unpack("!I", head[1:])
        return head + self._exactly(length - 4)

    def _exactly(self, size: int) -> bytes:
        parts = b""
        while len(parts) < size and (more := self.server.recv(size - len(parts))):
            parts += more
        return parts
