"""Exact sums under CKKS, authenticated: the only module that holds the CKKS secret.

A site seals bounded integers and two linear tags over them; a site that holds the same secret opens a
sum and accepts it only if every slot is an integer up to noise and the tags are those of the signed
cohort. What leaves this module is envelope bytes and exact integers, never a CKKS
float: its noise would give the key away (Li and Micciancio, EUROCRYPT 2021).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher as StreamCipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from tenseal import sealapi

from secure_fed.core.errors import AggregateRefused, EnvelopeError, KeyFileError, SealFormatError
from secure_fed.privacy import seal_format
from secure_fed.protocol.packing import (
    DEGREE,
    REFUSAL,
    TAG_PRIME,
    TAGS,
    Binding,
    CipherWire,
    Coefficients,
    Contribution,
    Integers,
    LaneParameters,
    check_integers,
    cohort_holds,
    pack_coefficients,
    pack_lanes,
    unpack_lanes,
)

TAG_KEY_BYTES: Final = 32
"""Length of the tags' key."""

_PRIME_BITS: Final = (54, 55)
# 7.36 standard deviations of a full cohort's noise: an honest component is refused once in 5e12.
_TOLERANCE: Final = 0.4
_KEY_MAGIC: Final = b"secfacmic-ckks-1"
_KEY_LENGTH: Final = struct.Struct(">I")
_DIGEST_BYTES: Final = hashlib.sha256().digest_size
# Values of a tag's dot product at a time: in the processor's cache, exact (see _dot_product), and below the 10,000
# from which OpenBLAS would start threads, which wait for one another on a busy machine.
_BLOCK: Final = 2**13


@dataclass(frozen=True, slots=True)
class StudySecret:
    """What all sites of a study share and the server never sees. Its repr shows neither key.

    Attributes:
        secret_key: SEAL's serialised secret key.
        tag_key: TAG_KEY_BYTES bytes, from which the tags are derived.
    """

    secret_key: bytes = field(repr=False)
    tag_key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.tag_key) != TAG_KEY_BYTES:
            raise KeyFileError(
                f"a tag key of {len(self.tag_key)} bytes; expected {TAG_KEY_BYTES}; get the key file again"
            )

    @classmethod
    def generate(cls) -> StudySecret:
        """Draw a new secret; both keys come from the operating system's generator (SEAL's too)."""
        secret_key = sealapi.KeyGenerator(_context()).secret_key()
        return cls(seal_format.save(secret_key), secrets.token_bytes(TAG_KEY_BYTES))

    def to_bytes(self) -> bytes:
        """Serialise: magic, tag key, length of the secret key (4, big-endian), secret key, SHA-256 of all."""
        body = _KEY_MAGIC + self.tag_key + _KEY_LENGTH.pack(len(self.secret_key)) + self.secret_key
        return body + hashlib.sha256(body).digest()

    @classmethod
    def from_bytes(cls, data: bytes) -> StudySecret:
        """Undo ``to_bytes``.

        Raises:
            KeyFileError: other magic, length or digest. The text shows nothing of the content.
        """
        body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        length_at = len(_KEY_MAGIC) + TAG_KEY_BYTES
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
        return cls(secret_key=body[key_at:], tag_key=body[len(_KEY_MAGIC) : length_at])


