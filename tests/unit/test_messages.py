"""Messages: every type round-trips where it is permitted and is malformed anywhere else, strictly; and the stream of
frames that they travel in.

Examples are made from the types themselves (msgspec.inspect), so that a new message is tested from its first day, and a
field of a kind not known here fails rather than goes untested.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from mcrelay import frames, messages
from mcrelay.api import Add, Failure, GetVersion, Ping, Remove, Rules, Version
from mcrelay.channel import QUEUE_MAX
from mcrelay.codec import PERMITTED, Codec, encode, in_frames
from mcrelay.frames import FRAME_MAX, HEADER, FrameReader, Malformed
from mcrelay.limits import INTERFACES_MAX, OUTPUTS_MAX, RULE_OUTPUTS_MAX, RULES_MAX, WORKERS_MAX
from mcrelay.messages import (
    ChannelName,
    InterfaceRecord,
    Message,
    ProcessFacts,
    RecordRules,
    Role,
    RuleRecord,
    Start,
    SyncRules,
)
from mcrelay.ways import DIRECTIONS, Direction

Row = tuple[ChannelName, Role, Role]

ALL: list[type[Message]] = sorted(Message.__subclasses__(), key=lambda t: t.__name__)
ROWS: list[Row] = list(itertools.product(get_args(ChannelName), get_args(Role), get_args(Role)))
PERMITTED_ONES = [(row, message) for row, permitted in PERMITTED.items() for message in permitted]


def row_id(row: Row) -> str:
    channel, sender, receiver = row
    return f"{channel}-{sender}-{receiver}"


def permitted_id(value: object) -> str | None:
    return value.__name__ if isinstance(value, type) else row_id(value) if isinstance(value, tuple) else None


def body_of(message: Message) -> bytes:
    return encode(message)[HEADER.size :]


# --- examples of any type --------------------------------------------------------------------------------------------


def values(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a field's type, its bounds included."""
    match kind:
        case inspect.Metadata(type=described):
            return values(described)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.IntType(ge=ge, le=le, lt=lt):
            highest = le if le is not None else lt - 1 if lt is not None else 2**63 - 1
            return st.integers(ge if ge is not None else 0, highest)
        case inspect.FloatType(ge=ge, gt=gt, le=le):
            lowest = ge if ge is not None else gt
            return st.floats(lowest, le, exclude_min=gt is not None, allow_nan=False, allow_infinity=False)
        case inspect.StrType(pattern=str(pattern)):
            return st.from_regex(pattern, fullmatch=True, alphabet="0123456789")
        case inspect.StrType(max_length=longest):
            return st.text(max_size=min(longest or 20, 20))
        case inspect.BytesType():
            return st.binary(max_size=20)
        case inspect.LiteralType(values=choices):
            return st.sampled_from(choices)
        case inspect.UnionType(types=choices):
            return st.one_of([values(choice) for choice in choices])
        case inspect.VarTupleType(item_type=item):
            return st.lists(values(item), max_size=3).map(tuple)
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(values(key), values(value), max_size=3)
        case inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: values(field.type) for field in fields})
    raise AssertionError(f"say here how to make examples of {kind}")


