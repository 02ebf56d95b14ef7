"""Makes ``pad_words.json``: the signed words of a round with pads, and what is refused, in Wycheproof's form.

A group is a kind of word and its tests: ``tcId, comment, flags, frame, result`` (valid or invalid). Private keys here
are for nothing but these vectors; Ed25519 makes the same signature each time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cbor2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secure_fed.protocol import round_frames as words
from secure_fed.protocol import share_frames as pad_words
from secure_fed.protocol.envelope import MAGIC as ENVELOPE_MAGIC
from secure_fed.protocol.envelope import Hidden, RoundPosition, seal_envelope
from secure_fed.protocol.ledger_heads import NO_LEDGER
from secure_fed.protocol.packing import Contribution, Sealed
from secure_fed.protocol.pads import public_of
from secure_fed.protocol.round_frames import SignedWord
from secure_fed.protocol.signing import public_hex, split_frame
from tests.make_pad_vectors import NAMES, drawn

Test = dict[str, Any]

STUDY, COHORT, ARRIVED = "4" * 64, "5" * 64, "6" * 64
DUE, ATTEMPT = RoundPosition("1" * 64, "2" * 64, "3" * 64, 0, 7), 2
OBSERVER = "fir"


def signing(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(drawn(f"sign {name}"))


def study(collusion: int = 1) -> Any:
    """As much of a study as words are checked against."""
    facts = SimpleNamespace(
        id=STUDY, mode="he", colluders=collusion, pads=collusion > 0, max_sites=8, coordinator=public_hex(signing("-"))
    )
    return SimpleNamespace(study=facts, layout=lambda _: SimpleNamespace(lanes=SimpleNamespace(values=40)))


def members() -> Mapping[str, Any]:
    return {
        name: SimpleNamespace(
            name=name,
            role="observer" if name == OBSERVER else "train",
            keys=SimpleNamespace(signing=public_hex(signing(name))),
        )
        for name in (*NAMES, OBSERVER)
    }


def _envelope(name: str, cohort: str = COHORT) -> SignedWord:
    sealed = Sealed(Contribution(name, drawn(f"seed {name}").hex()), bytes(64))
    hidden = Hidden(drawn(f"mask {name}").hex(), drawn(f"root {name}").hex())
    data = seal_envelope(study(), DUE, sealed, NO_LEDGER, signing(name), attempt=ATTEMPT, cohort=cohort, hidden=hidden)
    frame = split_frame(ENVELOPE_MAGIC, data, 10**6, ValueError)  # type: ignore[type-var]
    return SignedWord.of(frame.header, frame.signature)


ENVELOPES = tuple(_envelope(name) for name in NAMES)
CHECK = pad_words.check_digest(study(), DUE, ATTEMPT, COHORT, ENVELOPES)
SECOND = RoundPosition(DUE.run, "9" * 64, DUE.key, 0, 7)


def _ready(name: str = "ash", due: RoundPosition = DUE, attempt: int = ATTEMPT, by: str = "", fresh: Any = 0) -> bytes:
    key = public_of(drawn(f"key {name}")) if fresh == 0 else fresh
    return words.sign_ready(study(), due, attempt, name, False, signing(by or name), key)


def _reveal(name: str = "ash", arrived: str = ARRIVED, by: str = "", mask: Any = 0) -> bytes:
    seed = drawn(f"seed {name}").hex() if mask == 0 else mask
    return words.sign_reveal(study(), arrived, name, (5, 2**50), signing(by or name), seed)


def _check(attempt: int = ATTEMPT, by: str = "-", of: tuple[SignedWord, ...] = ENVELOPES, at: Any = DUE) -> bytes:
    return pad_words.sign_check(study(), at, attempt, COHORT, of, signing(by))


def _checked(name: str = "ash", check: str = CHECK, by: str = "", over: tuple[str, ...] = ()) -> bytes:
    return pad_words.sign_checked(study(), check, name, over, signing(by or name))


def _gone(name: str = "ash", at: RoundPosition = DUE, by: str = "-") -> bytes:
    return pad_words.sign_gone(study(), at, ATTEMPT, ARRIVED, name, signing(by))


def _witness(name: str = "birch", arrived: str = ARRIVED, by: str = "", gone: tuple[str, ...] = ("ash",)) -> bytes:
    checks = dict.fromkeys(gone, (5, 2**50))
    return pad_words.sign_witness(study(), arrived, name, NAMES, checks, signing(by or name))


Makes = tuple[bytes, bytes, Mapping[str, bytes], str]
"""Magic, a valid frame, further valid ones by comment, and who signs it."""

MAKERS: Mapping[str, tuple[Makes, Mapping[str, bytes]]] = {
    "Ready": (
        (words.READY_MAGIC, _ready(), {"of another site": _ready("birch")}, "ash"),
        {
            "at another head": _ready(due=SECOND),
            "of another attempt": _ready(attempt=1),
            "of a site that is not in the study": _ready("gorse"),
            "of an observer": _ready(OBSERVER),
            "signed by another site": _ready(by="birch"),
            "without a fresh key": _ready(fresh=None),
            "a fresh key of small order": _ready(fresh="00" * 32),
            "a fresh key that is another in disguise": _ready(fresh=(b"\xff" * 31 + b"\x7f").hex()),
        },
    ),
    "Reveal": (
        (words.REVEAL_MAGIC, _reveal(), {"of another site": _reveal("cedar")}, "ash"),
        {
            "for another ARRIVED": _reveal(arrived=STUDY),
            "signed by another site": _reveal(by="birch"),
            "without the seed of its mask": _reveal(mask=None),
        },
    ),
    "Check": (
        (pad_words.CHECK_MAGIC, _check(), {}, "-"),
        {
            "at another head": _check(at=SECOND),
            "signed by a site": _check(by="ash"),
            "of another attempt than its envelopes": _check(attempt=1),
            "of no envelopes": _check(of=()),
            "with an envelope of another cohort": _check(of=(*ENVELOPES[:-1], _envelope(NAMES[-1], STUDY))),
        },
    ),
    "Checked": (
        (pad_words.CHECKED_MAGIC, _checked(), {"with a complaint": _checked(over=("birch",))}, "ash"),
        {
            "over another CHECK": _checked(check=STUDY),
            "signed by another site": _checked(by="birch"),
            "of a site that is not in the study": _checked("gorse"),
        },
    ),
    "Gone": (
        (pad_words.GONE_MAGIC, _gone(), {"of another site": _gone("cedar")}, "-"),
        {"at another head": _gone(at=SECOND), "signed by a site": _gone(by="birch")},
    ),
    "Witness": (
        (
            pad_words.WITNESS_MAGIC,
            _witness(),
            {"of another site": _witness("cedar"), "for two": _witness(gone=NAMES[2:4])},
            "birch",
        ),
        {"for another ARRIVED": _witness(arrived=STUDY), "signed by the one who is gone": _witness(by="ash")},
    ),
}

CHECKS: Mapping[str, Callable[[bytes], object]] = {
    "Ready": lambda data: words.check_ready(
        words.split_word(words.READY_MAGIC, data), study(), members(), DUE, ATTEMPT
    ),
    "Reveal": lambda data: words.check_reveal(words.split_word(words.REVEAL_MAGIC, data), study(), members(), ARRIVED),
    "Check": lambda data: pad_words.check_check(data, study(), members(), DUE),
    "Checked": lambda data: pad_words.check_checked(
        words.split_word(pad_words.CHECKED_MAGIC, data), study(), members(), CHECK
    ),
    "Gone": lambda data: pad_words.check_gone(data, study(), DUE),
    "Witness": lambda data: pad_words.check_witness(
        words.split_word(pad_words.WITNESS_MAGIC, data), study(), members(), ARRIVED
    ),
}
"""What refuses a word of each kind."""


def _bent(magic: bytes, data: bytes, key: Ed25519PrivateKey) -> dict[str, tuple[str, bytes]]:
    """What no word may be, by comment: a flag and the bytes."""
    length = int.from_bytes(data[4:8], "big")
    header = data[8 : 8 + length]
    values = cbor2.loads(header)

    def signed(text: bytes) -> bytes:
        return magic + len(text).to_bytes(4, "big") + text + key.sign(magic + text)

    flipped = {f"a bit flipped in byte {at}": at for at in (0, 7, 8, 8 + length // 2, 7 + length, len(data) - 1)}
    return {
        comment: ("BitFlip", data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]) for comment, at in flipped.items()
    } | {
        "nothing": ("Truncated", b""),
        "inside the header": ("Truncated", data[:40]),
        "a byte short": ("Truncated", data[:-1]),
        "a byte behind it": ("Length", data + b"\0"),
        "a length of 4 GiB": ("Length", data[:4] + b"\xff" * 4 + data[8:]),
        "fields in another order": ("Header", signed(cbor2.dumps(values[::-1], canonical=True))),
        "a field less": ("Header", signed(cbor2.dumps(values[:-1], canonical=True))),
        "a field more": ("Header", signed(cbor2.dumps([*values, 1], canonical=True))),
        "an array without length": ("Header", signed(b"\x9f" + header[1:] + b"\xff")),
        "a number in a longer form": (
            "Header",
            signed(bytes([0x98, len(values)]) + header[1:]),
        ),
        "no CBOR": ("Header", signed(b"\xff" * 64)),
        "nested beyond measure": ("Header", signed(b"\x81" * 200 + b"\x00")),
    }


def write(folder: Path) -> None:
    """Write ``pad_words.json`` into a version's folder."""
    groups, number = [], 0
    for kind, ((magic, data, more, signer), wrong) in MAKERS.items():
        tests: list[Test] = []
        valid = {"as it is sent": data} | dict(more)
        found = [(comment, frame, "valid", "Honest") for comment, frame in valid.items()]
        found += [(comment, frame, "invalid", "Wrong") for comment, frame in wrong.items()]
        found += [
            (comment, frame, "invalid", flag) for comment, (flag, frame) in _bent(magic, data, signing(signer)).items()
        ]
        for comment, frame, result, flag in found:
            number += 1
            tests.append({"tcId": number, "comment": comment, "flags": [flag], "frame": frame.hex(), "result": result})
        groups.append({"type": kind, "tests": tests})
    document = {
        "algorithm": "secfacmic words with pads 1",
        "numberOfTests": number,
        "study": STUDY,
        "due": asdict(DUE),
        "attempt": ATTEMPT,
        "check": CHECK,
        "arrived": ARRIVED,
        "coordinator": public_hex(signing("-")),
        "members": {name: member.keys.signing for name, member in members().items()},
        "testGroups": groups,
    }
    (folder / "pad_words.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    write(Path(__file__).parent / "vectors" / "v2")
