"""A client's conversation without a connection: questions, answers in whatever pieces, and what is made of them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcrelay import calls
from mcrelay.api import (
    Change,
    Changed,
    Failure,
    GetStats,
    ListRules,
    Ping,
    Pong,
    RuleFacts,
    Rules,
    RuleStats,
    Stats,
    TapEnded,
    Tapped,
    TapStarted,
    Version,
)
from mcrelay.codec import Codec, encode
from mcrelay.conversation import Conversation, Dialogue, Question, Result, id_of, settle
from mcrelay.errors import EXIT_CODES, Busy, Conflict, Error, ProtocolError, RuleError, UsageError
from mcrelay.frames import FRAME_MAX, HEADER, FrameReader, Malformed
from mcrelay.messages import Message

PATH = "/run/here.sock"


def requests_in(data: bytes) -> list[Message]:
    """As the daemon reads them."""
    codec = Codec("client", "client", "control")
    requests = []
    for frame in FrameReader().feed(data):
        assert not isinstance(frame, Malformed)
        requests.append(codec.decode(frame))
    return requests


def held(dialogue: Dialogue[Result], answer: Callable[[Question], Message]) -> Result:
    """What a dialogue comes to, with a daemon of one function."""
    try:
        question = next(dialogue)
        while True:
            question = dialogue.send(answer(question))
    except StopIteration as end:
        result: Result = end.value
        return result


# --- bytes and messages ----------------------------------------------------------------------------------------------

ANSWERS: Sequence[Message] = (
    Pong(id=1),
    Version(id=2, version="1.2.3", protocol=2),
    Failure(id=None, code="busy", message="too many", hint="wait"),
    Tapped(id=3, packets=(), lost=7),
    Rules(id=4, generation=1, rules=(), interfaces=(), more=False),
)


@given(st.lists(st.sampled_from(ANSWERS), max_size=8), st.lists(st.integers(0, 10_000), max_size=12))
def test_messages_do_not_depend_on_how_the_stream_is_cut(messages: list[Message], cuts: list[int]) -> None:
    stream = b"".join(map(encode, messages))
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    conversation = Conversation(PATH)
    heard = []
    for begin, end in itertools.pairwise(edges):
        conversation.feed(stream[begin:end])
        while (message := conversation.hear()) is not None:
            heard.append(message)
    assert heard == messages


@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_are_a_message_or_nothing_yet_or_an_error_of_one_line(data: bytes) -> None:
    conversation = Conversation(PATH)
    conversation.feed(data)
    errors: list[ProtocolError] = []
    while not errors:
        try:
            if conversation.hear() is None:
                break
        except ProtocolError as error:
            errors.append(error)
    assert all(PATH in error.message and str(error).isprintable() for error in errors)


def test_what_came_before_garbage_is_heard() -> None:
    conversation = Conversation(PATH)
    conversation.feed(encode(Pong(id=1)) + HEADER.pack(2) + b"??")
    assert conversation.hear() == Pong(id=1)
    with pytest.raises(ProtocolError, match="cannot be read"):
        conversation.hear()


def test_questions_have_ids_of_their_own() -> None:
    conversation = Conversation(PATH)
    said = [conversation.say(Question((Ping(id=0),))) for _ in range(3)]
    assert [requests_in(frames) for _id, frames in said] == [[Ping(id=request_id)] for request_id, _frames in said]
    assert len({request_id for request_id, _frames in said}) == 3


@pytest.mark.parametrize(
    ("dialogue", "words"),
    [
        (calls.add("x", ["y" * FRAME_MAX], None), "fewer or shorter"),
        (calls.remove(os.fsdecode(b"feed-\xff")), "not UTF-8"),
    ],
)
def test_what_cannot_be_said_takes_no_id(dialogue: Dialogue[object], words: str) -> None:
    conversation = Conversation(PATH)
    with pytest.raises(UsageError, match=words):
        conversation.say(next(dialogue))
    request_id, frames = conversation.say(Question((Ping(id=0),)))
    assert requests_in(frames) == [Ping(id=request_id)] == [Ping(id=0)]


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [*EXIT_CODES, "of a later version"])
def test_a_refusal_is_the_error_of_its_code(code: str) -> None:
    with pytest.raises(Error) as refusal:
        settle(Failure(id=1, code=code, message="it cannot be", hint="do otherwise"), Pong)
    error = refusal.value
    assert (error.code, error.message, error.hint) == (code, "it cannot be", "do otherwise")
    kinds = {"conflict": Conflict, "bad_rule": RuleError, "protocol": ProtocolError, "of a later version": Error}
    assert type(error) is kinds.get(code, type(error))


def test_an_answer_to_something_else_is_an_error() -> None:
    assert settle(Pong(id=1), Pong) == Pong(id=1)
    with pytest.raises(ProtocolError, match="answered with Version"):
        settle(Version(id=1, version="1", protocol=2), Pong)


def test_whose_answer_it_is() -> None:
    assert [id_of(message) for message in ANSWERS] == [1, 2, None, 3, 4]


def test_a_stream_has_items_and_an_end() -> None:
    stream = calls.tap("feed", None, 128)
    facts = RuleFacts("0" * 12, None, "x", ("y",), state="active", problems=())
    held(stream.open(), lambda question: TapStarted(id=1, rule=facts, workers=1))
    item = Tapped(id=1, packets=(), lost=3)
    assert stream.take(item) == item
    assert stream.take(TapEnded(id=1)) is None
    with pytest.raises(RuleError, match="has gone"):
        stream.take(Failure(id=1, code="bad_rule", message="the rule has gone", hint=""))
    with pytest.raises(ProtocolError):
        stream.take(Pong(id=1))
    assert stream.silence is not None
    assert [stream.silence(None).lost, stream.silence(item).lost] == [0, 3]


# --- calls of several messages ---------------------------------------------------------------------------------------

NAMES = [f"{n:012x}" for n in range(7)]


FACTS = RuleFacts(NAMES[0], None, "x", ("y",), state="active", problems=())


def listed(question: Question) -> Message:
    """A daemon with seven rules, of which it tells three at a time."""
    (request,) = question.messages
    assert isinstance(request, ListRules | GetStats)
    assert question.reads
    begin = NAMES.index(request.after) + 1 if request.after else 0
    page, more = NAMES[begin : begin + 3], begin + 3 < len(NAMES)
    if isinstance(request, ListRules):
        rules = tuple(RuleFacts(name, None, "x", ("y",), state="active", problems=()) for name in page)
        return Rules(id=1, generation=7, rules=rules, interfaces=(), more=more)
    zeroes = dict.fromkeys(("packets", "bytes", "forwarded", "dropped", "own", "looped", "suspensions"), 0)
    stats = tuple(RuleStats(id=name, name=None, input="x", outputs=(), **zeroes) for name in page)
    return Stats(id=1, generation=7, workers=(), rules=stats, more=more, frames_malformed=4)


def test_long_lists_are_asked_for_until_their_end() -> None:
    rules, stats = held(calls.listing(), listed), held(calls.stats(), listed)
    assert [rule.id for rule in rules.rules] == [rule.id for rule in stats.rules] == NAMES
    assert (rules.generation, rules.more, stats.generation, stats.more) == (7, False, 7, False)
    assert stats.frames_malformed == 4
    assert held(calls.rules(), listed) == rules.rules


def test_a_list_that_never_ends_is_an_error() -> None:
    empty = Rules(id=1, generation=7, rules=(), interfaces=(), more=True)
    with pytest.raises(ProtocolError, match="no end"):
        held(calls.listing(), lambda question: empty)


def test_a_list_that_changes_meanwhile_is_asked_for_anew() -> None:
    whole = Rules(id=1, generation=7, rules=(FACTS,), interfaces=(), more=False)
    changed = Failure(id=1, code="busy", message="the rules changed while they were listed", hint="ask again")
    page = msgspec.structs.replace(whole, more=True)
    answers = iter([page, changed, page, changed, whole])
    assert held(calls.listing(), lambda question: next(answers)).rules == (FACTS,)
    answers = iter([page, changed] * calls.PAGINGS)
    with pytest.raises(Busy):  # but not for ever
        held(calls.listing(), lambda question: next(answers))
    with pytest.raises(Busy):  # nor what is no matter of pages
        held(calls.listing(), lambda question: changed)


def test_a_long_change_goes_in_pieces_of_one_id() -> None:
    add = [(f"239.1.{n // 250}.{n % 250}:5000%eth0", [f"239.2.2.2:{n + 1}%eth1"] * 8, None) for n in range(5000)]
    remove = [f"rule-{n}" for n in range(2 * calls.NAMES_PER_FRAME + 1)]
    pieces: list[Change] = []

    def take(question: Question) -> Message:
        assert not question.reads
        request_id, frames = Conversation(PATH).say(question)
        for piece in requests_in(frames):
            assert isinstance(piece, Change)
            assert piece.id == request_id
            pieces.append(piece)
        return Changed(id=request_id, generation=9, added=0, removed=0, workers=1)

    assert held(calls.change(add, remove, 8), take).generation == 9
    assert [piece.complete for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 4
    assert pieces[-1].expect == 8
    assert [name for piece in pieces for name in piece.remove] == remove
    rules = [(rule.input, list(rule.outputs), rule.name) for piece in pieces for rule in piece.add]
    assert rules == add


@pytest.mark.parametrize(
    ("dialogue", "says"),
    [
        (lambda: calls.add("i", "239.2.2.2:6000%eth1", None), "outputs: '239.2.2.2:6000%eth1' is no list"),
        (lambda: calls.add("i", [5], None), "Add cannot be asked: Expected `str`, got `int`"),  # type: ignore[list-item] # wrong
        (lambda: calls.add(None, ["o"], None), "Add cannot be asked: Expected `str`, got `null`"),  # type: ignore[arg-type] # wrong
        (lambda: calls.change([("i", ["o"])], [], None), "add: ('i', ['o']) is no rule"),  # type: ignore[list-item] # wrong
        (lambda: calls.change([{"i": 1}], [], None), "add: {'i': 1} is no rule"),  # type: ignore[list-item] # wrong
        (lambda: calls.change([("i", "o", None)], [], None), "outputs: 'o' is no list"),
        (lambda: calls.change([], "feed", None), "remove: 'feed' is no list"),
        (lambda: calls.change([], ["x"], "1"), "Change cannot be asked: Expected `int | null`, got `str`"),  # type: ignore[arg-type] # wrong
        (lambda: calls.remove(None), "Remove cannot be asked: Expected `str`, got `null`"),  # type: ignore[arg-type] # wrong
        (lambda: calls.remove(object()), "Remove cannot be asked: "),  # type: ignore[arg-type] # wrong
        (lambda: calls.events("loss").open(), "kinds: 'loss' is no list"),  # type: ignore[arg-type] # wrong
        (lambda: calls.events([], 0).open(), "patience_s: 0 is no time"),
        (lambda: calls.tap("feed", 1, 9, float("nan")).open(), "patience_s: nan is no time"),
        (lambda: calls.events(["nonsense"]).open(), "there is no event 'nonsense'"),  # type: ignore[list-item] # wrong
    ],
)
def test_what_is_no_request_is_refused_before_it_is_sent(dialogue: Callable[[], Dialogue[object]], says: str) -> None:
    conversation = Conversation(PATH)
    with pytest.raises(UsageError) as refused:
        conversation.say(next(dialogue()))
    assert refused.value.message.startswith(says)
    assert refused.value.hint