def spoilt(kind: inspect.Type, value: Any) -> Iterator[tuple[str, Any]]:
    """(what is wrong, a JSON value like `value` but for that) for all that can be wrong with the JSON `value`."""
    yield "wrong type", {"unknown": [{}]}
    match kind:
        case inspect.IntType(ge=ge, le=le, lt=lt):
            yield "a string", "1"
            yield "a fraction", 1.5
            if ge is not None:
                yield "too small", ge - 1
            if le is not None or lt is not None:
                yield "too big", le + 1 if le is not None else lt
        case inspect.Metadata(type=described):
            yield from spoilt(described, value)
        case inspect.FloatType(ge=ge, gt=gt):
            if ge is not None or gt is not None:
                yield "too small", -1.0
            yield "a text", "1"
        case inspect.BoolType():
            yield "a number", 1
        case inspect.StrType(max_length=longest):
            yield "a number", 1
            if longest is not None:
                yield "too long", "x" * (longest + 1)
        case inspect.BytesType():
            yield "a number", 1
            yield "not base64", "ä"
        case inspect.LiteralType():
            yield "unknown word", "unknown"
        case inspect.UnionType(types=choices):
            choice = next(choice for choice in choices if not isinstance(choice, inspect.NoneType))
            if value is not None:
                yield from spoilt(choice, value)
        case inspect.VarTupleType(item_type=item, max_length=longest):
            if longest is not None:
                yield "too many", ["x"] * (longest + 1)
            yield "null among them", [*value, None]
            for at, one in enumerate(value[:1]):
                for what, other in spoilt(item, one):
                    yield f"[{at}]: {what}", [*value[:at], other, *value[at + 1 :]]
        case inspect.DictType(key_type=key_type, value_type=item):
            key = full(key_type)
            yield "null in it", {**value, key: None}
            for what, other in spoilt(item, full(item)):
                yield f"[{key}]: {what}", {**value, key: other}
        case inspect.StructType(fields=fields):
            yield "unknown field", {**value, "unknown": 1}
            for field in fields:
                if field.required:
                    yield f"no {field.name}", {k: v for k, v in value.items() if k != field.name}
                for what, other in spoilt(field.type, value[field.name]):
                    yield f"{field.name}: {what}", {**value, field.name: other}


def full(kind: inspect.Type) -> Any:
    """A JSON value of the type with every field in it, and something in every collection."""
    match kind:
        case inspect.Metadata(type=described):
            return full(described)
        case inspect.FloatType():
            return 100.0
        case inspect.StrType(pattern=str()):
            return "1"
        case inspect.BoolType():
            return True
        case inspect.IntType(le=le, lt=lt):
            return min([100, *([le] if le is not None else []), *([lt - 1] if lt is not None else [])])
        case inspect.StrType():
            return "x"
        case inspect.BytesType():
            return "eA=="
        case inspect.LiteralType(values=choices):
            return choices[0]
        case inspect.UnionType(types=choices):
            return full(next(choice for choice in choices if not isinstance(choice, inspect.NoneType)))
        case inspect.VarTupleType(item_type=item):
            return [full(item)]
        case inspect.DictType(key_type=key, value_type=item):
            return {full(key): full(item)}
        case inspect.StructType(fields=fields, tag_field=tag_field, tag=tag):
            named = {field.name: full(field.type) for field in fields}
            return {tag_field: tag, **named} if tag_field else named
    raise AssertionError(f"say here how to make an example of {kind}")


def full_message(message: type[Message]) -> dict[str, Any]:
    document: dict[str, Any] = full(inspect.type_info(message))
    return document


examples = {message: values(inspect.type_info(message)) for message in ALL}
any_message = st.one_of([examples[message] for message in ALL])


# --- who may say what ------------------------------------------------------------------------------------------------


def test_every_message_is_somebodys() -> None:
    assert {message for permitted in PERMITTED.values() for message in permitted} == set(ALL)
    assert len(ALL) > 30


@pytest.mark.parametrize(
    ("row", "names"),
    [
        (
            ("request_sock", "control", "supervisor"),
            "Ready Failed ApplyRules ReplaceWorker RequestTap HandOver GetProcesses Acknowledge Rules Stats "
            "ChangeLevels",
        ),
        (("handover_sock", "successor", "supervisor"), "Prepared TookOver Failed"),
        (("request_sock", "data", "supervisor"), "Ready Failed Acknowledge"),
        (
            ("client", "client", "control"),
            "Hello Ping GetVersion GetStatus Add Remove Pause Change ListRules GetStats GetWorkers RestartWorker "
            "Upgrade StartTap Subscribe GetLogLevels SetLogLevels",
        ),
    ],
)
def test_the_privileged_and_the_exposed_side_take_no_more_than_this(row: Row, names: str) -> None:
    """Whoever takes more has to think about who sends it, and to say so here."""
    assert {message.__name__ for message in PERMITTED[row]} == set(names.split())
    to_supervisor = [other for other in PERMITTED if other[2] == "supervisor"]
    assert {channel for channel, _sender, _receiver in to_supervisor} == {"request_sock", "handover_sock"}


