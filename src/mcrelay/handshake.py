"""The handshake: the first words of a connection, by which two sides know whether they understand each other.

    client -> daemon   hello     the protocol that it speaks, and what it is
    daemon -> client   welcome   what the daemon is, and the protocols that it understands
                       failure   code "protocol": who of the two is older, and what to do

Owns the judgement, of both sides. Knows nothing of connections: clients.py and conversation.py have those.

Protocols have numbers, and every change of a message has a new one: decoding is strict, so that an older client could
not read an answer with so much as a field more. `hello`, `welcome` and `failure` are the same in all protocols from 2
on, or a refusal could not be read. `get_version` and `upgrade` with their answers are, too, and from 1 on: a daemon of
any version can be asked what it is, and to be replaced. Protocol 1 had no hello, which is malformed to its daemons.
"""

from __future__ import annotations

from typing import Final

from mcrelay import __version__
from mcrelay.api import PROTOCOL, PROTOCOL_OLDEST, Failure, Hello, Welcome
from mcrelay.conversation import ID, Dialogue, Question, settle
from mcrelay.errors import ProtocolError

OUR_NAME: Final = f"mcrelay {__version__}"


# --- the daemon's side ------------------------------------------------------------------------------------------------


def welcome(hello: Hello, *, is_first: bool) -> Welcome:
    """The answer to it, or a ProtocolError that says why there is no use in going on."""
    if not is_first:
        raise ProtocolError("hello came after other requests", "say it first on a connection, once, or not at all")
    if hello.protocol > PROTOCOL:
        raise ProtocolError(
            f"this daemon is older than its client: {OUR_NAME} speaks {_spoken()}, {hello.client!r} {hello.protocol}",
            "install the client's version where the daemon runs, then: mcrelay upgrade",
        )
    if hello.protocol < PROTOCOL_OLDEST:
        raise ProtocolError(
            f"this client is older than the daemon: {hello.client!r} speaks protocol {hello.protocol}, {OUR_NAME} "
            + _spoken(),
            f"update the client to {OUR_NAME}, and start it again",
        )
    return Welcome(id=hello.id, version=__version__, protocol=hello.protocol, oldest=PROTOCOL_OLDEST, newest=PROTOCOL)


def _spoken() -> str:
    return f"protocol {PROTOCOL}" if PROTOCOL_OLDEST == PROTOCOL else f"protocols {PROTOCOL_OLDEST} to {PROTOCOL}"


# --- the client's side ------------------------------------------------------------------------------------------------


def greet(path: str) -> Dialogue[Welcome]:
    """Say hello to the daemon at `path`. ProtocolError if it does not understand us, or we do not understand it."""
    reply = yield Question((Hello(id=ID, protocol=PROTOCOL, client=OUR_NAME),), reads=True)
    if isinstance(reply, Failure) and reply.id is None and reply.code == ProtocolError.code:
        raise ProtocolError(
            f"the daemon at {path} is older than this client: it does not know 'hello', {OUR_NAME} speaks protocol "
            f"{PROTOCOL}",
            "install this version where the daemon runs, then: mcrelay upgrade",
        )
    answer = settle(reply, Welcome)
    if answer.protocol != PROTOCOL:
        raise ProtocolError(
            f"the daemon at {path} answers in protocol {answer.protocol}, asked for {PROTOCOL}", "report it as a bug"
        )
    return answer
