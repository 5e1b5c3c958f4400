"""Prints this node's address and network interface towards HEAD: `address.py HEAD [INTERFACE]`.

Host names may be unknown to other nodes, or stand for 127.0.1.1; the way that packets take doesn't lie.
"""

import socket
import sys

import psutil

head, wanted = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
found = {
    address.address: name
    for name, addresses in psutil.net_if_addrs().items()
    for address in addresses
    if address.family == socket.AF_INET and wanted in ("", name)
}
if wanted:
    if not found:
        sys.exit(f"NETWORK_INTERFACE={wanted}: no such interface with an IPv4 address on {socket.gethostname()}")
    own = next(iter(found))
else:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((head, 1))  # sends nothing
        except OSError as error:
            sys.exit(f"{socket.gethostname()}: no way to the head node {head}: {error}")
        own = probe.getsockname()[0]
print(own, found[own])