def test_every_tag_is_of_one_message() -> None:
    tags = [message.__struct_config__.tag for message in ALL]
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize(("row", "message"), PERMITTED_ONES, ids=permitted_id)
@settings(max_examples=20)
@given(data=st.data())
def test_a_permitted_message_reads_as_it_was_written(row: Row, message: type[Message], data: st.DataObject) -> None:
    sent = data.draw(examples[message])
    frame = encode(sent)
    assert frame[: HEADER.size] == (len(frame) - HEADER.size).to_bytes(4, "big")
    received = Codec(*row).decode(frame[HEADER.size :])
    assert received == sent
    assert type(received) is message
    assert received.descriptors() == sent.descriptors()


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_a_message_is_refused_from_whom_and_where_it_is_not_permitted(row: Row) -> None:
    codec = Codec(*row)
    for message in ALL:
        body = json.dumps(full_message(message)).encode()
        if message in PERMITTED.get(row, ()):
            assert type(codec.decode(body)) is message
        else:
            with pytest.raises(Malformed) as refusal:
                codec.decode(body)
            assert refusal.value.stage == "decode"
            assert refusal.value.why


def test_descriptors_travel_with_few_messages() -> None:
    """What a channel may ever accept descriptors for."""
    carriers = {message.__name__ for message in ALL if message.descriptors is not Message.descriptors}
    inherited = {
        "Inherit",
        "InheritMetrics",
        "InheritInterface",
        "InheritPort",
        "InheritMemberships",
        "InheritAbsorber",
    }
    others = {"Start", "Client", "Scraper", "AttachInterface", "AttachPort", "OpenTap", "TapOpened", "Configure"}
    assert carriers == others | inherited
    start = msgspec.convert(full_message(Start), Start)
    assert start.role == "control"
    assert start.descriptors() == 1 + start.workers
    assert msgspec.structs.replace(start, role="data").descriptors() == 3
    for row, permitted in PERMITTED.items():
        if row[1] != "supervisor":
            assert not any(message.__name__ in carriers for message in permitted)


# --- strictness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "message"), PERMITTED_ONES, ids=permitted_id)
def test_a_message_with_anything_wrong_in_it_is_malformed(row: Row, message: type[Message]) -> None:
    codec = Codec(*row)
    document = full_message(message)
    assert type(codec.decode(json.dumps(document).encode())) is message
    wrong = list(spoilt(inspect.type_info(message), document))
    wrong += [
        ("no type", {name: value for name, value in document.items() if name != "type"}),
        ("unknown type", {**document, "type": "unknown"}),
        ("a number for a type", {**document, "type": 1}),
        ("in an array", [document]),
    ]
    accepted = []
    for what, other in wrong:
        try:
            codec.decode(json.dumps(other).encode())
        except Malformed as refusal:
            if refusal.stage != "decode":
                accepted.append(f"{what}: stage {refusal.stage}")
        else:
            accepted.append(what)
    assert accepted == []


PING = b'{"type":"ping","id":1}'
DEEP = 100_000

