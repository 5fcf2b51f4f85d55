"""Endpoints: the address and port that metrics are served at, and the path of the clients' socket, from the text that a
person gives.

Pure: whether they can be had, the kernel says (scrape_listener.py, listener.py).
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from mcrelay.errors import UsageError

Endpoint = tuple[str, int]  # an address as the kernel writes it, without brackets; a port

EXAMPLE: Final = "write, for example, 127.0.0.1:9478 or [::1]:9478"
SHOWN_MAX: Final = 64  # characters of a text that is refused
PATH_MAX: Final = 107  # bytes of a socket's, unix(7)


def parse_endpoint(text: str, what: str = "--metrics") -> Endpoint:
    """ADDRESS:PORT, an IPv6 address in brackets. UsageError, about `what`, if it is anything else."""
    shown = f"{what} {text[:SHOWN_MAX]!r}"
    host, colon, port_text = text.rpartition(":")
    if not colon or not host:
        raise UsageError(f"{shown} is not ADDRESS:PORT", f"{EXAMPLE}; 0.0.0.0 and [::] are all addresses")
    in_brackets = host.startswith("[") and host.endswith("]")
    try:
        address: IPv4Address | IPv6Address = ip_address(host[1:-1] if in_brackets else host)
    except ValueError:
        raise UsageError(f"{shown}: {host[:SHOWN_MAX]!r} is not an address", EXAMPLE) from None
    if in_brackets != (address.version == 6):
        raise UsageError(f"{shown}: brackets are for IPv6 addresses, which need them", EXAMPLE)
    if not (port_text.isascii() and port_text.isdigit() and len(port_text) <= 5 and 0 < int(port_text) < 2**16):
        raise UsageError(f"{shown}: {port_text[:SHOWN_MAX]!r} is not a port", "use a number from 1 to 65535")
    return str(address), int(port_text)


def endpoint_text(endpoint: Endpoint) -> str:
    address, port = endpoint
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def check_socket_path(text: str, what: str = "--socket") -> None:
    """UsageError, about `what`, if no socket can be bound there."""
    if not text.startswith("/") or "\0" in text or len(text.encode(errors="surrogateescape")) > PATH_MAX:
        raise UsageError(f"{what} {text!r} is not possible", f"give an absolute path of up to {PATH_MAX} bytes")
