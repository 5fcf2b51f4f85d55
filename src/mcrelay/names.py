"""Names in JSON objects: that none is there twice.

RFC 8259 leaves open what an object means that has a name twice, and msgspec takes the last: a request that says two
things could be one thing to whoever has looked at it on its way, and another to us.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from mcrelay.frames import Malformed


def check_names(body: bytes) -> None:
    """Malformed if an object in this JSON document has a name twice. The document is read a second time for that, some
    15 ms for 8,000 rules; it must be of a shape that somebody has checked, of bounded depth."""
    json.loads(body, object_pairs_hook=_check_object)


def _check_object(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) < len(pairs):
        ((name, count),) = Counter(name for name, _value in pairs).most_common(1)
        raise Malformed("decode", f"an object has the name {name!r} {count} times")
