"""The network while a model is open: a listening server on this machine hears nothing, unless it is named."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from worlds import open_target, quiet_scan, small_case

import audit.instrument
from audit.gather import open_model
from audit.instrument import Instrument
from audit.offline import NetworkClosed, network_closed
from audit.record import Question


class Server:
    """Answers every GET, and remembers it."""

    def __init__(self) -> None:
        heard = self.heard = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                heard.append(self.path)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"here")

            def log_message(self, *_: Any) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/canary"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.http.shutdown()
    made.http.server_close()
    thread.join()


def ask(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read()


def test_closed_within_the_block_and_open_around_it(server):
    assert ask(server.url) == b"here"
    with network_closed() as attempts:
        with pytest.raises(OSError, match="the network is closed"):
            ask(server.url)
        with pytest.raises(OSError, match="the network is closed"):
            ask(server.url)
    assert attempts == [f"127.0.0.1:{server.port}"]
    assert ask(server.url) == b"here"
    assert len(server.heard) == 2


def test_another_thread_is_refused_too(server):
    caught: list[Exception] = []

    def secretly() -> None:
        try:
            ask(server.url)
        except OSError as error:
            caught.append(error)

    with network_closed() as attempts:
        thread = threading.Thread(target=secretly)
        thread.start()
        thread.join()
    assert len(caught) == 1 and len(attempts) == 1 and not server.heard


def test_one_address_may_be_left_open(server):
    other = Server()
    try:
        with network_closed(to=[("127.0.0.1", server.port)]) as attempts:
            assert ask(server.url) == b"here"
            with pytest.raises(OSError, match="closed"):
                ask(other.url)
        with network_closed(to=[("LocalHost", server.port)]):
            assert ask(f"http://localhost:{server.port}/by-name") == b"here"
    finally:
        other.http.server_close()
    assert attempts == [f"127.0.0.1:{other.port}"]
    assert server.heard == ["/canary", "/by-name"] and not other.heard


def test_blocks_within_blocks_and_beside_each_other(server):
    with network_closed(), network_closed(to=[("127.0.0.1", server.port)]):
        assert ask(server.url) == b"here"
    with network_closed() as outer:
        with network_closed() as inner, pytest.raises(OSError, match="closed"):
            ask(server.url)
        with pytest.raises(OSError, match="closed"):
            ask(server.url)
    assert outer == inner == [f"127.0.0.1:{server.port}"]


@pytest.mark.parametrize(
    "reach",
    [
        lambda: socket.getaddrinfo("model.example", 443),
        lambda: socket.gethostbyname("model.example"),
        lambda: socket.create_connection(("192.0.2.1", 443), timeout=1),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
        lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM).connect_ex(("::1", 9)),
    ],
    ids=["look-up", "old look-up", "connection", "datagram", "quiet connection"],
)
def test_whatever_way_is_tried(reach):
    with network_closed() as attempts, pytest.raises(NetworkClosed):
        reach()
    assert len(attempts) == 1


def test_what_stays_open(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = socket.socketpair()
    with network_closed() as attempts, socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as by:
        listening.bind("here")
        listening.listen()
        by.connect("here")
        one.sendall(b"x")
        assert other.recv(1) == b"x"
        assert socket.getaddrinfo("127.0.0.1", 80) and socket.getaddrinfo(None, 80)
    one.close()
    other.close()
    assert not attempts


# --- a scan


class Telling(Instrument):
    """A planted instrument that tells a server what it reads."""

    name = "telling"
    title = "tells"
    question = Question.LEAKAGE
    reference = "none"

    url = ""

    def requests(self, case: Any, target: Any) -> list[Any]:
        return []

    def measure(self, case: Any, evidence: Any) -> list[Any]:
        ask(self.url)
        return []


@pytest.fixture
def telling(server, monkeypatch) -> None:
    from importlib.metadata import EntryPoint

    known, value = audit.instrument._points(), f"{Telling.__module__}:Telling"
    point = EntryPoint("telling", value, audit.instrument.GROUP)
    monkeypatch.setattr(audit.instrument, "_points", lambda: known | {"telling": point})
    monkeypatch.setattr(Telling, "url", server.url)


def test_an_instrument_that_tells_fails_and_the_scan_goes_on(tmp_path, server, telling):
    record = quiet_scan(small_case(only="memorization,telling"), tmp_path / "out")
    (row,) = record.not_run
    assert row.instrument == "telling" and row.failed
    assert f"127.0.0.1:{server.port} may not be reached" in row.reason
    assert f"127.0.0.1:{server.port}" in next(limit for limit in record.verdict.limits if "network" in limit)
    assert {finding.instrument for finding in record.findings} == {"memorization"}
    assert not server.heard
    assert ask(server.url) == b"here", "open again when the scan is over"


def test_opening_a_model_is_within_and_an_undisturbed_scan_tries_nothing(tmp_path, server):
    def opening(*arguments: Any, **options: Any) -> Any:
        with pytest.raises(NetworkClosed):
            socket.create_connection(("127.0.0.1", server.port))
        return open_model(*arguments, **options)

    record = quiet_scan(small_case(), tmp_path / "telling", open_target=opening)
    assert any("network" in limit for limit in record.verdict.limits) and not server.heard
    assert not any("network" in limit for limit in quiet_scan(small_case(), tmp_path / "quiet").verdict.limits)


def test_a_target_alone_is_opened_without_the_network():
    with network_closed() as attempts:
        assert open_target().model is not None
    assert not attempts