NOT_MESSAGES = {
    "empty": b"",
    "a space": b" ",
    "null": b"null",
    "a number": b"1",
    "a string": b'"ping"',
    "an array": b"[]",
    "an empty object": b"{}",
    "not JSON": b"PING / HTTP/1.1\r\n\r\n",
    "cut off": PING[:-1],
    "two messages": PING + PING,
    "a trailing character": PING + b"x",
    "a byte order mark": b"\xef\xbb\xbf" + PING,
    "UTF-16": PING.decode().encode("utf-16"),
    "a NUL": PING + b"\0",
    "an unquoted name": b'{type:"ping","id":1}',
    "not a number": b'{"type":"ping","id":NaN}',
    "a fraction": b'{"type":"ping","id":1.0}',
    "below the smallest number": b'{"type":"ping","id":-1}',
    "above the biggest number": b'{"type":"ping","id":9007199254740993}',
    "a number of 50 digits": b'{"type":"ping","id":' + b"1" * 50 + b"}",
    "a number of 5000 digits": b'{"type":"ping","id":' + b"1" * 5000 + b"}",
    "bad UTF-8": b'{"type":"remove","id":1,"rule":"\xff"}',
    "a surrogate in UTF-8": b'{"type":"remove","id":1,"rule":"\xed\xa0\x80"}',
    "overlong UTF-8": b'{"type":"remove","id":1,"rule":"\xc0\xaf"}',
    "half a surrogate": b'{"type":"remove","id":1,"rule":"\\ud800"}',
    "bad UTF-8 in a name": b'{"type":"ping","id":1,"\xff":1}',
    "an unknown escape": b'{"type":"remove","id":1,"rule":"\\x41"}',
    "a raw newline": b'{"type":"remove","id":1,"rule":"\n"}',
    "deep arrays": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep in a field": b'{"type":"ping","id":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep before the type": b'{"x":' + b"[" * DEEP + b"]" * DEEP + b',"type":"ping","id":1}',
    "deep and not ended": b'{"x":' + b"[" * DEEP,
    "another's type": b'{"type":"pong","id":1}',
    "a class's name": b'{"type":"Ping","id":1}',
    "an internal message": b'{"type":"shutdown"}',
    "a field twice": b'{"type":"ping","id":1,"id":2}',
    "a field twice, alike": b'{"type":"ping","id":1,"id":1}',
    "a field twice, once escaped": b'{"type":"ping","id":1,"\\u0069d":2}',
    "a type twice": b'{"type":"ping","id":1,"type":"ping"}',
    "a field of a rule twice": b'{"type":"change","id":1,"add":[{"input":"a","outputs":[],"input":"b"}],"remove":[],'
    b'"complete":true}',
    "1 MiB of brackets": b"[" * FRAME_MAX,
    "1 MiB of a field's brackets": b'{"type":"remove","id":1,"rule":' + b"[" * (FRAME_MAX - 31),
    "1 MiB of objects": (b'{"type":' * (FRAME_MAX // 8)),
    "1e400": b'{"type":"ping","id":1e400}',
    "an exponent of 5000 digits": b'{"type":"ping","id":1e' + b"9" * 5000 + b"}",
    "infinity": b'{"type":"ping","id":-Infinity}',
    "true for a number": b'{"type":"ping","id":true}',
    "surrogates in the wrong order": b'{"type":"remove","id":1,"rule":"\\udc00\\ud800"}',
    "a NUL in a text": b'{"type":"remove","id":1,"rule":"\0"}',
    "white space": b" \n\t ",
}


@pytest.mark.parametrize("what", NOT_MESSAGES)
def test_bytes_that_are_no_message_are_malformed(what: str) -> None:
    with pytest.raises(Malformed) as refusal:
        Codec("client", "client", "control").decode(NOT_MESSAGES[what])
    assert refusal.value.stage == "decode"
    assert refusal.value.why
    assert len(refusal.value.why) < 1000


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes_are_a_message_or_malformed(noise: bytes, at: int) -> None:
    """Noise alone, and in the middle of a message."""
    document = b'{"type":"add","id":7,"input":"239.1.1.1:5000%eth0","outputs":["239.2.2.2:6000%eth1"],"name":"a"}'
    codec = Codec("client", "client", "control")
    for body in (noise, document[:at] + noise + document[at:], document[:at] + noise[:1] + document[at + 1 :]):
        try:
            message = codec.decode(body)
        except Malformed:
            continue
        assert isinstance(message, codec.permitted)


def test_the_order_of_fields_and_white_space_mean_nothing() -> None:
    codec = Codec("client", "client", "control")
    assert codec.decode(b' {\n"id" : 1 , "type":\t"ping" } ') == Ping(id=1)
    assert codec.decode(PING) == Ping(id=1)


@pytest.mark.parametrize(
    ("message", "document"),
    [
        (Ping(id=1), {"type": "ping", "id": 1}),
        (GetVersion(id=2**53), {"type": "get_version", "id": 2**53}),
        (
            Add(id=3, input="239.1.1.1:5000%eth0", outputs=("239.2.2.2:6000%eth1,ttl=8",)),
            {
                "type": "add",
                "id": 3,
                "input": "239.1.1.1:5000%eth0",
                "outputs": ["239.2.2.2:6000%eth1,ttl=8"],
            },
        ),
        (Version(id=4, version="0.1.0", protocol=1), {"type": "version", "id": 4, "version": "0.1.0", "protocol": 1}),
        (
            Rules(id=5, generation=6, rules=(), interfaces=(), more=False),
            {"type": "rules", "id": 5, "generation": 6, "rules": [], "interfaces": [], "more": False},
        ),
        (
            Failure(id=None, code="busy", message="m", hint="h"),
            {"type": "failure", "id": None, "code": "busy", "message": "m", "hint": "h"},
        ),
    ],
)
def test_clients_in_other_languages_rely_on_the_text(message: Message, document: dict[str, object]) -> None:
    assert json.loads(body_of(message)) == document


# --- frames ----------------------------------------------------------------------------------------------------------


def test_a_message_as_large_as_a_frame_is_sent_and_no_larger() -> None:
    overhead = len(body_of(Remove(id=1, rule="")))
    largest = encode(Remove(id=1, rule="x" * (FRAME_MAX - overhead)))
    assert len(largest) == HEADER.size + FRAME_MAX
    assert list(FrameReader().feed(largest)) == [largest[HEADER.size :]]
    with pytest.raises(ValueError, match=f"Remove of {FRAME_MAX + 1} bytes"):
        encode(Remove(id=1, rule="x" * (FRAME_MAX - overhead + 1)))


def framed(body: bytes) -> bytes:
    return HEADER.pack(len(body)) + body


def fed(reader: FrameReader, stream: bytes, cuts: list[int]) -> list[bytes | Malformed]:
    """What a reader makes of a stream that comes in pieces."""
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    pieces = [stream[begin:end] for begin, end in itertools.pairwise(edges)]
    return [frame for piece in pieces for frame in reader.feed(piece)]


cut_points = st.lists(st.integers(0, 10_000), max_size=12)


@given(st.lists(st.binary(max_size=60), max_size=8), cut_points)
@example([b"", b"", b""], [1, 2, 3, 5])
def test_frames_do_not_depend_on_how_the_stream_is_cut(bodies: list[bytes], cuts: list[int]) -> None:
    reader = FrameReader()
    assert reader.between_frames
    assert fed(reader, b"".join(map(framed, bodies)), cuts) == bodies
    assert reader.between_frames


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=4), st.data())
def test_a_reader_knows_whether_it_is_between_frames(bodies: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(framed, bodies))
    length = data.draw(st.integers(0, len(stream)))
    ends = set(itertools.accumulate((len(framed(body)) for body in bodies), initial=0))
    reader = FrameReader()
    got = list(reader.feed(stream[:length]))
    assert got == bodies[: len(got)]
    assert reader.between_frames == (length in ends)


