"""Programs that people use with multicast, in namespaces of the lab: avahi, python-zeroconf, MiniDLNA, linuxptp, socat.

Owns how each is started so that several of them, and those of the host, do not meet: with a /run of its own, its
configuration there, and a system bus of its own. Starts no relay and knows nothing of one. What runs is the installed
program; only python-zeroconf is a library, whose sockets and thread live in the namespace.

Kernel facts and others relied on:

- `ip netns exec` gives the program a mount namespace, whose mounts nobody else sees. A file system mounted over /run
  goes with the program, however that ends, and nothing is left to be cleaned up. avahi-daemon has paths there that
  cannot be configured away.
- Abstract Unix addresses belong to the network namespace: one name serves for the bus in each.
- A thread is born into the network namespace of the thread that starts it.
- A free-running ptp4l sets no clock. The capability to set one is taken from it all the same: the clock of the host is
  not the lab's.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Final, Self

from zeroconf import IPVersion, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from lab.namespaces import Namespace, end_processes, wait_until

READY_S: Final = 15.0  # to start, or to find a thing: seconds where the machine is loaded
CONFIGURATION: Final = "/run/program.conf"
BUS: Final = "unix:abstract=mcrelay-lab-bus"
# As a shell's $0 and its arguments: the rest is the program, which replaces the shell and so has its pid.
WITH_OWN_RUN: Final = ("sh", "-c", f'mount -t tmpfs tmpfs /run && cat >{CONFIGURATION} && exec "$@"', "sh")
SETS_NO_CLOCK: Final = ("setpriv", "--bounding-set", "-sys_time", "--inh-caps", "-sys_time")


def missing(*commands: str) -> str | None:
    """Why a test of these programs skips, or None if all are there."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [command for command in commands if shutil.which(command, path=path) is None]
    return f"not installed: {', '.join(absent)} (packaging/install-requirements test)" if absent else None


