"""The handshake: two sides that understand each other go on, others are told which is older and what to do.

a raw socket -- hello --> Connection            a daemon's answer --> greet()
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from mcrelay import clients as limits
from mcrelay import handshake
from mcrelay.api import PROTOCOL, PROTOCOL_OLDEST, Failure, Hello, Ping, Pong, Version, Welcome
from mcrelay.codec import encode
from mcrelay.errors import Busy, NotPermitted, ProtocolError
from mcrelay.frames import HEADER
from mcrelay.handshake import OUR_NAME, greet, welcome
from mcrelay.messages import Message
from tests.unit.test_clients import Desk, run
from tests.unit.test_conversation import held

HELLO: dict[str, Any] = {"type": "hello", "id": 5, "protocol": PROTOCOL, "client": "by hand"}


def framed(document: dict[str, Any]) -> bytes:
    body = json.dumps(document).encode()
    return HEADER.pack(len(body)) + body


# --- the daemon's side -----------------------------------------------------------------------------------------------


def test_who_says_hello_is_welcome_and_served() -> None:
    async def test(desk: Desk) -> None:
        side = desk.connect()
        side.send(framed(HELLO) + encode(Ping(id=6)))
        answer = await side.answer()
        assert answer.pop("version")
        assert answer == {
            "type": "welcome",
            "id": 5,
            "protocol": PROTOCOL,
            "oldest": PROTOCOL_OLDEST,
            "newest": PROTOCOL,
        }
        assert await side.answer() == {"type": "pong", "id": 6}

    run(test)


def test_who_says_no_hello_is_served() -> None:
    async def test(desk: Desk) -> None:
        side = desk.connect()
        side.send(encode(Ping(id=6)))
        assert await side.answer() == {"type": "pong", "id": 6}

    run(test)


@pytest.mark.parametrize(
    ("protocol", "older", "remedy"),
    [
        (0, "this client is older", "update the client"),
        (PROTOCOL_OLDEST - 1, "this client is older", "update the client"),
        (PROTOCOL + 1, "this daemon is older", "mcrelay upgrade"),
        (2**31 - 1, "this daemon is older", "mcrelay upgrade"),
    ],
)
def test_who_speaks_another_protocol_is_told_who_is_older_and_sent_away(protocol: int, older: str, remedy: str) -> None:
    async def test(desk: Desk) -> None:
        side = desk.connect()
        side.send(framed(HELLO | {"protocol": protocol, "client": "by\x1bhand"}))
        answer = await side.answer()
        assert (answer["type"], answer["id"], answer["code"]) == ("failure", 5, "protocol")
        assert answer["message"].startswith(older)
        assert remedy in answer["hint"]
        assert answer["message"].isprintable()
        assert await side.is_closed()
        assert desk.served == []

    run(test)


def test_hello_too_late_or_twice_is_refused_and_does_no_harm() -> None:
    async def test(desk: Desk) -> None:
        late, twice = desk.connect(), desk.connect()
        late.send(encode(Ping(id=1)))
        twice.send(framed(HELLO))
        assert (await late.answer())["type"] == "pong"
        assert (await twice.answer())["type"] == "welcome"
        for side in (late, twice):
            for protocol in (PROTOCOL, PROTOCOL + 1):
                side.send(framed(HELLO | {"protocol": protocol}))
                answer = await side.answer()
                assert (answer["type"], answer["id"], answer["code"]) == ("failure", 5, "protocol")
                assert "hello came after" in answer["message"]
            side.send(encode(Ping(id=9)))
            assert await side.answer() == {"type": "pong", "id": 9}

    run(test)


WRONG: dict[str, dict[str, Any]] = {
    "a text for a number": {"protocol": "2"},
    "a fraction": {"protocol": 2.5},
    "below the smallest": {"protocol": -1},
    "above the biggest": {"protocol": 2**31},
    "a list for a text": {"client": ["mcrelay"]},
    "a long text": {"client": "x" * 257},
    "null for an id": {"id": None},
    "a field more": {"languages": []},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_hello_that_is_none_is_malformed_and_may_be_said_again(what: str) -> None:
    async def test(desk: Desk) -> None:
        side = desk.connect()
        side.send(framed(HELLO | WRONG[what]))
        answer = await side.answer()
        assert (answer["type"], answer["id"], answer["code"]) == ("failure", None, "protocol")
        assert answer["message"].startswith("malformed request")
        side.send(framed(HELLO))
        assert (await side.answer())["type"] == "welcome"
        assert desk.clients.frames_malformed == 1

    run(test)


def test_rubbish_before_hello_is_counted_as_anybodys() -> None:
    async def test(desk: Desk) -> None:
        side = desk.connect()
        side.send(framed(HELLO | {"protocol": None}) * limits.MALFORMED_MAX)
        for _ in range(limits.MALFORMED_MAX):
            assert (await side.answer())["code"] == "protocol"
        assert await side.is_closed()

    run(test)


def test_a_daemon_that_understands_several_protocols_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "PROTOCOL", 9)
    monkeypatch.setattr(handshake, "PROTOCOL_OLDEST", 7)
    answer = welcome(Hello(id=1, protocol=8, client="c"), is_first=True)
    assert (answer.protocol, answer.oldest, answer.newest) == (8, 7, 9)
    with pytest.raises(ProtocolError, match="protocols 7 to 9"):
        welcome(Hello(id=1, protocol=6, client="c"), is_first=True)


# --- the client's side -----------------------------------------------------------------------------------------------


def greeted(answer: Message) -> Welcome:
    return held(greet("/run/here.sock"), lambda question: answer)


def test_a_daemon_of_our_version_is_greeted() -> None:
    welcomed = Welcome(id=0, version="1", protocol=PROTOCOL, oldest=1, newest=9)
    assert greeted(welcomed) == welcomed
    question = next(greet("/run/here.sock"))
    assert question.messages == (Hello(id=0, protocol=PROTOCOL, client=OUR_NAME),)


def test_a_daemon_that_does_not_know_hello_is_older() -> None:
    """As protocol 1 answered."""
    answer = Failure(
        id=None,
        code="protocol",
        message="malformed request: Invalid value 'hello' - at `$.type`",
        hint="a request is one of: ping, get_version; see docs/protocol.md",
    )
    with pytest.raises(ProtocolError, match=r"the daemon at /run/here\.sock is older than this client") as refusal:
        greeted(answer)
    assert "mcrelay upgrade" in refusal.value.hint


def test_a_daemon_that_refuses_has_its_say() -> None:
    with pytest.raises(ProtocolError, match="this client is older"):
        greeted(Failure(id=0, code="protocol", message="this client is older", hint="update"))
    with pytest.raises(NotPermitted, match="user 7"):
        greeted(Failure(id=None, code="not_permitted", message="user 7 may not", hint=""))
    with pytest.raises(Busy):
        greeted(Failure(id=None, code="busy", message="2048 clients", hint=""))


@pytest.mark.parametrize(
    "answer",
    [
        Pong(id=0),
        Version(id=0, version="1", protocol=PROTOCOL),
        Welcome(id=0, version="1", protocol=PROTOCOL + 1, oldest=1, newest=9),
    ],
)
def test_a_daemon_that_answers_something_else_is_none(answer: Message) -> None:
    with pytest.raises(ProtocolError):
        greeted(answer)