SMALL_FRAME_MAX = 32  # instead of FRAME_MAX, so that oversized frames are quick


@given(st.lists(st.binary(max_size=3 * SMALL_FRAME_MAX), max_size=8), cut_points)
@example([b"x" * (SMALL_FRAME_MAX + 1), b"", b"y" * (2 * SMALL_FRAME_MAX), b"z" * SMALL_FRAME_MAX], [])
@example([b"x" * (SMALL_FRAME_MAX + 1), b"y"], list(range(60)))
def test_an_oversized_frame_is_reported_once_and_the_stream_goes_on(bodies: list[bytes], cuts: list[int]) -> None:
    reader = FrameReader()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "FRAME_MAX", SMALL_FRAME_MAX)
        got = fed(reader, b"".join(map(framed, bodies)), cuts)
    assert len(got) == len(bodies)
    for frame, body in zip(got, bodies, strict=True):
        if len(body) <= SMALL_FRAME_MAX:
            assert frame == body
        else:
            assert isinstance(frame, Malformed)
            assert frame.stage == "frame"
            assert f"{len(body)} bytes" in frame.why
    assert reader.between_frames


@pytest.mark.parametrize("announced", [FRAME_MAX + 1, 2**31, 2**32 - 1])
def test_an_oversized_frame_is_reported_at_once_and_not_kept(announced: int) -> None:
    reader = FrameReader()
    assert [type(frame) for frame in reader.feed(HEADER.pack(announced))] == [Malformed]
    assert not reader.between_frames
    assert list(reader.feed(bytes(FRAME_MAX))) == []
    assert len(reader._buffer) == 0


