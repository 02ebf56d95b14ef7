"""Every way in which secfacmic refuses, as one class each with its own exit code.

A message says what was found, what was expected and what to do. Exit codes go by range:
10-19 study and site files, 20-29 data, 30-39 backbone, 40-59 encryption, journal and protocol,
60-69 storage, 70-79 rounds, 80-89 the network. Codes 1 and 2 stay Python's and typer's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

_LISTED = 10
_LETTERS = 500
"""Most single faults that a message names."""


def fault_lines(faults: Sequence[str]) -> str:
    """The end of a message that names single faults: a line for each of the first, and how many more there are."""
    shown = "".join(f"\n  {fault[:_LETTERS]}" for fault in faults[:_LISTED])
    return shown + (f"\n  and {len(faults) - _LISTED} more" if len(faults) > _LISTED else "")


class SecfacmicError(Exception):
    """Base of all refusals.

    Attributes:
        exit_code: process exit status of this class; unique, so that scripts can tell refusals apart.
    """

    exit_code: ClassVar[int] = 3


class StudyError(SecfacmicError):
    """A study file that does not hold together, or two that should agree and do not."""

    exit_code = 10


class SiteFileError(SecfacmicError):
    """A site.toml that does not hold together, or a site whose own policy refuses the study."""

    exit_code = 11


class OutputError(SecfacmicError):
    """An output folder that belongs to something else."""

    exit_code = 12


class NotAcceptedError(SecfacmicError):
    """A study, or a version of it, that nobody at this site has accepted."""

    exit_code = 13


class StudyClosedError(SecfacmicError):
    """A study that was closed here: its keys and outboxes are destroyed."""

    exit_code = 14


class ReportError(SecfacmicError):
    """A folder that a report cannot be made of, or results in it that are malformed."""

    exit_code = 15


class SweepFileError(SecfacmicError):
    """A sweep file that does not hold together, or asks for what no trial can do."""

    exit_code = 16


class AdapterFileError(SecfacmicError):
    """An adapter file that cannot be read, is of another study, or lacks what its use here needs."""

    exit_code = 17


class OnnxError(SecfacmicError):
    """An ONNX file that would not compute what the adapter computes; none was written."""

    exit_code = 18


class SummaryError(SecfacmicError):
    """A summary.json that cannot be read, is malformed, or is of another kind or a newer format."""

    exit_code = 19


class DataError(SecfacmicError):
    """A missing data folder, or one without usable images."""

    exit_code = 20


class UnreadableImageError(SecfacmicError):
    """Images that cannot be decoded."""

    exit_code = 21


class ManifestError(SecfacmicError):
    """A manifest.csv whose rows do not fit the files or the columns."""

    exit_code = 22


class LabelError(SecfacmicError):
    """A label or class folder outside the study's classes."""

    exit_code = 23


class DataLeakError(SecfacmicError):
    """Data whose manifest puts copies of one image, or one patient, into two splits."""

    exit_code = 24


class ForgottenError(SecfacmicError):
    """A site's list of forgotten patients that cannot be read: nothing is read from the data until it can."""

    exit_code = 25


class PatientError(SecfacmicError):
    """Ids that may be one patient twice, or many patients in one, where a privacy budget needs to know."""

    exit_code = 26


class UnknownPatientError(SecfacmicError):
    """A patient to be forgotten whom the site does not know; nothing was changed."""

    exit_code = 27


class BackboneError(SecfacmicError):
    """A backbone that cannot be loaded."""

    exit_code = 30


class BackboneDigestError(SecfacmicError):
    """A backbone whose weights are not those that the study names."""

    exit_code = 31


class DeviceError(SecfacmicError):
    """A device to compute on that is not there."""

    exit_code = 32


class LanesError(SecfacmicError):
    """Sites, bits, lanes and number of values that no exact CKKS packing holds."""

    exit_code = 40


class SealFormatError(SecfacmicError):
    """Bytes that are not the known SEAL serialisation."""

    exit_code = 41


class KeyFileError(SecfacmicError):
    """An identity, key or sealed key file that cannot be used."""

    exit_code = 42


class EnvelopeError(SecfacmicError):
    """An envelope that is malformed, unsigned, or not for this round."""

    exit_code = 43