class Program:
    """A program that was started, and what it has said (both of its outputs). The Lab ends it at the latest."""

    def __init__(
        self,
        namespace: Namespace,
        *argv: str,
        configuration: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._text = " ".join(argv)
        self._lines: list[str] = []
        self.process = namespace.popen(
            *WITH_OWN_RUN,
            *argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", **(environment or {})},
        )
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # it failed; its lines say why
            self.process.stdin.write(configuration)
            self.process.stdin.close()
        self._reader = threading.Thread(target=self._read, name=f"says-{self.process.pid}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        # ValueError: the Lab was left meanwhile and has closed the pipe.
        with contextlib.suppress(ValueError):
            for line in self.process.stdout:
                self._lines.append(line.rstrip("\n"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def lines(self) -> list[str]:
        return list(self._lines)

    def said(self, *texts: str) -> list[str]:
        """The lines so far that have all of these texts."""
        return [line for line in self._lines if all(text in line for text in texts)]

    def wait_for(self, *texts: str, after: int = 0, deadline_s: float = READY_S) -> str:
        """The first line, of those from number `after` on, that has all of these texts; TimeoutError with what it said
        instead. A program that ends without it is not waited for."""

        def found() -> str | None:
            ended = self.process.poll() is not None
            if ended:
                self._reader.join(1)
            for line in self.lines[after:]:
                if all(text in line for text in texts):
                    return line
            if ended:
                raise RuntimeError(f"`{self._text}` ended with {self.process.returncode}:\n" + "\n".join(self._lines))
            return None

        try:
            return wait_until(found, deadline_s) or ""
        except TimeoutError:
            said = "\n".join(self._lines[-30:]) or "nothing"
            raise TimeoutError(f"`{self._text}` did not say {texts} within {deadline_s:g} s, but:\n{said}") from None

    def stop(self) -> None:
        end_processes([self.process])
        self._reader.join(1)


# --- multicast DNS ----------------------------------------------------------------------------------------------------


class Avahi:
    """avahi-daemon on eth0 of a namespace with a bus of its own, and the tools that speak to it."""

    def __init__(self, namespace: Namespace, host: str) -> None:
        self._namespace = namespace
        self._environment = {"DBUS_SYSTEM_BUS_ADDRESS": BUS}
        bus = Program(
            namespace, "dbus-daemon", "--session", "--nofork", "--nopidfile", f"--address={BUS}", "--print-address"
        )
        bus.wait_for(BUS)
        self._daemon = Program(
            namespace,
            *("avahi-daemon", "--no-drop-root", "--no-chroot", "--no-rlimits", "--no-proc-title", "-f", CONFIGURATION),
            configuration=(
                f"[server]\nhost-name={host}\nallow-interfaces=eth0\nuse-ipv4=yes\nuse-ipv6=yes\nenable-dbus=yes\n"
                "[publish]\npublish-hinfo=no\npublish-workstation=no\n"
            ),
            environment=self._environment,
        )

    def wait_until_ready(self) -> None:
        """It has made sure that its name is nobody else's, which takes a second."""
        self._daemon.wait_for("Server startup complete")

    def publish(self, name: str, kind: str, port: int) -> Program:
        """A service of this name, taken back when the program is stopped; announced on return."""
        program = Program(self._namespace, "avahi-publish", "-s", name, kind, str(port), environment=self._environment)
        program.wait_for("Established under name")
        return program

    def browse(self, kind: str) -> Program:
        """Says `=;eth0;IPv4;NAME;KIND;DOMAIN;HOST;ADDRESS;PORT;...` of what it finds and resolves."""
        return Program(self._namespace, "stdbuf", "-oL", "avahi-browse", "-rpk", kind, environment=self._environment)


class ZeroconfPeer:
    """python-zeroconf on eth0 of a namespace, speaking one IP version: publishes a service, and looks for others."""

    def __init__(self, namespace: Namespace, version: int, address: str) -> None:
        self._address = address
        interface: str | int = address if version == 4 else namespace.ifindex("eth0")
        self._zeroconf = namespace.call(
            Zeroconf, interfaces=[interface], ip_version=IPVersion.V4Only if version == 4 else IPVersion.V6Only
        )
        self._names: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._found: set[str] = set()
        self._browsers: list[ServiceBrowser] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._zeroconf.close()

    def publish(self, name: str, kind: str, port: int) -> None:
        self._zeroconf.register_service(
            ServiceInfo(
                f"{kind}.local.",
                f"{name}.{kind}.local.",
                addresses=[ip_address(self._address).packed],
                port=port,
                server=f"{name.lower()}.local.",
            )
        )

    def browse(self, kind: str) -> None:
        def changed(name: str, state_change: ServiceStateChange, **_: object) -> None:
            if state_change is ServiceStateChange.Added:
                self._names.put(name)

        self._browsers.append(ServiceBrowser(self._zeroconf, f"{kind}.local.", handlers=[changed]))

    def found(self) -> set[str]:
        """The names of services so far, without their kinds."""
        while not self._names.empty():
            self._found.add(self._names.get().partition("._")[0])
        return self._found

    def resolve(self, name: str, kind: str) -> tuple[set[str], int | None]:
        """Addresses and port of a service, asked for as long as it takes."""
        info = ServiceInfo(f"{kind}.local.", f"{name}.{kind}.local.")
        assert info.request(self._zeroconf, READY_S * 1000), f"{name} did not resolve"
        return set(info.parsed_addresses()), info.port


# --- SSDP -------------------------------------------------------------------------------------------------------------

SSDP: Final = "239.255.255.250:1900"
SEARCH: Final = f'M-SEARCH * HTTP/1.1\r\nHOST: {SSDP}\r\nMAN: "ssdp:discover"\r\nMX: 1\r\nST: upnp:rootdevice\r\n\r\n'


def minidlna(namespace: Namespace, name: str) -> Program:
    """A media server without media, announcing itself once a second."""
    program = Program(
        namespace,
        *("sh", "-c", f"mkdir /run/media && exec minidlnad -d -f {CONFIGURATION} -P /run/pid"),
        configuration=(
            "network_interface=eth0\nport=8200\nmedia_dir=/run/media\ndb_dir=/run/db\nlog_dir=/run\ninotify=no\n"
            f"friendly_name={name}\nuuid=4d696e69-444c-164e-9d41-000000000001\nnotify_interval=1\n"
        ),
    )
    program.wait_for("HTTP listening")
    return program


def search(namespace: Namespace) -> Program:
    """A search for UPnP devices; the answers are what it says. Ends after five seconds without one."""
    return Program(
        namespace,
        *("sh", "-c", f"exec socat -t 5 - UDP4-DATAGRAM:{SSDP},ip-multicast-ttl=4 <{CONFIGURATION}"),
        configuration=SEARCH,
    )


# --- the Precision Time Protocol --------------------------------------------------------------------------------------


def ptp4l(namespace: Namespace, *settings: str) -> Program:
    """A clock on eth0 by UDP over IPv4 and the kernel's time stamps, eight messages a second, that sets no clock. As a
    slave it says `master offset N` once a second: by how many nanoseconds its clock seems to be off."""
    return Program(
        namespace,
        *(*SETS_NO_CLOCK, "ptp4l", "-f", CONFIGURATION, "-i", "eth0"),
        configuration="\n".join(
            (
                "[global]",
                "free_running 1",
                "time_stamping software",
                "network_transport UDPv4",
                "uds_address /run/ptp4l",
                "logAnnounceInterval -3",
                "logSyncInterval -3",
                "logMinDelayReqInterval -3",
                "summary_interval -3",
                "freq_est_interval 0",
                "use_syslog 0",
                "verbose 1",
                *settings,
                "",
            )
        ),
    )
