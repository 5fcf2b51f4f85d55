"""Endpoint: the text of --metrics."""

from __future__ import annotations

import pytest

from mcrelay.endpoint import endpoint_text, parse_endpoint
from mcrelay.errors import UsageError


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("127.0.0.1:9478", ("127.0.0.1", 9478)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("[::]:9478", ("::", 9478)),
        ("[fe80::1%eth0]:9478", ("fe80::1%eth0", 9478)),
    ],
)
def test_an_address_and_a_port(text: str, endpoint: tuple[str, int]) -> None:
    assert parse_endpoint(text) == endpoint
    assert endpoint_text(endpoint) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not ADDRESS:PORT"),
        ("9478", "not ADDRESS:PORT"),
        (":9478", "not ADDRESS:PORT"),
        ("127.0.0.1", "not ADDRESS:PORT"),
        ("localhost:9478", "'localhost' is not an address"),
        ("127.0.0.1.1:9478", "'127.0.0.1.1' is not an address"),
        ("*:9478", "'*' is not an address"),
        ("::1:9478", "brackets are for IPv6"),
        ("[127.0.0.1]:9478", "brackets are for IPv6"),
        ("[::1:9478", "'[::1' is not an address"),
        ("127.0.0.1:", "'' is not a port"),
        ("127.0.0.1:0", "'0' is not a port"),
        ("127.0.0.1:65536", "'65536' is not a port"),
        ("127.0.0.1:-1", "'-1' is not a port"),
        ("127.0.0.1:٣", "'٣' is not a port"),
        ("127.0.0.1:http", "'http' is not a port"),
        ("http://127.0.0.1:9478", "is not an address"),
        ("127.0.0.1:9478/metrics", "is not a port"),
        ("1" * 1000 + ":1", "is not an address"),
    ],
)
def test_anything_else_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_endpoint(text)
    line = str(refusal.value)
    assert words in line
    assert refusal.value.message.startswith(f"--metrics {text[:64]!r}")
    assert refusal.value.hint
    assert "\n" not in line
    assert len(line) < 300
