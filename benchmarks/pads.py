"""What pads cost a site: seconds of one thread for keys, pads and mask, shares, and for taking all masks off a sum;
and bytes of a record for each contributor.

``python benchmarks/pads.py`` prints a row for each number of sites, over 525,312 values.
"""

from __future__ import annotations

import json
import time
from secrets import token_bytes, token_hex

import numpy as np

from secure_fed.protocol.envelope import EnvelopeHeader, Hidden, RoundPosition
from secure_fed.protocol.packing import lane_parameters
from secure_fed.protocol.pads import PadPlace, SitePads, check_fresh_key, new_private, public_of, without_masks
from secure_fed.protocol.quorum import quorum
from secure_fed.protocol.records import RecordHeader
from secure_fed.protocol.round_frames import Revealed, SignedWord
from secure_fed.protocol.share_frames import Dealt, Witness, Witnessed, deal, hand_out, open_handed, places, take_handed
from secure_fed.protocol.signing import encode_header

VALUES = 525_312
SIZES = ((4, 9, 4), (16, 9, 3), (64, 16, 2), (256, 12, 2))
"""Sites, bits a value, lanes."""


def measure(count: int, bits: int, lanes: int) -> dict[str, float]:
    """Seconds of one site in one attempt."""
    parameters = lane_parameters(max_sites=count, bits=bits, lanes=lanes, values=VALUES)
    names = [f"site{number:04d}" for number in range(count)]
    privates = {name: new_private() for name in names}
    keys = {name: public_of(key) for name, key in privates.items()}
    place = PadPlace("1" * 64, RoundPosition("2" * 64, "3" * 64, "4" * 64, 0, 1), 1, "5" * 64)
    site, needed, seed = names[count // 2], quorum(count, 1, 3), token_bytes(32)
    residues = np.zeros(parameters.coefficients, np.uint64)
    marks = [time.process_time()]
    for name, key in keys.items():
        check_fresh_key(key, name)
    marks.append(time.process_time())
    mine = SitePads(place, keys, site, privates[site])
    masked = mine.masked(residues, seed, parameters.modulus)
    marks.append(time.process_time())
    mine.unmasked(masked, seed, parameters.modulus)
    marks.append(time.process_time())
    dealt = deal(mine, seed, needed)
    marks.append(time.process_time())
    handed = _handed(dealt, names, site, place, keys, privates)
    marks.append(time.process_time())
    without_masks(masked, place, dict.fromkeys(names, seed), parameters.modulus)
    marks.append(time.process_time())
    steps = ("keys", "pads", "proof", "shares", "opening_shares", "masks_off")
    seconds = {step: after - before for step, before, after in zip(steps, marks, marks[1:], strict=False)}
    before = record_bytes(names, needed, pads=False, gone=0)
    sizes = {
        f"record_bytes_{gone}_gone": (record_bytes(names, needed, pads=True, gone=gone) - before) / count
        for gone in sorted({0, 1, count - needed})
    }
    return {"sites": count, "bits": bits, "lanes": lanes, "handed_bytes": handed, **sizes, **seconds}


def record_bytes(names: list[str], needed: int, pads: bool, gone: int) -> int:
    """A record's header: with pads, REVEALs and the words for some that are gone, or without any of these."""
    position = {name: token_hex(32) for name in ("study", "run", "head", "key", "payload")} | {"size": 0, "version": 2}
    contributors = []
    for name in names:
        hidden = Hidden(token_hex(32), token_hex(32)) if pads else None
        envelope = EnvelopeHeader(
            **position, amendment=0, round=1, attempt=1, cohort=token_hex(32), site=name, values=VALUES,
            seed=token_hex(32), ledger_seq=0, ledger_head="0" * 64, ledger_links=(), hidden=hidden,
        )  # fmt: skip
        contributors.append(SignedWord.of(encode_header(envelope), token_bytes(64)))
    revealed = len(names) - gone if pads else 0
    absent = names[len(names) - gone :]
    words = tuple(Witness(name, places(names, absent), token_hex(64)) for name in names[: needed if gone else 0])
    header = RecordHeader(
        **{name: value for name, value in position.items() if name != "head"},
        kind="aggregate", seq=1, previous=token_hex(32), round=1, contributors=tuple(contributors), opened_ms=0,
        closed_ms=0, reveals=tuple(Revealed(token_hex(8), token_hex(8), token_hex(64)) for _ in range(revealed)),
        masks=tuple(token_hex(32) for _ in names if pads),
        witnessed=tuple(Witnessed(name, token_hex(8), token_hex(8)) for name in absent), witnesses=words,
    )  # fmt: skip
    return len(encode_header(header))


def _handed(
    dealt: Dealt, names: list[str], site: str, place: PadPlace, keys: dict[str, str], privates: dict[str, bytes]
) -> int:
    """Open as many shares as a site is handed; how many bytes they are."""
    receiver = next(name for name in names if name != site)
    if not dealt.entries:
        return 0
    one = hand_out(dealt.entries, dealt.hidden.shares, len(names) - 1)[0]
    theirs = SitePads(place, keys, receiver, privates[receiver])
    for _ in names[1:]:
        taken, _ = take_handed(one, names, [site], receiver, {site: dealt.hidden.shares})
        open_handed(theirs, site, taken[site])
    return len(one) * (len(names) - 1)


if __name__ == "__main__":
    for sizes in SIZES:
        print(json.dumps(measure(*sizes)))
