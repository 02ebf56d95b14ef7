"""Exact sums under CKKS: the only module that holds the CKKS secret.

A site seals bounded integers; a site that holds the same secret opens a sum and accepts it only if every lane is in
range. That it is the sum of its cohort's envelopes is known before it comes here, by what each of them revealed
(:meth:`secure_fed.protocol.records.Chain.check`). What leaves this module is envelope bytes and exact integers, never
a noisy number: CKKS noise would give the key away (Li and Micciancio, EUROCRYPT 2021).

Integers lie in a polynomial's coefficients, not in CKKS slots: an envelope is (c0, a) with c0 = -a s + e + D m mod Q,
an ordinary symmetric CKKS ciphertext of SEAL whose message was encoded without the canonical embedding, which a sum
does not need. Key, noise and transforms are SEAL's; a is expanded from the envelope's seed.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from tenseal import sealapi

from secure_fed.core.errors import AggregateRefused, EnvelopeError, KeyFileError, SealFormatError
from secure_fed.privacy import seal_format
from secure_fed.protocol.packing import (
    NOISE_MOST,
    REFUSAL,
    Binding,
    CipherWire,
    Contribution,
    Integers,
    LaneParameters,
    Sealed,
    check_integers,
    cohort_holds,
    in_range,
    pack_lanes,
    unpack_lanes,
)
from secure_fed.protocol.residues import (
    DEGREE,
    PRIMES,
    Residues,
    Stream,
    SumOfStreams,
    add_into,
    centre,
    multiply,
    pack_residues,
    uncentre,
)

MAC_KEY_BYTES: Final = 32
"""Length of the key of attestations and checkpoints."""

_SEED_BYTES: Final = 32
_STREAM: Final = b"secfacmic second polynomials 1"
_KEY_MAGIC: Final = b"secfacmic-ckks-2"
_KEY_LENGTH: Final = struct.Struct(">I")
_DIGEST_BYTES: Final = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class StudySecret:
    """What all sites of a study share and the server never sees. Its repr shows neither key.

    Attributes:
        modulus_bits: bits of the data prime that the key is for, which the study's lanes decide.
        secret_key: SEAL's serialised secret key.
        mac_key: MAC_KEY_BYTES bytes, under which sites attest their adapter to one another, checkpoints are sealed, and
            the key is named.
    """

    modulus_bits: int
    secret_key: bytes = field(repr=False)
    mac_key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.mac_key) != MAC_KEY_BYTES:
            raise KeyFileError(
                f"a key of attestations of {len(self.mac_key)} bytes; expected {MAC_KEY_BYTES}; get the key file again"
            )

    @classmethod
    def generate(cls, modulus_bits: int) -> StudySecret:
        """Draw a new secret for a data prime; both keys come from the operating system's generator (SEAL's too)."""
        secret_key = sealapi.KeyGenerator(_context(modulus_bits)).secret_key()
        return cls(modulus_bits, seal_format.save(secret_key), secrets.token_bytes(MAC_KEY_BYTES))

    def to_bytes(self) -> bytes:
        """Serialise: magic, bits of the prime (1), MAC key, length of the secret key (4, big-endian), secret key,
        SHA-256 of all."""
        start = _KEY_MAGIC + bytes([self.modulus_bits]) + self.mac_key
        body = start + _KEY_LENGTH.pack(len(self.secret_key)) + self.secret_key
        return body + hashlib.sha256(body).digest()

    @classmethod
    def from_bytes(cls, data: bytes) -> StudySecret:
        """Undo ``to_bytes``.

        Raises:
            KeyFileError: other magic, length or digest. The text shows nothing of the content.
        """
        body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        mac_at = len(_KEY_MAGIC) + 1
        length_at = mac_at + MAC_KEY_BYTES
        key_at = length_at + _KEY_LENGTH.size
        if (
            len(body) < key_at
            or not body.startswith(_KEY_MAGIC)
            or _KEY_LENGTH.unpack_from(body, length_at)[0] != len(body) - key_at
            or not hmac.compare_digest(hashlib.sha256(body).digest(), digest)
        ):
            raise KeyFileError(
                f"{len(data)} bytes that are not a whole study secret of this version; the key file is cut, "
                "damaged or of another program; get it again"
            )
        return cls(body[mac_at - 1], secret_key=body[key_at:], mac_key=body[mac_at:length_at])

    def require_prime(self, parameters: LaneParameters) -> None:
        """Refuse a secret that no envelope of this study can be sealed with.

        Raises:
            KeyFileError: it was made for another prime.
        """
        if self.modulus_bits != parameters.modulus_bits:
            raise KeyFileError(
                f"the study's secret key is for a prime of {self.modulus_bits} bits; expected "
                f"{parameters.modulus_bits}, which follow from this study's encoding; take the key file of this study"
            )


class Cipher:
    """Implements Sealer under a study's secret. Not for use by two threads at once."""

    def __init__(self, parameters: LaneParameters, secret: StudySecret) -> None:
        """Load the secret, and hold what this module computes itself against SEAL's own.

        Raises:
            KeyFileError: the key was made for another prime, or SEAL does not take it.
            SealFormatError: the installed SEAL does not write the known format, or computes otherwise.
        """
        secret.require_prime(parameters)
        self._parameters = parameters
        self._wire = CipherWire(parameters)
        self._context = _context(parameters.modulus_bits)
        words = tuple(self._context.first_parms_id())
        self._parms_id = (words[0], words[1], words[2], words[3])
        key = sealapi.SecretKey()
        try:
            seal_format.load(key, self._context, secret.secret_key)
            self._secret = centre(self._plaintext_words(secret.secret_key), parameters.modulus)
        except SealFormatError as error:
            raise KeyFileError(f"the study's secret key: {error}") from None
        self._encryptor = sealapi.Encryptor(self._context, key)
        self._decryptor = sealapi.Decryptor(self._context, key)
        self._evaluator = sealapi.Evaluator(self._context)
        # Fail here, by name, rather than as a refused aggregate, if this SEAL does something else.
        self._test_against_seal()

    def seal(self, integers: Integers, binding: Binding, site: str) -> Sealed:
        """Pack and encrypt one update; see ``Sealer.seal``."""
        check_integers(integers, self._parameters)
        contribution = Contribution(site, secrets.token_hex(_SEED_BYTES))
        packed = pack_lanes(integers, self._parameters)
        modulus = self._parameters.modulus
        first = self._encrypted_zeros(stream_key(binding, contribution))
        add_into(first, uncentre(packed * self._parameters.scale, modulus), modulus)
        return Sealed(contribution, pack_residues(first, self._parameters.modulus_bits))

    def open(self, record_payload: bytes, binding: Binding, cohort: Sequence[Contribution]) -> Integers:
        """Decrypt and return one record's exact sums, if they are in range; see ``Sealer.open``."""
        with contextlib.suppress(EnvelopeError, SealFormatError, RuntimeError, ValueError, _NotAnHonestSum):
            return self._open(record_payload, binding, cohort)
        # Outside the handler, so that no traceback and no __context__ tells one refusal from another.
        raise AggregateRefused(REFUSAL) from None

    def _open(self, record_payload: bytes, binding: Binding, cohort: Sequence[Contribution]) -> Integers:
        parameters = self._parameters
        if not cohort_holds(cohort, parameters):
            raise _NotAnHonestSum
        sums = self._wire.residues(record_payload)
        streams = SumOfStreams([stream_key(binding, one) for one in cohort], parameters.modulus)
        lanes = np.empty((parameters.coefficients, parameters.lanes), np.int64)
        for polynomials, used in self._blocks():
            noisy = sums[used]
            add_into(noisy, self._times_secret(streams.take(polynomials * DEGREE))[: noisy.size], parameters.modulus)
            packed = (centre(noisy, parameters.modulus) + parameters.scale // 2) // parameters.scale
            lanes[used] = unpack_lanes(packed, parameters)
        if not in_range(lanes, parameters, len(cohort)):
            raise _NotAnHonestSum
        return lanes.reshape(-1)[: parameters.values]

    def _blocks(self) -> Iterator[tuple[int, slice]]:
        """The polynomials, as many at a time as SEAL takes in one ciphertext and caches hold: how many, and which of
        the used coefficients are theirs."""
        most, count = seal_format.MOST_POLYNOMIALS, self._parameters.ciphertexts
        for first in range(0, count, most):
            last = min(first + most, count)
            yield last - first, slice(first * DEGREE, min(last * DEGREE, self._parameters.coefficients))

    def _encrypted_zeros(self, key: bytes) -> Residues:
        """First polynomials e - a s of an encryption of zeros under the second polynomials a of a stream key.

        The noise e is SEAL's: what it encrypts zero to, decrypted. Neither e nor SEAL's own ciphertext may be seen by
        anybody: with c0 and a, or with another c0 of the same noise, they give the secret key.

        Returns:
            uint64 of shape (coefficients,), not in NTT form, cut behind the last used coefficient.
        """
        modulus, stream = self._parameters.modulus, Stream(key, self._parameters.modulus)
        first = np.empty(self._parameters.coefficients, np.uint64)
        zero, plaintext = sealapi.Ciphertext(self._context), sealapi.Plaintext()
        for polynomials, used in self._blocks():
            noise = np.empty((polynomials, DEGREE), np.uint64)
            for polynomial in noise:
                self._encryptor.encrypt_zero_symmetric(zero)
                self._decryptor.decrypt(zero, plaintext)
                polynomial[:] = self._plaintext_words(seal_format.save(plaintext))
            second = stream.take(noise.size).reshape(noise.shape)
            add_into(noise, np.uint64(modulus) - multiply(second, self._secret, modulus), modulus)
            part = first[used]
            part[:] = self._from_ntt(noise)[: part.size]
        return first

    def _times_secret(self, second: Residues) -> Residues:
        """The product with the secret key of at most MOST_POLYNOMIALS polynomials in NTT form.

        Args:
            second: uint64 of shape (polynomials * DEGREE,).

        Returns:
            The same, not in NTT form.
        """
        return self._from_ntt(multiply(second.reshape(-1, DEGREE), self._secret, self._parameters.modulus))

    def _from_ntt(self, polynomials: Residues) -> Residues:
        """At most MOST_POLYNOMIALS polynomials in NTT form, (n, DEGREE), to their coefficients, (n * DEGREE,): by
        SEAL, as one ciphertext."""
        count = len(polynomials)
        if count == 1:  # fewer than two are no ciphertext
            polynomials = np.concatenate((polynomials, polynomials))
        carrier = sealapi.Ciphertext(self._context)
        seal_format.load(carrier, self._context, seal_format.ciphertext(polynomials, self._parms_id))
        self._evaluator.transform_from_ntt_inplace(carrier)
        saved = seal_format.save(carrier)
        words = seal_format.ciphertext_words(saved, self._parms_id, len(polynomials), ntt=False)
        return words[:count].reshape(-1).copy()  # what SEAL saved is read-only

    def _plaintext_words(self, saved: bytes) -> Residues:
        return seal_format.plaintext_words(saved, self._parms_id)

    def _test_against_seal(self) -> None:
        """Layout, product and transform on an encryption of zero that SEAL made and decrypted.

        Raises:
            SealFormatError: one of them is not SEAL's.
        """
        modulus = self._parameters.modulus
        zero, plaintext = sealapi.Ciphertext(self._context), sealapi.Plaintext()
        self._encryptor.encrypt_zero_symmetric(zero)
        self._decryptor.decrypt(zero, plaintext)
        found = seal_format.ciphertext_words(seal_format.save(zero), self._parms_id, 2, ntt=True).copy()
        noise = self._plaintext_words(seal_format.save(plaintext))
        add_into(found[0], multiply(found[1], self._secret, modulus), modulus)
        small = np.abs(centre(self._from_ntt(noise.reshape(1, DEGREE)), modulus))
        if not np.array_equal(found[0], noise) or not 0 < int(small.max()) <= NOISE_MOST:
            raise SealFormatError(
                "this SEAL's ciphertexts do not decrypt to its own noise by c0 + c1 s: its layout, its products or its "
                f"transform are other than expected of SEAL {seal_format.SEAL_VERSION}; install the tenseal version "
                "that secfacmic names"
            )


def stream_key(binding: Binding, contribution: Contribution) -> bytes:
    """The key, 32 bytes, from which an envelope's second polynomials are expanded
    (:func:`secure_fed.protocol.residues.expand`), one polynomial of DEGREE residues in NTT form after the other.

    SHA-256 of a label and, each after its length in four bytes, seed, run, head, round and site. Not of the attempt:
    a new attempt may send the same bytes again. A seed that somebody copies gives other polynomials elsewhere.
    """
    fields = [bytes.fromhex(contribution.seed), binding.run.encode(), binding.head.encode()]
    fields += [str(binding.round).encode(), contribution.site.encode()]
    return hashlib.sha256(_STREAM + b"".join(_KEY_LENGTH.pack(len(text)) + text for text in fields)).digest()


class _NotAnHonestSum(Exception):
    """Inside this module only: why a record was refused is nobody's business."""


def _context(modulus_bits: int) -> Any:
    parameters = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(DEGREE)
    parameters.set_coeff_modulus(sealapi.CoeffModulus.Create(DEGREE, [modulus_bits]))
    if [prime.value() for prime in parameters.coeff_modulus()] != [PRIMES.get(modulus_bits)]:
        raise SealFormatError(
            f"this SEAL has another prime of {modulus_bits} bits than {PRIMES.get(modulus_bits)}; install the tenseal "
            "version that secfacmic names"
        )
    # TC256: SEAL refuses parameters below 256 bits of the HomomorphicEncryption.org standard. One prime: nothing is
    # multiplied or switched.
    return sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC256)
