"""The servers that tests start end whole: what one leaves would be another test's failure."""

from __future__ import annotations

import gc
import json
import socket
from urllib.parse import urlsplit

import pytest

from servers.chat import ChatServer


@pytest.mark.parametrize("clients", range(20))
def test_a_server_that_ends_drops_who_is_just_coming(clients: int) -> None:
    """Connections that it hadn't seen when it was stopped are closed, too."""
    with ChatServer() as server:
        coming = [_connect(server) for _ in range(clients)]
    for client in coming:
        client.settimeout(10)
        try:
            assert client.recv(1) == b""
        except ConnectionResetError:
            pass
        finally:
            client.close()
    gc.collect()  # pytest makes a failure of a connection that is still open here


def _connect(server: ChatServer) -> socket.socket:
    parts = urlsplit(server.url)
    assert parts.port
    return socket.create_connection(("127.0.0.1", parts.port))


def test_a_server_ends_though_nobody_reads() -> None:
    """What it couldn't send is no reason to wait, and is let go of."""
    with ChatServer() as server:
        deltas = [{"content": "x" * 99_000}] * 99
        body = json.dumps({"scenario": {"deltas": deltas}}).encode()
        client = _connect(server)
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        server.wait_until_open(1)
    client.close()
    gc.collect()