class Cipher:
    """Implements Sealer under a study's secret. Not for use by two threads at once."""

    def __init__(self, parameters: LaneParameters, secret: StudySecret) -> None:
        """Load the secret.

        Raises:
            KeyFileError: SEAL does not take the secret key for these parameters.
            SealFormatError: the installed SEAL does not write the known format.
        """
        self._parameters = parameters
        self._wire = CipherWire(parameters)
        self._tag_key = secret.tag_key
        self._context = _context()
        key = sealapi.SecretKey()
        try:
            seal_format.load(key, self._context, secret.secret_key)
        except SealFormatError as error:
            raise KeyFileError(f"the study's secret key: {error}") from None
        self._encoder = sealapi.CKKSEncoder(self._context)
        self._encryptor = sealapi.Encryptor(self._context, key)
        self._decryptor = sealapi.Decryptor(self._context, key)
        self._evaluator = sealapi.Evaluator(self._context)
        parms_id = tuple(self._context.first_parms_id())
        self._form = seal_format.SeededForm((parms_id[0], parms_id[1], parms_id[2], parms_id[3]), parameters.scale)
        # Fail here, by name, rather than as a refused aggregate, if this SEAL writes something else.
        self._encrypt(np.zeros(DEGREE // 2, np.complex128))

    def seal(self, integers: Integers, binding: Binding, contribution: Contribution) -> bytes:
        """Tag, pack and encrypt one update; see ``Sealer.seal``."""
        check_integers(integers, self._parameters)
        dots = _dot_products(self._tag_key, binding, integers)
        masks = self._masks(binding, contribution)
        tags = [(dot + mask) % TAG_PRIME for dot, mask in zip(dots, masks, strict=True)]
        slots = pack_lanes(np.concatenate((integers, self._digits(tags))), self._parameters)
        polynomials = np.empty((self._parameters.ciphertexts, DEGREE), np.uint64)
        seeds = []
        for index, row in enumerate(slots):
            seed, polynomials[index] = self._encrypt(row)
            seeds.append(seed)
        return b"".join((*seeds, pack_coefficients(polynomials)))

    def open(self, record_payload: bytes, binding: Binding, cohort: Sequence[Contribution]) -> Integers:
        """Decrypt, check and return one record's exact sums; see ``Sealer.open``."""
        with contextlib.suppress(EnvelopeError, SealFormatError, RuntimeError, ValueError, _NotAnHonestSum):
            return self._open(record_payload, binding, cohort)
        # Outside the handler, so that no traceback and no __context__ tells one refusal from another.
        raise AggregateRefused(REFUSAL) from None

    def _open(self, record_payload: bytes, binding: Binding, cohort: Sequence[Contribution]) -> Integers:
        parameters = self._parameters
        if not cohort_holds(cohort, parameters):
            raise _NotAnHonestSum
        seeds, polynomials = self._wire.split_record(record_payload, len(cohort))
        slots = np.empty((parameters.ciphertexts, DEGREE))
        for index, polynomial in enumerate(polynomials):
            slots[index] = self._decrypt([site_seeds[index] for site_seeds in seeds], polynomial)
        nearest = np.rint(slots)
        unpacked = unpack_lanes(nearest.astype(np.int64), parameters)
        integers, padding = unpacked[: parameters.integers], unpacked[parameters.integers :]
        bound = len(cohort) * parameters.max_integer
        sums = integers[: parameters.values].copy()
        digit_sums = integers[parameters.values :].reshape(TAGS, parameters.tag_digits)
        # One verdict after all checks, so that the time taken does not tell where a forgery failed.
        verdict = (
            bool((np.abs(slots - nearest) <= _TOLERANCE).all())
            & (not padding.any())
            & (int(integers.max()) <= bound)
            & (int(integers.min()) >= -bound)
            & self._tags_hold(sums, digit_sums, binding, cohort)
        )
        if not verdict:
            raise _NotAnHonestSum
        return sums

    def _tags_hold(
        self, sums: Integers, digit_sums: Integers, binding: Binding, cohort: Sequence[Contribution]
    ) -> bool:
        expected = _dot_products(self._tag_key, binding, sums)
        for contribution in cohort:
            masks = self._masks(binding, contribution)
            expected = [(left + right) % TAG_PRIME for left, right in zip(expected, masks, strict=True)]
        width = self._parameters.bits - 1
        found = [
            sum(int(digit) << (width * place) for place, digit in enumerate(digits)) % TAG_PRIME
            for digits in digit_sums
        ]
        return found == expected

    def _masks(self, binding: Binding, contribution: Contribution) -> list[int]:
        """Return u_ij of one envelope, for each j."""
        return [
            int.from_bytes(_derive(self._tag_key, "u", j, binding, str(contribution.attempt), contribution.site), "big")
            % TAG_PRIME
            for j in range(TAGS)
        ]

    def _digits(self, tags: Sequence[int]) -> Integers:
        """Split tags into non-negative digits of bits - 1 bits, lowest first."""
        width = self._parameters.bits - 1
        places = range(self._parameters.tag_digits)
        return np.array(
            [tag >> (width * place) & self._parameters.max_integer for tag in tags for place in places],
            np.int64,
        )

    def _encrypt(self, slots: npt.NDArray[np.complex128]) -> tuple[bytes, Coefficients]:
        """Encrypt DEGREE / 2 unscaled slots; return seed and first polynomial."""
        plaintext = sealapi.Plaintext()
        self._encoder.encode(slots.tolist(), self._parameters.scale, plaintext)
        return self._form.split(seal_format.save(self._encryptor.encrypt_symmetric(plaintext)))

    def _decrypt(self, seeds: Sequence[bytes], polynomial: Coefficients) -> npt.NDArray[np.float64]:
        """Rebuild one ciphertext of a sum as SEAL would have added it, and decrypt it.

        Args:
            seeds: of the contributors' second polynomials.
            polynomial: sum of their first polynomials, uint64 of shape (DEGREE,).

        Returns:
            float64 of shape (DEGREE,): real and imaginary part of each slot in turn, noise included.
        """
        total = sealapi.Ciphertext(self._context)
        seal_format.load(total, self._context, self._form.build(seeds[0], polynomial))
        nothing = np.zeros(DEGREE, np.uint64)
        for seed in seeds[1:]:
            part = sealapi.Ciphertext(self._context)
            seal_format.load(part, self._context, self._form.build(seed, nothing))
            self._evaluator.add_inplace(total, part)
        plaintext = sealapi.Plaintext()
        self._decryptor.decrypt(total, plaintext)
        return np.array(self._encoder.decode_complex(plaintext), np.complex128).view(np.float64)


class _NotAnHonestSum(Exception):
    """Inside this module only: why a record was refused is nobody's business."""


def _context() -> Any:
    parameters = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(DEGREE)
    parameters.set_coeff_modulus(sealapi.CoeffModulus.Create(DEGREE, list(_PRIME_BITS)))
    # TC128: SEAL refuses parameters below 128 bits of the HomomorphicEncryption.org standard.
    return sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC128)


def _derive(tag_key: bytes, label: str, tag: int, binding: Binding, *more: str) -> bytes:
    """HMAC-SHA-256 of the fields, each after its length, so that no two lists of fields agree."""
    fields = [label, str(tag), binding.run, binding.head, str(binding.round), *more]
    encoded = [text.encode() for text in fields]
    message = b"".join(_KEY_LENGTH.pack(len(text)) + text for text in encoded)
    return hmac.digest(tag_key, message, "sha256")


def _dot_products(tag_key: bytes, binding: Binding, values: Integers) -> list[int]:
    """Return <r_j, values> modulo TAG_PRIME for each j, exactly.

    Args:
        tag_key: the study's.
        binding: the round, from which r_j is expanded with ChaCha20.
        values: int64 of any length, magnitudes below 2^21 (wider lanes do not exist).
    """
    return [_dot_product(_derive(tag_key, "r", j, binding), values) for j in range(TAGS)]


def _dot_product(stream_key: bytes, values: Integers) -> int:
    """One dot product, exactly, from two inexact ones a block.

    The integer one is exact modulo 2^64. The float one is off by at most (block + 2) * 2^-53 * sum |r||v| < 2^56,
    since r < 2^61 and |v| < 2^21: enough to tell which multiple of 2^64 the other lacks.
    """
    stream = StreamCipher(ChaCha20(stream_key, bytes(16)), mode=None).encryptor()
    zeros = bytes(8 * min(_BLOCK, values.size))
    keystream = bytearray(len(zeros))
    total = 0
    for start in range(0, values.size, _BLOCK):
        block = values[start : start + _BLOCK]
        length = 8 * block.size
        stream.update_into(memoryview(zeros)[:length], memoryview(keystream)[:length])
        # 61 random bits each; TAG_PRIME itself is among them and stands for 0, a bias of 2^-61.
        words = np.frombuffer(keystream, "<i8", block.size) & TAG_PRIME
        wrapped = int(np.dot(words, block))
        rough = float(np.dot(words.astype(np.float64), block.astype(np.float64)))
        total += wrapped + (round((rough - wrapped) * 2.0**-64) << 64)
    return total % TAG_PRIME
