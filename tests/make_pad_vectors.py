"""Makes ``pads.json``: what an implementation of the pads must compute and refuse, in Wycheproof's form.

A group is a ``type`` and its tests: ``tcId, comment, flags``, the inputs, ``result`` (valid or invalid), and of valid
ones the outputs. Bytes are hex; residues are decimal; private keys here are for nothing but these vectors.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from secure_fed.protocol import pads, shares
from secure_fed.protocol.envelope import RoundPosition
from secure_fed.protocol.residues import PRIMES

Test = dict[str, Any]
NAMES = ("ash", "birch", "cedar", "dogwood")
BITS = (44, 51, 57)


def drawn(label: str) -> bytes:
    """32 bytes that are the same each time."""
    return hashlib.sha256(b"pad vectors " + label.encode()).digest()


def privates() -> dict[str, bytes]:
    return {name: drawn(f"key {name}") for name in NAMES}


def place(**changed: Any) -> pads.PadPlace:
    """An attempt, or one that differs in these fields."""
    facts = {name: drawn(name).hex() for name in ("study", "run", "head", "key", "cohort")}
    facts |= {"amendment": 2, "round": 7, "attempt": 3} | changed
    position = RoundPosition(*(facts[name] for name in ("run", "head", "key", "amendment", "round")))
    return pads.PadPlace(facts["study"], position, facts["attempt"], facts["cohort"])


def keys() -> dict[str, str]:
    return {name: pads.public_of(key) for name, key in privates().items()}


def pads_of(at: pads.PadPlace, site: str) -> pads.SitePads:
    return pads.SitePads(at, keys(), site, privates()[site])


CHANGES: dict[str, Any] = {name: drawn("another").hex() for name in ("study", "run", "head", "key", "cohort")} | {
    "amendment": 1,
    "round": 8,
    "attempt": 4,
}


def _place_fields(at: pads.PadPlace) -> Test:
    where = at.position
    return {
        "study": at.study, "run": where.run, "head": where.head, "key": where.key, "amendment": where.amendment,
        "round": where.round, "attempt": at.attempt, "cohort": at.cohort,
    }  # fmt: skip


def fresh_keys() -> list[Test]:
    field = 2**255 - 19
    small = {
        "coordinate 0": 0,
        "coordinate 1": 1,
        "order 8": int.from_bytes(
            bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"), "little"
        ),
        "order 8, the other": int.from_bytes(
            bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"), "little"
        ),
        "coordinate p - 1": field - 1,
    }  # fmt: skip
    disguised = {
        "p": field,
        "p + 1": field + 1,
        "p + 9, which is 9": field + 9,
        "highest bit set": int.from_bytes(bytes.fromhex(keys()["ash"]), "little") | 1 << 255,
        "all bits set": 2**256 - 1,
    }
    tests: list[Test] = [
        {"comment": f"drawn, of {name}", "public": key, "result": "valid", "flags": []} for name, key in keys().items()
    ]
    tests += [
        {"comment": comment, "public": value.to_bytes(32, "little").hex(), "result": "invalid", "flags": [flag]}
        for flag, values in (("SmallOrder", small), ("NonCanonical", disguised))
        for comment, value in values.items()
    ]
    return tests


def pair_keys() -> list[Test]:
    tests: list[Test] = []
    places = {f"another {name}": place(**{name: value}) for name, value in CHANGES.items()}
    for comment, at in [("the attempt", place()), *places.items()]:
        for site, other in (("ash", "birch"), ("birch", "ash"), ("cedar", "dogwood")):
            mine = pads_of(at, site)
            tests.append({
                "comment": f"{site} with {other}, {comment}", "private": privates()[site].hex(),
                "public": keys()[other], "site": site, "other": other, **_place_fields(at), "result": "valid",
                "flags": [], "padKey": mine.pad_key(other).hex(),
            })  # fmt: skip
    return tests


def streams() -> list[Test]:
    tests: list[Test] = []
    for bits in BITS:
        key = drawn(f"stream {bits}")
        residues = pads.pad(key, 65_536, PRIMES[bits])
        tests.append({
            "comment": f"a prime of {bits} bits", "streamKey": key.hex(), "modulus": str(PRIMES[bits]),
            "count": residues.size, "result": "valid", "flags": [], "first": [str(one) for one in residues[:8]],
            "sha256LittleEndian64": hashlib.sha256(residues.astype("<u8").tobytes()).hexdigest(),
        })  # fmt: skip
    # Where about half of the words are drawn again.
    key, modulus = drawn("redraw"), 257
    residues = pads.pad(key, 64, modulus)
    tests.append({
        "comment": "half of the words are not below the modulus", "streamKey": key.hex(), "modulus": str(modulus),
        "count": 64, "result": "valid", "flags": ["Redraw"], "first": [str(one) for one in residues[:8]],
        "sha256LittleEndian64": hashlib.sha256(residues.astype("<u8").tobytes()).hexdigest(),
    })  # fmt: skip
    return tests


def masks() -> list[Test]:
    at, seed = place(), drawn("seed")
    return [
        {
            "comment": f"of {name}", "seed": seed.hex(), "site": name, **_place_fields(at), "result": "valid",
            "flags": [], "streamKey": pads.mask_key(seed, at, name).hex(), "commitment": pads.commitment(seed, name),
        }
        for name in NAMES
    ]  # fmt: skip


def masked() -> list[Test]:
    at, count, tests = place(), 16, []
    for bits in BITS:
        for name in NAMES:
            residues = pads.pad(drawn(f"residues {name}"), count, PRIMES[bits])
            seed = drawn(f"seed {name}")
            found = pads_of(at, name).masked(residues, seed, PRIMES[bits])
            tests.append({
                "comment": f"{name}, a prime of {bits} bits", "private": privates()[name].hex(), "site": name,
                "keys": keys(), **_place_fields(at), "seed": seed.hex(), "modulus": str(PRIMES[bits]),
                "residues": [str(one) for one in residues], "result": "valid", "flags": [],
                "masked": [str(one) for one in found],
            })  # fmt: skip
    return tests


def shared() -> list[Test]:
    tests: list[Test] = []
    for count, needed in ((3, 3), (5, 3), (7, 4), (300, 2)):
        secret = drawn(f"secret {count}")
        draws = b"".join(drawn(f"coefficient {number}") for number in range(1, needed))
        points = list(range(1, count + 1)) if count < 300 else [1, 255, 256, 257, 65_535]
        found = shares.share(secret, needed, points, draws)
        tests.append({
            "comment": f"{needed} of {len(points)}", "secret": secret.hex(), "needed": needed, "points": points,
            "coefficients": draws.hex(), "result": "valid", "flags": [], "shares": [one.hex() for one in found],
        })  # fmt: skip
    return tests


def sealed() -> list[Test]:
    at, share = place(), drawn("share")
    ash = pads_of(at, "ash")
    good = ash.seal_share(share, "birch")
    wrong = {
        "another direction": (pads_of(at, "birch").seal_share(share, "ash"), "Direction"),
        "to another site": (ash.seal_share(share, "cedar"), "Recipient"),
        "a flipped bit": (bytes([good[0] ^ 1]) + good[1:], "BitFlip"),
        "a flipped bit of the tag": (good[:-1] + bytes([good[-1] ^ 128]), "BitFlip"),
        "cut": (good[:-1], "Truncated"),
    }
    for name, value in CHANGES.items():
        other = pads_of(place(**{name: value}), "ash")
        wrong[f"of another {name}"] = (other.seal_share(share, "birch"), "WrongPlace")
    common = {"private": privates()["birch"].hex(), "public": keys()["ash"], "maker": "ash", "site": "birch"}
    tests: list[Test] = [{"comment": "ash to birch", **common, **_place_fields(at), "sealed": good.hex(),
                          "result": "valid", "flags": [], "share": share.hex()}]  # fmt: skip
    back = pads_of(at, "birch").seal_share(share, "ash")
    tests.append({"comment": "birch to ash", "private": privates()["ash"].hex(), "public": keys()["birch"],
                  "maker": "birch", "site": "ash", **_place_fields(at), "sealed": back.hex(), "result": "valid",
                  "flags": [], "share": share.hex()})  # fmt: skip
    tests += [
        {"comment": comment, **common, **_place_fields(at), "sealed": data.hex(), "result": "invalid", "flags": [flag]}
        for comment, (data, flag) in wrong.items()
    ]
    return tests


def trees() -> list[Test]:
    tests: list[Test] = []
    for count in (1, 2, 3, 5, 8, 9):
        leaves = [shares.leaf(drawn(f"sealed {at}") + bytes(16), drawn(f"digest {at}")) for at in range(count)]
        root, paths = shares.tree(leaves)
        for index in range(count):
            tests.append({
                "comment": f"leaf {index} of {count}", "leaf": leaves[index].hex(), "index": index, "count": count,
                "path": [one.hex() for one in paths[index]], "root": root.hex(), "result": "valid", "flags": [],
            })  # fmt: skip
    whole = tests[-3]
    other = {"index": whole["index"] - 1, "path": whole["path"][:-1], "count": whole["count"] - 2, "root": "00" * 32}
    tests += [
        {**whole, "comment": f"another {name}", name: value, "result": "invalid", "flags": ["WrongPath"]}
        for name, value in other.items()
    ]
    return tests


MAKERS = {
    "FreshKey": fresh_keys, "PadKey": pair_keys, "Stream": streams, "Mask": masks, "Masked": masked,
    "Share": shared, "SealedShare": sealed, "SharePath": trees,
}  # fmt: skip


def write(folder: Path) -> None:
    """Write ``pads.json`` into a version's folder."""
    groups, number = [], 0
    for kind, make in MAKERS.items():
        tests = []
        for test in make():
            number += 1
            tests.append({"tcId": number} | test)
        groups.append({"type": kind, "tests": tests})
    document = {"algorithm": "secfacmic pads 1", "numberOfTests": number, "testGroups": groups}
    (folder / "pads.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    write(Path(__file__).parent / "vectors" / "v2")
