"""A site's own envelopes: sealed, opened again before they leave, and kept until the round is over."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secure_fed.clients.bound import Bound, Padded
from secure_fed.clients.replica import Replica
from secure_fed.core.errors import AggregateRefused, EnvelopeError, ProtocolError
from secure_fed.core.storage import make_folder, write_durable
from secure_fed.protocol.envelope import MAGIC, MAX_HEADER, EnvelopeHeader, check_position, seal_envelope
from secure_fed.protocol.ledger_heads import LedgerHead
from secure_fed.protocol.packing import Binding, Contribution, Sealed
from secure_fed.protocol.pads import KEY_BYTES, PadPlace, SitePads
from secure_fed.protocol.residues import pack_residues, unpack_residues
from secure_fed.protocol.round_frames import CohortHeader, cohort_keys
from secure_fed.protocol.share_frames import deal
from secure_fed.protocol.signing import Frame, check_payload, parse_header, split_frame
from secure_fed.protocol.study import AgreedStudy

Integers = Callable[[], tuple[NDArray[np.int64], LedgerHead]]
"""Gives the integers of the round, stored before they are used, and the head of the ledger that paid for them."""


class Envelopes:
    """What this site seals in the round that is due; all of it is on disk before anybody gets it.

    Args:
        agreed: the study.
        replica: its copy of the journal, and its keys.
    """

    def __init__(self, agreed: AgreedStudy, replica: Replica) -> None:
        self._agreed = agreed
        self._replica = replica

    def sealed(self, attempt: int, cohort: str, integers_of: Integers) -> bytes:
        """The envelope of an attempt; opened and compared with the stored integers before anybody gets it."""
        due, path = self._replica.due, self._path
        integers, ledger = integers_of()
        binding = Binding(run=due.run, head=due.head, round=due.round)
        sealed = self._sealed_before(path)
        if sealed is None:
            sealed = self._replica.sealer.seal(integers, binding, self._replica.name)
        data = seal_envelope(
            self._agreed, due, sealed, ledger, self._replica.identity.signing, attempt=attempt, cohort=cohort
        )
        self._refuse_damage(data[len(data) - len(sealed.payload) :], sealed.contribution, binding, integers)
        write_durable(path, data, 0o600)
        return data

    def padded(self, bound: Bound, header: CohortHeader, cohort: str, integers_of: Integers) -> tuple[bytes, Padded]:
        """An envelope under pads; taken apart again and compared with the stored integers before it leaves."""
        due, lanes = self._replica.due, self._agreed.layout(self._replica.due.round).lanes
        if bound.fresh is None or bound.fresh.attempt != header.attempt:
            raise ProtocolError(f"COHORT of attempt {header.attempt}, for which this site has no fresh key any more")
        private, keys = bytes.fromhex(bound.fresh.private), cohort_keys(header)
        place = PadPlace(self._agreed.study.id, due, header.attempt, cohort)
        mine, seed = SitePads(place, keys, self._replica.name, private), secrets.token_bytes(KEY_BYTES)
        dealt = deal(mine, seed, self._replica.state.chain.quorum.needed)
        integers, ledger = integers_of()
        binding = Binding(run=due.run, head=due.head, round=due.round)
        contribution, payload = self._replica.sealer.seal(integers, binding, self._replica.name)
        residues = mine.masked(unpack_residues(payload, lanes.modulus_bits), seed, lanes.modulus)
        sealed = Sealed(contribution, pack_residues(residues, lanes.modulus_bits))
        data = seal_envelope(
            self._agreed, due, sealed, ledger, self._replica.identity.signing,
            attempt=header.attempt, cohort=cohort, hidden=dealt.hidden,
        )  # fmt: skip
        final = unpack_residues(data[len(data) - len(sealed.payload) :], lanes.modulus_bits)
        bare = pack_residues(mine.unmasked(final, seed, lanes.modulus), lanes.modulus_bits)
        self._refuse_damage(bare, contribution, binding, integers)
        write_durable(self._path, data, 0o600)
        return data, Padded(
            private=private.hex(),
            keys=tuple(keys.values()),
            seed=seed.hex(),
            shares=dealt.entries.hex(),
            envelope=hashlib.sha256(data).hexdigest(),
        )

    def sent_before(self, bound: Bound) -> tuple[bytes, bytes]:
        """The envelope and shares of the attempt that this site is bound to, byte for byte: none other has its pads."""
        data = self._path.read_bytes() if self._path.is_file() else b""
        if bound.padded is None or hashlib.sha256(data).hexdigest() != bound.padded.envelope:
            raise ProtocolError(
                f"round {bound.round}: the envelope of attempt {bound.attempt} is not here whole any more, and is "
                "never made twice; this attempt goes on without it, the next one has other pads"
            )
        return data, bytes.fromhex(bound.padded.shares)

    def sent(self) -> Frame | None:
        """The newest that this site has made in this round; None if it is not here any more.

        Raises:
            EnvelopeError: it is damaged: a check of it would name this site as one that lies.
        """
        path = self._path
        if not path.exists():
            return None
        try:
            frame = split_frame(MAGIC, path.read_bytes(), MAX_HEADER, EnvelopeError)
            check_payload(frame, parse_header(frame.header, EnvelopeHeader, EnvelopeError), EnvelopeError)
        except EnvelopeError as error:
            raise EnvelopeError(
                f"{path}: damaged since it was sent ({error}), so that this site signs nothing for it; with pads the "
                "others speak for it, else people give the round up: secfacmic site void; look after this computer's "
                "disk"
            ) from None
        return frame

    @property
    def _path(self) -> Path:
        folder = self._replica.files.folder
        make_folder(folder.outbox, 0o700)
        return folder.envelope(self._replica.due.round)

    def _refuse_damage(
        self, payload: bytes, contribution: Contribution, binding: Binding, integers: NDArray[np.int64]
    ) -> None:
        """Open what would be sent, as others will: a faulty site finds itself."""
        try:
            opened = self._replica.sealer.open(payload, binding, [contribution])
        except AggregateRefused:
            opened = None
        if opened is None or not np.array_equal(opened, integers):
            self._path.unlink(missing_ok=True)
            raise EnvelopeError(
                f"round {binding.round}: the envelope does not open to the integers that were stored; nothing was "
                "sent: this computer's memory or disk is damaged; start the site again, elsewhere if it comes back"
            )

    def _sealed_before(self, path: Path) -> Sealed | None:
        """What was sealed for this very position, if it is whole; a damaged one was not sent, or is made anew."""
        try:
            frame = split_frame(MAGIC, path.read_bytes(), MAX_HEADER, EnvelopeError)
            header = parse_header(frame.header, EnvelopeHeader, EnvelopeError)
            check_payload(frame, header, EnvelopeError)
            check_position(header, self._replica.due)
        except (FileNotFoundError, EnvelopeError):
            return None
        return Sealed(header.contribution, bytes(frame.payload))
