"""Frames on an interface of a namespace: watching them, sending arbitrary ones.

A `Capture` reads an AF_PACKET socket in a background thread of this process; an `Injector` writes to one,
and below UDP and IP nothing checks what it is given. `lab.frames` takes frames apart and builds them.

Kernel facts relied on:

- An AF_PACKET socket opened for a protocol collects from *all* interfaces until it is bound. It is opened
  for none and bound to interface and protocol in one step.
- It sees both directions. PACKET_OUTGOING marks what the namespace itself sends; the peer of a veth sees
  the same frame as incoming.
- It sees frames before checksums are filled in and before long runs are segmented, when the device (veth,
  always) promises to do that. PACKET_AUXDATA says so for checksums. A lab that wants to see the wire builds
  its links with `offloads=False`.
- A VLAN tag is taken out of the frame and handed over in PACKET_AUXDATA.
- On the way in, it sees what the IP layer later drops: a capture shows an unroutable source although no UDP
  socket does.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from lab.frames import IgmpMessage, UdpDatagram, decode_igmp, decode_udp
from lab.namespaces import Namespace

# <linux/if_ether.h>, <linux/if_packet.h>
ETH_P_ALL = 0x0003
SOL_PACKET = 263
PACKET_AUXDATA = 8
PACKET_STATISTICS = 6
PACKET_OUTGOING = 4
TP_STATUS_CSUMNOTREADY = 1 << 3
TP_STATUS_VLAN_VALID = 1 << 4
AUXDATA = struct.Struct("@IIIHHHH")  # tpacket_auxdata: status, len, snaplen, mac, net, tci, tpid

FRAME_SIZE_MAX = 1 << 17  # a run that the device was to segment is one frame, 64 KiB and its headers
FRAMES_MAX = 10_000
RECEIVE_BUFFER_SIZE = 16 << 20
SO_RCVBUFFORCE = 33
SHOWN_MAX = 20  # frames listed in the message of a missed deadline


@dataclass(frozen=True)
class Frame:
    """One captured frame."""

    time_ns: int  # CLOCK_MONOTONIC, when it was read
    outgoing: bool  # sent by the namespace, as against received by it
    data: bytes  # from the Ethernet header on, without a VLAN tag
    vlan: int | None  # the tag's TCI
    checksum_pending: bool  # the transport checksum was left to the device and is not in `data` yet

    @property
    def udp(self) -> UdpDatagram | None:
        """None for anything else. While the checksum is pending, its `checksum_valid` is meaningless."""
        return decode_udp(self.data)

    @property
    def igmp(self) -> IgmpMessage | None:
        return decode_igmp(self.data)

    def __str__(self) -> str:
        direction = "out" if self.outgoing else "in"
        what = self.udp or self.igmp or self.data[:34].hex(" ")
        return f"{direction} {len(self.data)} bytes: {what}"


class Capture:
    """`with Capture(namespace, "eth0") as capture:` collects from the moment the block is entered.

    Keeps the first `frames_max` frames and counts the rest in `overflow`; `dropped` is what the kernel could
    not hand over. `only` chooses what is kept.
    """

    def __init__(
        self,
        namespace: Namespace,
        interface: str,
        *,
        frames_max: int = FRAMES_MAX,
        only: Callable[[Frame], bool] | None = None,
    ) -> None:
        self.overflow = 0
        self._where = f"{namespace.label}/{interface}"
        self._namespace = namespace
        self._interface = interface
        self._frames_max = frames_max
        self._only = only
        self._frames: list[Frame] = []
        self._dropped = 0
        self._arrived = threading.Condition()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._socket = _packet_socket(self._namespace, self._interface, ETH_P_ALL)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._collect, name=f"capture-{self._where}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop collecting. What arrived before is still read first, and all of it stays available."""
        assert self._thread is not None
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)
        self._socket.close()

    @property
    def frames(self) -> list[Frame]:
        """What was collected so far."""
        with self._arrived:
            if self._error is not None:
                raise self._error
            return list(self._frames)

    @property
    def dropped(self) -> int:
        """Frames the kernel dropped as the socket was full; known after the block."""
        return self._dropped

    def matching(self, predicate: Callable[[Frame], object]) -> list[Frame]:
        return [frame for frame in self.frames if predicate(frame)]

    def udp(self, *, outgoing: bool | None = None) -> list[UdpDatagram]:
        """The UDP datagrams so far, of one direction if given."""
        wanted = (frame for frame in self.frames if outgoing is None or frame.outgoing == outgoing)
        return [datagram for frame in wanted if (datagram := frame.udp) is not None]

    def wait_for(
        self, predicate: Callable[[Frame], object], deadline_s: float = 15.0, message: str = "no such frame"
    ) -> Frame:
        """The first frame, here already or yet to come, that `predicate` is true of; else TimeoutError."""
        deadline = time.monotonic() + deadline_s
        looked_at = 0
        with self._arrived:
            while True:
                if self._error is not None:
                    raise self._error
                for frame in self._frames[looked_at:]:
                    if predicate(frame):
                        return frame
                looked_at = len(self._frames)
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    break
                self._arrived.wait(remaining_s)
        seen = "".join(f"\n  {frame}" for frame in self._frames[-SHOWN_MAX:]) or " nothing"
        raise TimeoutError(f"{message} on {self._where} within {deadline_s:g} s; captured:{seen}")

    def _collect(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        try:
            stopping = False
            while not stopping:
                stopping = any(descriptor == self._stop for descriptor, _ in poll.poll())
                self._read_waiting()
            self._dropped = struct.unpack("@II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))[1]
        except BaseException as error:  # shown to whoever asks for frames
            with self._arrived:
                self._error = error
                self._arrived.notify_all()

    def _read_waiting(self) -> None:
        for _ in range(self._frames_max):  # bounded, so that a flood cannot keep the thread from stopping
            try:
                data, control, _flags, address = self._socket.recvmsg(
                    FRAME_SIZE_MAX, socket.CMSG_SPACE(AUXDATA.size), socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                return
            status = tci = 0
            for level, kind, value in control:
                if (level, kind) == (SOL_PACKET, PACKET_AUXDATA):
                    status, _, _, _, _, tci, _ = AUXDATA.unpack(value[: AUXDATA.size])
            frame = Frame(
                time_ns=time.monotonic_ns(),
                outgoing=address[2] == PACKET_OUTGOING,
                data=data,
                vlan=tci if status & TP_STATUS_VLAN_VALID else None,
                checksum_pending=bool(status & TP_STATUS_CSUMNOTREADY),
            )
            if self._only is not None and not self._only(frame):
                continue
            with self._arrived:
                if len(self._frames) < self._frames_max:
                    self._frames.append(frame)
                    self._arrived.notify_all()
                else:
                    self.overflow += 1


class Injector:
    """Sends frames as they are given, from the Ethernet header on, out of an interface of a namespace."""

    def __init__(self, namespace: Namespace, interface: str) -> None:
        self._socket = _packet_socket(namespace, interface, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            self._socket.send(frame)

    def close(self) -> None:
        self._socket.close()


def inject(namespace: Namespace, interface: str, *frames: bytes) -> None:
    """Send a few frames; for many, keep an Injector."""
    with Injector(namespace, interface) as injector:
        injector.send(*frames)


def _packet_socket(namespace: Namespace, interface: str, protocol: int) -> socket.socket:
    opened = namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        if protocol:  # otherwise it receives nothing
            opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_SIZE)
            opened.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        opened.bind((interface, protocol))
    except BaseException:
        opened.close()
        raise
    return opened
