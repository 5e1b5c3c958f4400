"""The key-value stores through which ranks find each other. Each listens on one address, and its values are signed.

A store has no authentication: whoever reaches its port reads and writes all keys. So it listens where its ranks are and
nowhere else, and what other ranks have written there is checked against a shared secret before it is parsed.
"""

import errno
import hmac
import os
import socket
import sys
from datetime import timedelta
from typing import Any

from pipeline.errors import UserError
from pipeline.runtime import Rendezvous, is_loopback

SECRET = "RENDEZVOUS_SECRET"  # noqa: S105  # the name of the environment variable that the launch scripts set


def listen(address: str, port: int) -> socket.socket:
    """A socket that listens on this address only ("": on all). Port 0: any free one.

    Raises:
        OSError: the port is taken, or the address is not one of this machine's.
    """
    places = socket.getaddrinfo(address or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, place = min(places, key=lambda found: found[0])  # IPv4 first
    server = socket.socket(family)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the run before may just have ended
        server.bind(place)
        server.listen(socket.SOMAXCONN)
    except OSError:
        server.close()
        raise
    return server


def serve(server: socket.socket, address: str, timeout_seconds: float, world_size: int | None = None) -> Any:
    """Hosts a store at a listening socket, which torch closes with the store; torch's own socket listens everywhere.

    With `world_size`, waits until all ranks have come.
    """
    from torch.distributed import TCPStore

    return TCPStore(
        address, server.getsockname()[1], world_size, is_master=True, timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=world_size is not None, master_listen_fd=server.detach(),
    )  # fmt: skip


def connect(address: str, port: int, timeout_seconds: float, world_size: int | None = None) -> Any:
    """Raises torch's DistError where nobody answers in time."""
    from torch.distributed import TCPStore

    return TCPStore(
        address, port, world_size, is_master=False, timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=world_size is not None,
    )  # fmt: skip


def open_store(place: Rendezvous, hosts: bool, timeout_seconds: float, world_size: int | None = None) -> Any:
    """The store at `place`: hosted by this process, unless the launcher or another rank hosts it.

    Raises:
        UserError: another program listens at the port.
        DistError: nobody answers in time.
    """
    if not hosts or place.hosted:
        return connect(place.address, place.port, timeout_seconds, world_size)
    where = f"MASTER_ADDR={place.address} MASTER_PORT={place.port}"
    try:
        server = listen(_own_address(place), place.port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise UserError(f"{where}: can't listen there: {error.strerror or error}") from None
        raise UserError(f"{where}: another program listens on this port; end it, or set another MASTER_PORT") from None
    return serve(server, place.address, timeout_seconds, world_size)


def _own_address(place: Rendezvous) -> str:
    """Where rank 0 listens: MASTER_ADDR, or all addresses where other machines could not reach it there."""
    try:
        with listen(place.address, 0) as probe:
            found = probe.getsockname()[0]
        reached = is_loopback(place.address) or not is_loopback(found)  # Debian: a machine's own name is 127.0.1.1
    except OSError:  # behind address translation
        reached = False
    if not reached:
        print(
            f"warning: MASTER_ADDR={place.address} is not an address of this machine that others reach: the store"
            f" listens on all addresses, port {place.port}; set MASTER_ADDR to the one to use, or close this port to"
            " other machines",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return place.address if reached else ""


def seal(key: str, data: bytes) -> bytes:
    """`data` behind its signature with the shared secret, which is empty where there is no secret."""
    return _signature(key, data) + b" " + data


def unseal(key: str, value: bytes, writer: str) -> bytes:
    """What was sealed under this key.

    Raises:
        UserError: the signature is not that of the secret.
    """
    signature, _, data = value.partition(b" ")
    if os.environ.get(SECRET) and not hmac.compare_digest(signature, _signature(key, data)):
        raise UserError(
            f"rendezvous: the value of key {key}, expected from {writer}, is not signed with this process's {SECRET}"
            f" and was not read; set the same {SECRET} for all ranks, and close the port to other machines"
        )
    return data


def _signature(key: str, data: bytes) -> bytes:
    secret = os.environ.get(SECRET, "")
    return hmac.digest(secret.encode(), key.encode() + b"\0" + data, "sha256").hex().encode() if secret else b""
