"""Hostile bytes: true ones, changed the way attackers and broken disks change them, and bombs."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import zstandard
from hypothesis import strategies as st

NUMBERS = (b"0", b"-1", b"1.5", b"1e999", b"9007199254740992", b"1" * 400, b"18446744073709551616", b"null", b"NaN")


@st.composite
def hostile(draw: st.DrawFn, corpus: Sequence[bytes]) -> bytes:
    """Bytes that resemble a corpus."""
    data = bytearray(draw(st.sampled_from(list(corpus))))
    kind = draw(st.sampled_from(["change", "change", "change", "json", "noise", "bomb"]))
    if kind == "noise":
        start = bytes(data[: draw(st.integers(0, min(len(data), 64)))])
        return start + draw(st.binary(max_size=300))
    if kind == "bomb":
        return draw(st.sampled_from(bombs(bytes(data))))
    if kind == "json":
        changed = _json(draw, bytes(data))
        if changed is not None:
            return changed
    for _ in range(draw(st.integers(1, 4))):
        _change(draw, data)
    return bytes(data)


def _change(draw: st.DrawFn, data: bytearray) -> None:
    at = draw(st.integers(0, max(0, len(data) - 1)))
    # Frames and headers are where decoders decide; aim there half the time.
    if draw(st.booleans()):
        at = min(at, draw(st.integers(0, 800)))
    size = draw(st.sampled_from([1, 1, 1, 2, 4, 8, 64]))
    match draw(st.sampled_from(["flip", "set", "cut", "drop", "insert", "repeat", "number", "length"])):
        case "flip" if data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        case "set" if data:
            data[at : at + size] = draw(st.sampled_from([b"\x00", b"\xff", b'"', b"}", b"[", b"\x7f"])) * size
        case "cut":
            del data[at:]
        case "drop":
            del data[at : at + size]
        case "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=size))
        case "repeat":
            data[at:at] = data[at : at + 16 * size]
        case "number":
            digits = [index for index, byte in enumerate(data[:2000]) if 48 <= byte < 58]
            if digits:
                where = draw(st.sampled_from(digits))
                data[where : where + 1] = draw(st.sampled_from(NUMBERS))
        case "length" if len(data) > 8:
            value = draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, len(data)]))
            data[4:8] = struct.pack(">I", value)
        case _:
            data += b"\x00"


def _json(draw: st.DrawFn, data: bytes) -> bytes | None:
    """The same object with one field replaced, removed or added, in canonical form."""
    try:
        content = json.loads(data)
    except ValueError:
        return None
    if not isinstance(content, dict) or not content:
        return None
    values: st.SearchStrategy[Any] = st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**70), 2**70)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=80)
        | st.sampled_from(["0" * 64, "ash", "../../etc", "genesis", "aggregate", "void", "amendment", "checkpoint"]),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=8,
    )
    name = draw(st.sampled_from(sorted(content)))
    match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
        case "replace":
            content[name] = draw(values)
        case "remove":
            del content[name]
        case _:
            content[draw(st.text(max_size=8))] = draw(values)
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


@cache
def sealed_zeros() -> bytes:
    """As if of SEAL: a few kilobytes that are 256 MiB; made once, since that takes a while."""
    zeros = zstandard.ZstdCompressor(level=19).compress(bytes(2**28))
    return struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, 2, 0, 16 + len(zeros)) + zeros


def bombs(data: bytes) -> list[bytes]:
    """Small bytes that would like to become large, deep or slow."""
    deep = b"[" * 2000 + b"]" * 2000
    return [
        b"",
        sealed_zeros(),
        data + bytes(2**20),
        data[:4] + struct.pack(">I", len(deep)) + deep + bytes(64),
        deep,
        b'{"a":' * 1500 + b"1" + b"}" * 1500,
        data[:4] + struct.pack(">I", 2**32 - 1) + bytes(2**16),
        data[:4] + struct.pack(">I", 1900) + b'{"size":' + b"9" * 1890 + b"}" + bytes(100),
        struct.pack("<Q", 2**62) + data[8:],
        struct.pack("<Q", len(data)) + b"{" + data[9:],
        b"a = " + b"[" * 3000,
        b"a." * 3000 + b"b = 1",
        b"age-encryption.org/v1\n-> scrypt AAAAAAAAAAAAAAAAAAAAAA 30\n" + b"A" * 43 + b"\n--- " + b"A" * 43 + b"\n",
        b"age-encryption.org/v1\n" + b"-> X25519 " + b"A" * 43 + b"\n" + (b"A" * 64 + b"\n") * 4000,
        b"\xff" * 70_000,
    ]