class RecordError(SecfacmicError):
    """A journal record that does not verify, or does not continue the chain."""

    exit_code = 44


class AggregateRefused(SecfacmicError):
    """An aggregate that was decrypted and refused. Deliberately opaque: it never says why."""

    exit_code = 45


class StudyPausedError(SecfacmicError):
    """A sum that is what its sites sent, but out of range: people must find whose envelope it was."""

    exit_code = 46


class ProtocolError(SecfacmicError):
    """A message between server and site that does not fit the state of the receiver."""

    exit_code = 47


class AdapterMismatchError(SecfacmicError):
    """Sites that hold different adapters after the same round."""

    exit_code = 48


class NotShownError(SecfacmicError):
    """A server that cannot show the envelopes of a sum of which it promised to keep them."""

    exit_code = 49


class NonFiniteUpdateError(SecfacmicError):
    """An update with NaN or infinite values."""

    exit_code = 50


class BudgetError(SecfacmicError):
    """A privacy budget that cannot pay, or that somebody tries to raise."""

    exit_code = 51


class BudgetSpentError(BudgetError):
    """A privacy budget of which no update more can be paid in this run, whatever is asked."""

    exit_code = 57


class PrivateMethodError(SecfacmicError):
    """A method, loss or norm that differential privacy does not hold for."""

    exit_code = 52


class GuardError(SecfacmicError):
    """Training code that failed its check on synthetic data; no budget was touched."""

    exit_code = 53


class AuditFailedError(SecfacmicError):
    """An audit that refuted the claimed epsilon."""

    exit_code = 54


class EvidenceError(SecfacmicError):
    """An evidence archive whose parts do not verify, or do not belong together."""

    exit_code = 55


class RepeatedSumError(SecfacmicError):
    """A second exact sum of statistics with images that were in one before."""

    exit_code = 56


class StorageError(SecfacmicError):
    """A file that could not be written durably (disk full, permissions)."""

    exit_code = 60


class LedgerError(SecfacmicError):
    """A privacy ledger that does not verify, or is not there although it was."""

    exit_code = 61


class LedgerRollbackError(SecfacmicError):
    """A privacy ledger older than the one that server or other sites have seen."""

    exit_code = 62


class TwinsError(SecfacmicError):
    """Equal pictures under two patient ids of a site with a budget, of which nobody has said whether they are one."""

    exit_code = 64


class StateFormatError(SecfacmicError):
    """A state folder whose layout this version does not know."""

    exit_code = 63


class NotEnoughSitesError(SecfacmicError):
    """Fewer sites than min_sites can ever train again."""

    exit_code = 70


class TrialFailedError(SecfacmicError):
    """A sweep that ran to its end, but some of whose trials failed; the others' results are there."""

    exit_code = 71


class WorkersError(SecfacmicError):
    """Processes for a sweep's trials that cannot be had: no Ray installed, or no cluster that answers."""

    exit_code = 72


class DrillError(SecfacmicError):
    """A drill in which an attack succeeded against this installation."""

    exit_code = 73


class AddressError(SecfacmicError):
    """An address that cannot be listened on: in use, not ours, or not an address; or a proxy's that is none."""

    exit_code = 80


class CertificateError(SecfacmicError):
    """A certificate that is missing, or a server that does not prove to be the one meant."""

    exit_code = 81


class ClockError(SecfacmicError):
    """A clock too far from the server's: Flower refuses what is signed in its future or long ago."""

    exit_code = 82


class BundleError(SecfacmicError):
    """A server that offers anything but the study's contract: a site runs its own code only."""

    exit_code = 83


class NotAdmittedError(SecfacmicError):
    """A site whose key the server does not know."""

    exit_code = 84


class ServerAppError(SecfacmicError):
    """A round loop that ends again and again without progress."""

    exit_code = 85


class RoundFailedError(SecfacmicError):
    """A round that failed at a site in a way that nobody foresaw."""

    exit_code = 86


class DemoError(SecfacmicError):
    """A process of the demonstration that ended before the study did."""

    exit_code = 87


class PacsError(SecfacmicError):
    """An image archive that cannot be asked, lets nobody in, or answers with something else than images."""

    exit_code = 88
