"""Port links: in rootless mode, the ports of rules, opened on their interfaces and given to the workers.

Where packets come in by ordinary sockets, an interface that is open has one for each port that rules name on it
(net/plain.py). Owns which of them workers have; links.py, whose turns this happens in, has the interfaces. Without that
mode there are none, and nothing here does anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack

from mcrelay.children import Child
from mcrelay.errors import SystemRefusal
from mcrelay.messages import AttachPort, DetachPort
from mcrelay.net.attachments import Attachment, Attachments
from mcrelay.net.plain import Number, first_unprivileged_port, number_of
from mcrelay.rootless import check_rule
from mcrelay.rules import Rule
from mcrelay.turns import in_turns


class PortLinks:
    """`workers`: the data planes to tell; others are told everything when they come up."""

    def __init__(self, attachments: Attachments, workers: Callable[[], Sequence[Child]]) -> None:
        self._attachments = attachments
        self._ports = attachments.ports
        self._workers = workers

    def check(self, rules: Sequence[Rule], own: Iterable[str], present: Iterable[str]) -> None:
        """RuleError if one cannot be, or if they are too many; `own` are the addresses of this host, `present` its
        interfaces."""
        if not self._ports:
            return
        first_port, addresses = first_unprivileged_port(), frozenset(own)
        for rule in rules:
            check_rule(rule, first_port, addresses)
        self._ports.check(
            (name, number_of(rule)) for rule in rules for name in self._attachments.ingress_names(rule, present)
        )

    async def open(self, rules: Iterable[Rule], present: Iterable[str], undo: AsyncExitStack) -> None:
        """Have the ports open that these rules need, on what interfaces are open. SystemRefusal if that cannot be."""
        if not self._ports:
            return
        undo.push_async_callback(self.close_unused)
        async for rule in in_turns(rules):
            for name in self._attachments.ingress_names(rule, present):
                if name in self._attachments:
                    await self._open(self._attachments[name], number_of(rule))

    async def settle(self, attachment: Attachment) -> None:
        """Have those open that active rules need there, as many as can be; then as open()."""
        refusal: SystemRefusal | None = None
        for number in self._ports.wanted(attachment.name) if self._ports else ():
            try:
                await self._open(attachment, number)
            except SystemRefusal as error:
                refusal = error
        if refusal:
            raise refusal

    async def _open(self, attachment: Attachment, number: Number) -> None:
        assert self._ports
        opened = attachment.opened.get("ingress")
        if opened is None or self._ports.is_open(attachment.name, number):
            return
        self._ports.open(opened, number)
        for child in self._workers():
            await self._attach(child, attachment, number)

    async def attach_all(self, child: Child, attachment: Attachment) -> None:
        """Give a worker all that is open there."""
        for number in self._ports.sockets(attachment.name) if self._ports else ():
            await self._attach(child, attachment, number)

    async def _attach(self, child: Child, attachment: Attachment, number: Number) -> None:
        assert self._ports
        ticket = child.ticket()
        sock = self._ports.sockets(attachment.name)[number]
        message = AttachPort(ticket=ticket, slot=attachment.slot, port=number)
        await child.command(ticket, (message, [sock.fileno()]))

    async def close_unused(self) -> None:
        """Close what no active rule needs."""
        if not self._ports:
            return
        for attachment in self._attachments:
            for number in self._ports.unused(attachment.name):
                for child in self._workers():
                    await child.take_from(functools.partial(DetachPort, slot=attachment.slot, port=number))
                self._ports.close(attachment.name, number)
