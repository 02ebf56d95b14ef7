"""The one form in which content that is hashed or signed is written down."""

from __future__ import annotations

import json
from typing import Any


def canonical_json(content: Any) -> bytes:
    """The one JSON form that we hash and sign: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
