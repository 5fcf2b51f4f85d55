"""Limits: the bounds that more than one module relies on, and why each has its size.

Those that the C core has, too, stand in native/counters.h and native/table.h under the same meaning; a test compares
them.
"""

from __future__ import annotations

from typing import Final

RULES_MAX: Final = 16384  # counters per worker: 10,000 rules and room for those being replaced
OUTPUTS_MAX: Final = 65536  # likewise, with several outputs to a rule
RULE_OUTPUTS_MAX: Final = 1024  # of one rule; its text still fits one frame
INTERFACES_MAX: Final = 64  # in use at once; a worker's receive slots are a few MiB for each
WORKERS_MAX: Final = 64  # one per core; the control plane gets a counter page of each in one message
