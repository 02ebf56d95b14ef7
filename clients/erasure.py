"""A patient is to be forgotten: whatever the site still can take back of one, and that the patient stays away."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from secure_fed.clients.bound import read_bound
from secure_fed.clients.budget import has_budget, ledger_folder
from secure_fed.clients.decoding import identities
from secure_fed.clients.features import FeatureCache
from secure_fed.clients.files import Notes
from secure_fed.clients.forgotten import Forgotten
from secure_fed.clients.images import every_image, named_patients
from secure_fed.clients.patients import SETTLED, in_one_form, read_settled, similar, writings
from secure_fed.clients.sitefile import SiteFile
from secure_fed.clients.snapshot import read_snapshot, without, write_snapshot
from secure_fed.core.errors import EnvelopeError, SecfacmicError, UnknownPatientError
from secure_fed.core.layout import SiteRun, SiteState
from secure_fed.core.storage import exclusive, sync_folder, write_durable
from secure_fed.privacy.ledger import snapshot_key
from secure_fed.protocol.envelope import MAGIC, MAX_HEADER, EnvelopeHeader, RoundPosition
from secure_fed.protocol.signing import PRIVATE, parse_header, split_frame
from secure_fed.protocol.study import AgreedStudy


@dataclass(frozen=True)
class Forgetting:
    """What was done.

    Attributes:
        images: of the patient, in the data folder now, in whatever writing of the id.
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
    """Take back what the site can of a patient; called again, it goes on.

    Args:
        file: the site's.
        agreed: its study.
        patient: as the manifest names the patient (or the path, where an image counts as one).

    Raises:
        ForgottenError: the list of the forgotten cannot be read.
        UnknownPatientError: no image, row or list of the site has this id; nothing was changed.
        StorageError: another process, as the site's client, holds the state folder; or the list or the cache cannot be
            written: what is on the list stays away all the same.
    """
    file.state_folder.begin()
    with exclusive(file.state_folder.path):
        return _forget(file, agreed, patient)


def _forget(file: SiteFile, agreed: AgreedStudy, patient: str) -> Forgetting:
    state = file.state_folder
    forgotten = Forgotten(state.path)
    patient = _known(file, agreed, forgotten, patient)
    theirs: list[bytes] = []
    in_any_writing = file.data.unit == "patient"
    others: list[bytes] = []
    unread, count = "", 0
    try:
        notes = Notes()
        images = every_image(file, agreed, notes)
        for image, known in zip(images, identities(one.source for one in images), strict=True):
            mine = image.patient == patient or bool(
                in_any_writing
                and image.patient not in notes.settled
                and writings(image.patient, sought=True) & writings(patient)
            )
            count += mine
            if isinstance(known, OSError):
                continue
            if mine:
                theirs.append(known)
            elif not forgotten.goes_by(image.patient, notes.settled):
                others.append(known)
    except SecfacmicError as error:
        unread, others = str(error), []
    forgotten.add(patient, sorted(set(theirs) - set(others)), in_any_writing)
    if has_budget(file):
        # What it sent, or will send again, is noised: it may stay, and to send nothing would tell that somebody left.
        rounds: tuple[str, ...] = ()
        heads = 0
        _leave_snapshots(file, patient, set(theirs) - set(others))
    else:
        rounds, heads = _withdraw(state)
    # Its temperature was fitted to validation images, and statistics in it may be of training images.
    state.calibration.unlink(missing_ok=True)
    dropped = 0
    if file.feature_cache.exists():
        with FeatureCache(file.feature_cache) as cache:
            dropped = cache.keep_only(set(others))
    return Forgetting(count, dropped, rounds, heads, unread)


def _known(file: SiteFile, agreed: AgreedStudy, forgotten: Forgotten, patient: str) -> str:
    """The id under which the site knows a patient.

    Raises:
        UnknownPatientError: under none.
    """
    meant = patient if file.data.unit == "image" else in_one_form(patient)
    names: set[str] = set()
    reason = ""
    try:
        names = {image.patient for image in every_image(file, agreed)}
    except SecfacmicError as error:
        reason = f"; the data cannot be read ({' '.join(str(error).split())[:160]})"
        names = named_patients(file)
    settled = Path(file.data.patients or Path(file.data.folder) / SETTLED)
    if file.data.unit == "patient" and (file.data.patients is not None or settled.exists()):
        meant = read_settled(settled)[0].get(meant, meant)
    if meant in names or forgotten.patient(meant):
        return meant
    alike = similar(meant, names)
    known = f"similar ids here: {', '.join(map(repr, alike))}" if alike else "no similar id is here"
    raise UnknownPatientError(
        f"{patient!r}: no patient of this site has this id{reason}; expected an id as the manifest or the DICOM header "
        f"has it: {known}. Nothing was changed"
    )


def _leave_snapshots(file: SiteFile, patient: str, images: set[bytes]) -> None:
    """Take a patient out of the data of all runs, under that name and under any that has its images."""
    for folder in file.state_folder.run_folders():
        path = SiteRun(folder).snapshot
        if path.exists():
            key = snapshot_key(ledger_folder(file))
            features = read_snapshot(path, key)
            names = {name for name, digests in features.digests.items() if digests & images} | {patient}
            write_snapshot(path, without(features, names), key)


def _withdraw(state: SiteState) -> tuple[tuple[str, ...], int]:
    """Drop the updates in all outboxes, leaving a note for each, and all private heads."""
    rounds: list[str] = []
    heads = 0
    for folder in state.run_folders():
        run = SiteRun(folder)
        for number in run.updates():
            envelope = run.envelope(number)
            attempt, sealed_at = _sealed_for(envelope) if envelope.exists() else (0, "")
            write_durable(run.withdrawn(number), f"{attempt} {sealed_at}".encode(), PRIVATE)
            run.integers(number).unlink(missing_ok=True)
            bound = read_bound(run.bound)
            if bound is None or bound.round != number or bound.attempt < max(attempt, 1):
                envelope.unlink(missing_ok=True)  # else the server has it: once its sum is fixed, the round needs it
            sync_folder(run.outbox)
            rounds.append(f"run {folder.name[:16]}, round {number}")
        for head in run.heads.glob("*"):
            head.unlink()
            sync_folder(run.heads)
            heads += 1
    return tuple(rounds), heads


def _sealed_for(envelope: Path) -> tuple[int, str]:
    """The attempt, and the head, that an envelope was sealed for; of a damaged one, beyond all at any: it may have been
    any."""
    try:
        frame = split_frame(MAGIC, envelope.read_bytes(), MAX_HEADER, EnvelopeError)
        header = parse_header(frame.header, EnvelopeHeader, EnvelopeError)
    except EnvelopeError:
        return 2**31, ""
    return header.attempt, header.head


def withdrawn(run: SiteRun, due: RoundPosition, attempt: int) -> bool:
    """Whether the update of the round that is due was dropped after it may have been sent for this attempt, or a later
    one.

    A second, different update must not follow for one attempt: a server that has both could add one and take away the
    other, which shows what the patient made of the difference. After a void the round begins anew at another head, and
    its attempts with it.
    """
    note = run.withdrawn(due.round)
    if not note.exists():
        return False
    last, *head = note.read_text(encoding="ascii").split()
    return attempt <= int(last) and head in ([], [due.head])