def test_the_largest_skipped_frame_ends_where_it_said() -> None:
    reader = FrameReader()
    body = bytes(FRAME_MAX + 1)
    got = list(reader.feed(HEADER.pack(len(body)) + body + framed(b"next")))
    assert isinstance(got[0], Malformed)
    assert got[1:] == [b"next"]


# --- lists in several frames -----------------------------------------------------------------------------------------


def record(number: int, outputs: int) -> RuleRecord:
    return RuleRecord(input=f"{number}", outputs=("x",) * outputs, name=None, counter=0, output_counters=(0,) * outputs)


@given(st.lists(st.integers(0, 3000) | st.sampled_from([1, RULE_OUTPUTS_MAX]), max_size=10))
@example([])
def test_pieces_are_the_list_and_the_last_says_so(runs: list[int]) -> None:
    """Lists with runs of small rules, and large ones in between."""
    records: list[RuleRecord] = []
    for run in runs:
        records += [record(len(records) + n, 1) for n in range(run)]
        records.append(record(len(records), RULE_OUTPUTS_MAX))
    pieces = list(in_frames(records))
    assert [one for piece, _last in pieces for one in piece] == records
    assert [last for _piece, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece for piece, _last in pieces) or not records


def longest_record(outputs: int, letter: str) -> RuleRecord:
    """A rule with texts as long as they get."""
    source, group = "2" * 4 + ":ffff" * 7, "ff0e" + ":ffff" * 7
    endpoint = f"[{group}]:65535%{letter * 15}"
    options = f"ttl=keep,dscp=63,source={source},sport=65535,rate=999999999999bit,paused"
    return RuleRecord(
        input=f"[{source}]@{endpoint},vlan=4094",
        outputs=(f"{endpoint},{options}",) * outputs,
        name="n" * 64,
        counter=RULES_MAX - 1,
        output_counters=(OUTPUTS_MAX - 1,) * outputs,
    )


@pytest.mark.parametrize("letter", ["x", '"'])  # JSON writes two characters for a quotation mark
@pytest.mark.parametrize("outputs", [1, 4, 20, 64, RULE_OUTPUTS_MAX])
def test_every_piece_of_all_possible_rules_fits_a_frame(outputs: int, letter: str) -> None:
    """As many rules as there are counters for, however their outputs are shared out; and all pieces fit a channel."""
    count = min(RULES_MAX, OUTPUTS_MAX // outputs)
    records = [longest_record(outputs, letter)] * count
    slots = {f"{n:015}": n for n in range(INTERFACES_MAX)}
    problems: dict[Direction, str] = dict.fromkeys(DIRECTIONS, letter * 256)
    unjoined = {f"{n:091}": letter * 256 for n in range(messages.UNJOINED_MAX)}
    interfaces = tuple(
        InterfaceRecord(name, slot, True, DIRECTIONS, (4, 6), problems, {} if slot else unjoined)
        for name, slot in slots.items()
    )
    total = 0
    for piece, last in in_frames(records):
        total += len(encode(SyncRules(ticket=2**53, rules=piece, slots=slots, complete=last)))
        encode(
            RecordRules(2**53, added=piece, removed=("f" * 12,), complete=last, interfaces=interfaces, snapshot=True)
        )
    assert total < QUEUE_MAX


def test_facts_of_as_many_processes_as_there_can_be_fit_a_frame() -> None:
    facts = ProcessFacts(
        role="supervisor",
        index=WORKERS_MAX,
        state="starting",
        pid=4194304,
        uid=2**32 - 1,
        capabilities="f" * 16,
        cores=",".join(map(str, range(0, 4096, 2))),
        restarts=2**32,
        engine="reference",
        frames_malformed=2**32,
    )
    encode(messages.Processes(id=1, processes=(facts,) * (WORKERS_MAX + 2), started_s=1.5, file=None))
