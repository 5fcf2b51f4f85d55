"""Memberships: the groups, and sources of groups, that this host has joined for its rules.

Owns the sockets that hold them, as many as it takes; one goes when its last membership does. They receive nothing:
that the host is a member is all that is wanted, and packet sockets see what comes of it. No interface is ever made to
take all multicast. Knows nothing of rules or workers.

A membership of any source and one of some sources of a group cannot be in one socket, which has one filter for each
group. So sockets are for the one kind or the other, and for one version of IP. Limits are found by running into them:
no sysctl is read before the kernel has refused.

Kernel facts (ip(7), ipv6(7), RFC 3678):
- igmp_max_memberships (20) limits the groups of a socket, and igmp_max_msf (10) and mld_max_msf (64) the sources of one
  of them. What a socket's groups and sources take is counted against optmem_max. IPv4 answers ENOBUFS to all of that,
  IPv6 ENOBUFS or ENOMEM.
- To join and to leave, the kernel goes through the socket's groups, and through the sources of one of them.
- A source's first membership joins its group, and the last to leave leaves it. That fails once the interface has gone;
  to leave the group does not.
- Membership of a socket outlives the link's going down, but not the interface. What is left in the socket then counts
  on against its limits until it is left.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from mcrelay.errors import SystemRefusal
from mcrelay.net.filters import receive_nothing, remedy
from mcrelay.net.interfaces import Interface
from mcrelay.rules import Address

# linux/in.h: the same for IPv4 and IPv6.
MCAST_JOIN_GROUP: Final = 42
MCAST_LEAVE_GROUP: Final = 45
MCAST_JOIN_SOURCE_GROUP: Final = 46
MCAST_LEAVE_SOURCE_GROUP: Final = 47
GROUP_REQUEST: Final = struct.Struct("@I0q128s0q")  # struct group_req: a sockaddr_storage is aligned
SOURCE_REQUEST: Final = struct.Struct("@I0q128s0q128s0q")  # struct group_source_req

FULL: Final = (errno.ENOBUFS, errno.ENOMEM)
GONE: Final = (errno.EADDRNOTAVAIL, errno.ENODEV, errno.EINVAL)  # the interface, and with it the membership
SETTINGS: Final = Path("/proc/sys")

Member = tuple[int, Address, Address | None]  # interface index, group, source
Group = tuple[int, Address]


class Kind(NamedTuple):
    """What a socket is for."""

    version: int
    has_source: bool


@dataclass(eq=False)
class Holder:
    """A socket, and what it is a member of: the sources of each group, of which None is any."""

    sock: socket.socket
    kind: Kind
    groups: dict[Group, set[Address | None]] = field(default_factory=dict)


@dataclass
class Room:
    """Which sockets of one kind may be able to hold more; the last one is asked first."""

    for_groups: dict[Holder, None] = field(default_factory=dict)
    for_sources: dict[Group, dict[Holder, None]] = field(default_factory=dict)  # of groups that the sockets have


class Memberships:
    def __init__(self) -> None:
        self._holder: dict[Member, Holder] = {}
        self._holders: dict[Holder, None] = {}
        self._rooms: dict[Kind, Room] = defaultdict(Room)

    def join(self, interface: Interface, group: Address, source: Address | None = None) -> None:
        """Be a member of a group, or of what a source sends to it. Idempotent. SystemRefusal if the kernel does not."""
        member = (interface.index, group, source)
        if member in self._holder:
            return
        try:
            holder = self._join_with_others(member) or self._join_alone(member)
        except OSError as error:
            what = f"{source}@{group}" if source else str(group)
            reason = "the kernel allows no more" if error.errno in FULL else error.strerror
            raise SystemRefusal(
                f"cannot join {what} on {interface.name}: {reason}", _hint(error, interface, _kind(member))
            ) from None
        self._note(holder, member)

    def _join_with_others(self, member: Member) -> Holder | None:
        """The socket that has taken it, of those that there are."""
        group = member[:2]
        room = self._rooms[_kind(member)]
        for holder in list(reversed(room.for_sources.get(group, {}))):
            if _takes(holder.sock, member):
                return holder
            del room.for_sources[group][holder]
        room.for_sources.pop(group, None)
        for holder in list(reversed(room.for_groups)):
            if group in holder.groups:
                continue  # it has as many of this one's sources as it may
            if _takes(holder.sock, member):
                return holder
            del room.for_groups[holder]
            with contextlib.suppress(OSError):  # the group may have been joined, and its source not
                _request(holder.sock, MCAST_LEAVE_GROUP, (*group, None))
        return None

    def _join_alone(self, member: Member) -> Holder:
        """In a socket of its own; OSError if even that does not take it."""
        kind = _kind(member)
        sock = socket.socket(_family(kind.version), socket.SOCK_DGRAM)
        try:
            receive_nothing(sock)
            _request(sock, MCAST_JOIN_SOURCE_GROUP if kind.has_source else MCAST_JOIN_GROUP, member)
        except BaseException:
            sock.close()
            raise
        return self._hold(sock, kind)

    def _hold(self, sock: socket.socket, kind: Kind) -> Holder:
        holder = Holder(sock, kind)
        self._holders[holder] = None
        self._rooms[kind].for_groups[holder] = None
        return holder

    def _note(self, holder: Holder, member: Member) -> None:
        index, group, source = member
        self._holder[member] = holder
        holder.groups.setdefault((index, group), set()).add(source)
        if holder.kind.has_source:
            self._rooms[holder.kind].for_sources.setdefault((index, group), {})[holder] = None

    def leave(self, index: int, group: Address, source: Address | None = None) -> None:
        """Leave, if joined; that the interface is gone, and the membership with it, is as good."""
        member = (index, group, source)
        holder = self._holder.pop(member, None)
        if holder is None:
            return
        sources = holder.groups[index, group]
        sources.discard(source)
        _leave(holder.sock, member, is_last=not sources)
        room = self._rooms[holder.kind]
        if sources:
            room.for_sources.setdefault((index, group), {})[holder] = None
            return
        del holder.groups[index, group]
        with_group = room.for_sources.get((index, group), {})
        with_group.pop(holder, None)
        if not with_group:
            room.for_sources.pop((index, group), None)
        if holder.groups:
            room.for_groups[holder] = None
            return
        room.for_groups.pop(holder, None)
        del self._holders[holder]
        holder.sock.close()

    def holders(self) -> Iterator[tuple[socket.socket, list[Member]]]:
        """Each socket, and what it is a member of."""
        for holder in self._holders:
            yield (
                holder.sock,
                [(index, group, source) for (index, group), sources in holder.groups.items() for source in sources],
            )

    def adopt(self, sock: socket.socket, members: list[Member]) -> None:
        """A socket that is a member of these, one at least, as holders() had them."""
        holder = self._hold(sock, _kind(members[0]))
        for member in members:
            self._note(holder, member)

    def close(self) -> None:
        for holder in self._holders:
            holder.sock.close()
        self._holder.clear()
        self._holders.clear()
        self._rooms.clear()


def _kind(member: Member) -> Kind:
    _index, group, source = member
    return Kind(group.version, source is not None)


def _takes(sock: socket.socket, member: Member) -> bool:
    """Join; False if the socket holds all that it may."""
    has_source = _kind(member).has_source
    try:
        _request(sock, MCAST_JOIN_SOURCE_GROUP if has_source else MCAST_JOIN_GROUP, member)
    except OSError as error:
        if error.errno not in FULL:
            raise
        return False
    return True


def _leave(sock: socket.socket, member: Member, *, is_last: bool) -> None:
    """`is_last`: nothing of the group is to be left in the socket."""
    if member[2] is not None:
        try:
            _request(sock, MCAST_LEAVE_SOURCE_GROUP, member)
        except OSError as error:
            if error.errno not in GONE:
                raise
        else:
            return
    if is_last:
        try:
            _request(sock, MCAST_LEAVE_GROUP, (*member[:2], None))
        except OSError as error:
            if error.errno not in GONE:
                raise


def _request(sock: socket.socket, option: int, member: Member) -> None:
    index, group, source = member
    level = socket.IPPROTO_IP if group.version == 4 else socket.IPPROTO_IPV6
    if source is None:
        sock.setsockopt(level, option, GROUP_REQUEST.pack(index, _address(group)))
    else:
        sock.setsockopt(level, option, SOURCE_REQUEST.pack(index, _address(group), _address(source)))


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def _address(address: Address) -> bytes:
    """struct sockaddr_in or sockaddr_in6; what is behind it is 0."""
    if address.version == 4:
        return struct.pack("=HH4s", socket.AF_INET, 0, address.packed)
    return struct.pack("=HHI16sI", socket.AF_INET6, 0, 0, address.packed, 0)


def _hint(error: OSError, interface: Interface, kind: Kind) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        # There is no file left to read a setting from.
        return remedy(error, interface) + "".join(f", or {setting} (sysctl)" for setting in _settings(kind))
    if error.errno in FULL:
        # A socket of its own did not take it, so one that allows some is not at fault.
        none = [setting for setting in _settings(kind) if _setting(setting) == 0]
        if none:
            return f"raise it: sysctl {none[0]}=20 (now 0)"
        return f"raise net.core.optmem_max (now {_setting('net.core.optmem_max') or 'unknown'}) with sysctl"
    if error.errno == errno.EINVAL and kind.version == 6:
        return f"IPv6 is off on {interface.name}, as with an MTU below 1280"
    return remedy(error, interface)


def _settings(kind: Kind) -> list[str]:
    """What limits how much a socket of this kind holds, beside its memory."""
    groups = ["net.ipv4.igmp_max_memberships"] if kind.version == 4 else []
    sources = ["net.ipv4.igmp_max_msf" if kind.version == 4 else "net.ipv6.mld_max_msf"] if kind.has_source else []
    return groups + sources


def _setting(name: str) -> int | None:
    """None where this namespace does not show it."""
    try:
        return int((SETTINGS / name.replace(".", "/")).read_text())
    except (OSError, ValueError):
        return None
