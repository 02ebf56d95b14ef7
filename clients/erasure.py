"""Patients who are to be forgotten: whatever the site still can take back of them, and that they stay away.

``STATE/forgotten.json`` keeps keyed hashes alone: of the patient's id, and of the identities of the images that were
there, so that an export which brings them again, under another name too, brings nothing back. The key lies beside them:
who has the file and guesses an id can confirm the guess.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from secure_fed.clients.data import read_data
from secure_fed.clients.decoding import identity
from secure_fed.clients.features import FeatureCache
from secure_fed.clients.sitefile import SiteFile
from secure_fed.core.errors import EnvelopeError, ForgottenError, SecfacmicError
from secure_fed.core.storage import make_folder, sync_folder, write_durable
from secure_fed.core.tomlfile import FileModel, parse_table
from secure_fed.model.adapter_file import CALIBRATION
from secure_fed.protocol.envelope import MAGIC, MAX_HEADER, EnvelopeHeader
from secure_fed.protocol.signing import PRIVATE, parse_header, split_frame
from secure_fed.protocol.study import AgreedStudy, Hex64

FILE = "forgotten.json"
WITHDRAWN = "withdrawn"
"""Suffix, in an outbox, of the note that a round's update was dropped: the last attempt it was sealed for, else 0."""

_Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


class _Content(FileModel):
    format: Literal[1]
    key: Hex64
    patients: tuple[_Hash, ...]
    images: tuple[_Hash, ...] = Field(default=())


class Forgotten:
    """The list of a site's forgotten patients; empty where nobody was forgotten.

    Args:
        state: the site's state folder.

    Raises:
        ForgottenError: the list cannot be read.
    """

    def __init__(self, state: Path) -> None:
        self._path = state / FILE
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            self._content = _Content(format=1, key=secrets.token_hex(32), patients=())
        except OSError as error:
            raise ForgottenError(f"{self._path}: cannot be read ({error.strerror}); expected it readable") from error
        else:
            try:
                table = json.loads(data)
            except ValueError:
                table = {}
            if not isinstance(table, dict):
                table = {}
            self._content = parse_table(table, _Content, ForgottenError, f"{self._path}: put it back from a backup")
        self._patients, self._images = set(self._content.patients), set(self._content.images)

    def patient(self, name: str) -> bool:
        """Whether this patient is to be forgotten."""
        return bool(self._patients) and self._hash("patient", name.encode()) in self._patients

    def image(self, known_as: bytes) -> bool:
        """Whether the image of this identity was a forgotten patient's."""
        return bool(self._images) and self._hash("image", known_as) in self._images

    def add(self, name: str, images: list[bytes]) -> None:
        """Put a patient and the identities of the images on the list, durably."""
        patients = self._patients | {self._hash("patient", name.encode())}
        digests = self._images | {self._hash("image", image) for image in images}
        content = self._content.model_copy(
            update={"patients": tuple(sorted(patients)), "images": tuple(sorted(digests))}
        )
        make_folder(self._path.parent)
        write_durable(self._path, content.model_dump_json().encode() + b"\n", PRIVATE)
        self._content, self._patients, self._images = content, patients, digests

    def _hash(self, what: str, content: bytes) -> str:
        message = f"secfacmic forgotten 1 {what}\n".encode() + content
        return hmac.new(bytes.fromhex(self._content.key), message, hashlib.sha256).hexdigest()[:32]


@dataclass(frozen=True)
class Forgetting:
    """What was done.

    Attributes:
        images: of the patient, in the data folder now.
        features: images of which all that was computed was dropped: the patient's and any that are not there any more.
        rounds: whose pending update was dropped, by run and round.
        heads: private heads that were dropped.
        unread: why the data folder cannot be read; then the whole cache was dropped. Empty if it can.
    """

    images: int
    features: int
    rounds: tuple[str, ...]
    heads: int
    unread: str


def forget(file: SiteFile, agreed: AgreedStudy, patient: str) -> Forgetting:
    """Take back what the site can of a patient. The caller holds the state folder; called again, it goes on.

    Args:
        file: the site's.
        agreed: its study.
        patient: as the manifest names the patient (or the path, where an image counts as one).

    Raises:
        ForgottenError: the list of the forgotten cannot be read.
        StorageError: the list or the cache cannot be written; what is on the list stays away all the same.
    """
    state = Path(file.state)
    forgotten = Forgotten(state)
    theirs: list[bytes] = []
    others: list[bytes] = []
    unread, count = "", 0
    try:
        study, data = agreed.study, file.data
        extra = None if data.unlabelled is None else Path(data.unlabelled)
        images = read_data(Path(data.folder), study.class_names, data.unit, data.shares, study.seed, extra)
        for image in images:
            mine = image.patient == patient
            count += mine
            try:
                known = identity(image.path.read_bytes(), image.frame)
            except OSError:
                continue
            if mine:
                theirs.append(known)
            elif not forgotten.patient(image.patient):
                others.append(known)
    except SecfacmicError as error:
        unread, others = str(error), []
    forgotten.add(patient, sorted(set(theirs) - set(others)))
    rounds, heads = _withdraw(state / "runs")
    # Its temperature was fitted to validation images, and statistics in it may be of training images.
    (state / CALIBRATION).unlink(missing_ok=True)
    dropped = 0
    if file.feature_cache.exists():
        with FeatureCache(file.feature_cache) as cache:
            dropped = cache.keep_only(set(others))
    return Forgetting(count, dropped, rounds, heads, unread)


def _withdraw(runs: Path) -> tuple[tuple[str, ...], int]:
    """Drop the updates in all outboxes, leaving a note for each, and all private heads."""
    rounds: list[str] = []
    for outbox in sorted(runs.glob("*/outbox")):
        stems = sorted({path.stem for suffix in ("integers", "envelope") for path in outbox.glob(f"*.{suffix}")})
        for stem in stems:
            envelope = outbox / f"{stem}.envelope"
            attempt = _attempt(envelope) if envelope.exists() else 0
            write_durable(outbox / f"{stem}.{WITHDRAWN}", str(attempt).encode(), PRIVATE)
            for path in (outbox / f"{stem}.integers", envelope):
                path.unlink(missing_ok=True)
            sync_folder(outbox)
            rounds.append(f"run {outbox.parent.name[:16]}, round {int(stem)}")
    heads = sorted(runs.glob("*/heads/*"))
    for head in heads:
        head.unlink()
        sync_folder(head.parent)
    return tuple(rounds), len(heads)


def _attempt(envelope: Path) -> int:
    """The attempt that an envelope was sealed for; of a damaged one, beyond all: it may have been any."""
    try:
        frame = split_frame(MAGIC, envelope.read_bytes(), MAX_HEADER, EnvelopeError)
        return parse_header(frame.header, EnvelopeHeader, EnvelopeError).attempt
    except EnvelopeError:
        return 2**31


def withdrawn(outbox: Path, round_number: int, attempt: int) -> bool:
    """Whether a round's update was dropped after it may have been sent for this attempt, or a later one.

    A second, different update must not follow for one attempt: both would carry the same one-time tag, and a server
    that has both could add one and take away the other, which shows what the patient made of the difference.
    """
    note = outbox / f"{round_number:08d}.{WITHDRAWN}"
    return note.exists() and attempt <= int(note.read_text(encoding="ascii"))
