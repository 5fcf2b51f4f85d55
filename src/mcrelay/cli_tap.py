"""The commands `mcrelay trace` and `mcrelay capture`: packets of a rule, as lines or as a file.

Owns what a person types and sees of them, and the file that is written. Packets go to standard output or to the file;
what is said about them goes to standard error. Both end with Ctrl-C or SIGTERM, which is a good end.

A file holds whole packets at any moment: each is written at once, and what of it a full disk did not take is cut off
again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Final

import click

from mcrelay import __version__, cli_complete
from mcrelay.api import Tapped, TappedPacket
from mcrelay.cli_options import Number, Whole, json_option, socket_option
from mcrelay.client import Client
from mcrelay.errors import Error, UsageError
from mcrelay.limits import TAP_BYTES_DEFAULT, TAP_BYTES_MAX
from mcrelay.pcapng import Writer
from mcrelay.tap import packet_facts, packet_line, payload_lines, verdict_text

COUNT_DEFAULT: Final = 10
LOOK_S: Final = 0.2  # how often we look at the time while nothing comes
SILENCE_S: Final = 5.0  # after which we say so


@click.command()
@click.argument("rule", metavar="NAME|ID", shell_complete=cli_complete.rules)
@click.option(
    "--count",
    type=Whole(0),
    default=COUNT_DEFAULT,
    show_default=True,
    metavar="N",
    help="End after so many packets; 0: with Ctrl-C.",
)
@click.option("--payload", is_flag=True, help="Show the payload, too, as far as --snap-length goes.")
@click.option(
    "--snap-length",
    type=Whole(0, TAP_BYTES_MAX),
    default=TAP_BYTES_DEFAULT,
    show_default=True,
    metavar="N",
    help="Bytes of each packet, from its IP header on.",
)
@json_option
@socket_option
def trace(rule: str, count: int, payload: bool, snap_length: int, as_json: bool, path: str) -> None:
    """Show the next packets of a rule, each with what became of it. Packets that come faster than they can be shown are
    left out, and counted. With --json, one JSON document per line.

    \b
    Example: mcrelay trace feed-a
    """
    shown = _Shown(rule)
    with Client(path) as client, until_stopped():
        for tapped in shown.follow(client, count or None, snap_length):
            for packet in tapped.packets:
                if as_json:
                    click.echo(json.dumps(packet_facts(packet)))
                    continue
                click.echo(f"{_clock(packet.time_ns)} {packet_line(packet)}")
                if payload:
                    for line in payload_lines(packet.data):
                        click.echo(line)
    shown.say(f"{_packets(shown.count)} shown")


@click.command()
@click.argument("rule", metavar="NAME|ID", shell_complete=cli_complete.rules)
@click.option(
    "-w",
    "--write",
    "file",
    required=True,
    metavar="FILE",
    help="Where to; - is standard output.",
    shell_complete=cli_complete.files,
)
@click.option("--count", type=Whole(1), metavar="N", help="End after so many packets [default: with Ctrl-C].")
@click.option("--seconds", type=Number(0, min_open=True), metavar="S", help="End after so many seconds.")
@click.option(
    "--snap-length",
    type=Whole(1, TAP_BYTES_MAX),
    default=TAP_BYTES_MAX,
    show_default=True,
    metavar="N",
    help="Bytes of each packet, from its IP header on.",
)
@socket_option
def capture(rule: str, file: str, count: int | None, seconds: float | None, snap_length: int, path: str) -> None:
    """Write the next packets of a rule to a file that Wireshark and tshark read (pcapng), each with a comment on what
    became of it. An existing file is replaced, unless the rule is refused. Packets that come faster than they can be
    written are left out, and counted.

    \b
    Example: mcrelay capture feed-a -w feed-a.pcapng --count 100
    Example: mcrelay capture feed-a -w - | tshark -r -
    """
    if file == "-" and sys.stdout.isatty():
        raise UsageError("a capture is no text for a terminal", "give a file, -w FILE, or pipe it into tshark -r -")
    shown = _Shown(rule)
    blocks = Writer(f"mcrelay {__version__}", snap_length)
    with Client(path) as client, until_stopped():
        packets = shown.follow(client, count, snap_length, seconds)
        with _File(file) as output:
            output.write(blocks.begin())
            lost = 0
            for tapped in packets:
                for packet in tapped.packets:
                    output.write(_block(blocks, packet, tapped.lost - lost))
                    lost = tapped.lost
    shown.say(f"{_packets(shown.count)} written")


def _block(blocks: Writer, packet: TappedPacket, lost: int) -> bytes:
    comment = verdict_text(packet)
    if packet.vlan:
        comment = f"vlan {packet.vlan}; {comment}"
    if packet.datagrams > 1:
        comment = f"{packet.datagrams} datagrams merged; {comment}"
    return blocks.packet(packet.interface, packet.time_ns, packet.data, packet.length, comment, lost=lost)


def _clock(time_ns: int) -> str:
    seconds, rest = divmod(time_ns, 10**9)
    return f"{datetime.fromtimestamp(seconds):%H:%M:%S}.{rest // 1000:06}"


def _packets(count: int) -> str:
    return "1 packet" if count == 1 else f"{count} packets"


class _Shown:
    """What has been shown of a rule."""

    def __init__(self, rule: str) -> None:
        self.count = 0
        self._rule = rule
        self._lost = 0

    def follow(
        self, client: Client, count: int | None, snap_length: int, seconds: float | None = None
    ) -> Iterator[Tapped]:
        """Packets as they come, once the daemon has agreed; and a word where none do."""
        items = client.tap(self._rule, count=count, snap_length=snap_length, patience_s=LOOK_S)
        return self._follow(items, seconds)

    def _follow(self, items: Iterator[Tapped], seconds: float | None) -> Iterator[Tapped]:
        started = time.monotonic()
        heard = said = started
        for tapped in items:
            now = time.monotonic()
            self.count += len(tapped.packets)
            self._lost = tapped.lost
            if tapped.packets:
                heard = now
                yield tapped
            elif now - max(heard, said) >= SILENCE_S:
                said = now
                self.say(
                    f"no packet for {now - heard:.0f} s; 'mcrelay explain' may say why",
                )
            if seconds is not None and now - started >= seconds:
                return

    def say(self, what: str) -> None:
        lost = f"; {self._lost} more came too fast" if self._lost else ""
        click.echo(f"{self._rule}: {what}{lost}", err=True)


@contextlib.contextmanager
def until_stopped() -> Iterator[None]:
    """Ctrl-C and SIGTERM end what is inside, and no more."""
    # A shell's background job begins with SIGINT ignored, and would have no end.
    earlier = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


class _File:
    """Takes blocks whole or not at all. Error if it cannot."""

    def __init__(self, name: str) -> None:
        self._name = name
        try:
            self._fd = os.dup(1) if name == "-" else os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise self._error(error) from None
        self._is_regular = stat.S_ISREG(os.fstat(self._fd).st_mode)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_reason: object) -> None:
        os.close(self._fd)

    def write(self, block: bytes) -> None:
        start = os.lseek(self._fd, 0, os.SEEK_CUR) if self._is_regular else 0
        left = memoryview(block)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except BaseException as error:  # Ctrl-C, too
            if self._is_regular:
                os.ftruncate(self._fd, start)
            if isinstance(error, OSError):
                raise self._error(error) from None
            raise

    def _error(self, error: OSError) -> Error:
        return Error(
            f"cannot write {self._name}: {error.strerror}", "check the path, and the room on its disk", code="io"
        )
