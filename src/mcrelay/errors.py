"""Errors that a user sees, and the exit code of each.

An error has a message (what is wrong, with the offending text), a hint (what would be right) and a code. The code
travels to the client as a word and becomes an exit code of sysexits.h there.
"""

from __future__ import annotations

from typing import Final

EXIT_CODES: Final = {
    "usage": 64,  # EX_USAGE: the command line is wrong
    "bad_rule": 65,  # EX_DATAERR: a rule is wrong, or there is no such rule
    "unavailable": 69,  # EX_UNAVAILABLE: no daemon, or it went away
    "internal": 70,  # EX_SOFTWARE: our mistake
    "system": 71,  # EX_OSERR: the kernel cannot or will not
    "cannot_create": 73,  # EX_CANTCREAT: the socket is in use or cannot be made
    "io": 74,  # EX_IOERR: the output could not be written
    "busy": 75,  # EX_TEMPFAIL: try again
    "conflict": 75,  # EX_TEMPFAIL: somebody else was faster; look, and try again
    "protocol": 76,  # EX_PROTOCOL: the other side is not mcrelay, or another version
    "not_permitted": 77,  # EX_NOPERM
    "config": 78,  # EX_CONFIG: a configuration file is wrong
}


class Error(Exception):
    """Something a user can understand and act on."""

    code = "internal"

    def __init__(self, message: str, hint: str = "", *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    @property
    def exit_code(self) -> int:
        return EXIT_CODES.get(self.code, EXIT_CODES["internal"])


class UsageError(Error):
    code = "usage"


class RuleError(Error):
    """A rule that cannot be, or that does not exist."""

    code = "bad_rule"


class Unavailable(Error):
    code = "unavailable"


class SystemRefusal(Error):
    """The kernel refused, or lacks something."""

    code = "system"


class Busy(Error):
    code = "busy"


class ProtocolError(Error):
    """The other side is not mcrelay, or another version."""

    code = "protocol"


class Conflict(Error):
    """The rules are no longer those that a change was meant for."""

    code = "conflict"


class NotPermitted(Error):
    code = "not_permitted"


class BadConfig(Error):
    """A configuration file that is wrong, or cannot be had."""

    code = "config"


def error_of(code: str, message: str, hint: str) -> Error:
    """The error of a code that came from elsewhere, perhaps from a later version."""
    kind = next((kind for kind in Error.__subclasses__() if kind.code == code), Error)
    return kind(message, hint, code=code)
