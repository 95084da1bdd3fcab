"""The network closed: while a model is open, nothing of this process reaches another machine, or this one's ports.

    with network_closed() as attempts:                              # or to=[("127.0.0.1", 8000)], and nowhere else
        ...
    attempts                                                        # what was tried, and not let through

Python tells an audit hook of every connection and look-up before it is made (PEP 578); while a block like this runs,
the hook refuses. A hook cannot be taken out again, so it is put in once and asked to look on only where no block runs.

It holds for the whole process, whatever thread asks, for what a library does behind one's back it does in threads of
its own; of two blocks at once, each lets through what the other does. What was connected before stays connected, and
so do sockets of Unix. Not seen are sockets that compiled code opens by itself, and other processes: Ray's are both.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from ipaddress import ip_address
from typing import Any

Address = tuple[str, int]

_WITHIN = {getattr(socket, name, None) for name in ("AF_UNIX", "AF_NETLINK", "AF_ALG")}
_MOST = 100


class NetworkClosed(ConnectionError):
    """A connection, or the look-up of a name, that was refused."""


@dataclass(eq=False)
class _Block:
    to: frozenset[Address]
    attempts: list[str] = field(default_factory=list)


_blocks: list[_Block] = []


@contextmanager
def network_closed(to: Iterable[Address] = ()) -> Iterator[list[str]]:
    """Refuse every connection, look-up and datagram while the block runs, save to these hosts at these ports.

    Yields:
        What was refused so far, each address once.

    Raises (within the block):
        NetworkClosed: in the code that tried.
    """
    _put_in()
    block = _Block(frozenset((host.lower(), port) for host, port in to))
    _blocks.append(block)
    try:
        yield block.attempts
    finally:
        _blocks.remove(block)


@cache
def _put_in() -> None:
    sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _blocks or not event.startswith("socket."):
        return
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        speaker, address = arguments[:2]
        if speaker.family not in _WITHIN and address is not None and not _may_reach(address):
            _refuse(":".join(map(str, address[:2])) if isinstance(address, tuple) else str(address))
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = _text(arguments[0])
        if not _is_number(host) and host not in {name for block in _blocks for name, _ in block.to}:
            _refuse(host)


def _may_reach(address: Any) -> bool:
    """Whether some block lets this address through, by name or by what its name stands for now."""
    if not isinstance(address, tuple) or len(address) < 2:
        return False
    host, port = _text(address[0]), address[1]
    names = {name for block in list(_blocks) for name, open_port in block.to if open_port == port}
    return host in names or any(host in _addresses(name, port) for name in names)


def _addresses(host: str, port: int) -> set[str]:
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, port)}
    except OSError:
        return set()


def _text(host: Any) -> str:
    """A host as it is compared: nothing and "" mean this machine, for which no name is looked up."""
    return (host.decode("ascii", "replace") if isinstance(host, bytes) else str(host or "::")).lower()


def _is_number(host: str) -> bool:
    """A numeric address, which is looked up nowhere; whether it may be reached is asked when it is."""
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _refuse(where: str) -> None:
    for block in list(_blocks):
        if where not in block.attempts and len(block.attempts) < _MOST:
            block.attempts.append(where)
    raise NetworkClosed(f"the network is closed while a model is open: {where[:200]} may not be reached")
