"""Where everything lies in a state folder, a site's or a server's. Nothing else knows these names.

In both:

| name | what it is | who writes it |
| --- | --- | --- |
| ``format`` | the layout's version; absent is 1 | whoever begins the folder |
| ``lock`` | held by the process that uses the folder | :mod:`secure_fed.core.storage` |
| ``run`` | id of the current run | replica, coordinator |
| ``runs/RUN/journal/N.record`` | the run's signed records | replica, coordinator |
| ``ledger_heads.json`` | the newest privacy-ledger head seen of every site | replica, coordinator |
| ``status.json`` | where the process stands | the running process |
| ``log/NAME.jsonl`` | what it reported | the running process |
| ``metrics.token`` | by which the process's figures may be read | the running process |
| ``closed`` | that the study is over for good | ``study close`` |

At a site:

| name | what it is | who writes it |
| --- | --- | --- |
| ``runs/RUN/pins/N`` | digest of a round's one candidate | replica |
| ``runs/RUN/refused/N`` | that a round's aggregate was refused, and its key | replica |
| ``runs/RUN/evidence/X.record`` | a second record that the coordinator signed | replica |
| ``runs/RUN/adapter.safetensors`` | adapter and moments after the last record | replica |
| ``runs/RUN/before.safetensors`` | the same before the last sum, which a void may take back | replica |
| ``runs/RUN/bound.json`` | what the site has bound itself to in the open round | site |
| ``runs/RUN/cohort.frame, arrived.frame`` | the last of each that it has answered | site |
| ``runs/RUN/outbox/N.integers`` | the rounded update | site |
| ``runs/RUN/outbox/STATE.noised`` | that of a site with a budget, by the adapter's state | site |
| ``runs/RUN/snapshot.safetensors`` | its data as they were when the run began | site |
| ``runs/RUN/outbox/N.envelope`` | the update as it was sent | site |
| ``runs/RUN/outbox/N.withdrawn`` | that a round's update was dropped | ``data forget`` |
| ``runs/RUN/heads/N`` | the private head after a round | site |
| ``keys/EPOCH.sealed`` | the study's sealed keys | ``keys accept``, replica |
| ``accepted/STUDY.*`` | who accepted which study | ``site accept`` |
| ``privacy/`` | a privacy ledger of version 0.1; now it lies with the identity | nobody any more |
| ``features.sqlite`` | image features, unless ``site.toml`` says elsewhere | site |
| ``forgotten.json`` | keyed hashes of forgotten patients | ``data forget`` |
| ``sent.jsonl`` | the list of all that left the site | site |
| ``drill.json`` | which attacks were tried on this installation | ``drill --site`` |
| ``adapter.safetensors`` | results: the adapter, | ``client`` |
| ``calibration.safetensors`` | its temperature here, | ``client`` |
| ``summary.json`` | and its figures | ``client`` |

At a server:

| name | what it is | who writes it |
| --- | --- | --- |
| ``coordinator.key`` | signs the records | ``study new`` |
| ``tls/`` | see :mod:`secure_fed.transport.certificates` | ``study ca`` |
| ``runs/RUN/spool/N/A/S.envelope`` | what site S sent for attempt A of round N | coordinator |
| ``runs/RUN/incoming/S.DIGEST.BYTES.part`` | what site S is sending | the connections |
| ``runs/RUN/outgoing/DIGEST`` | what sites may fetch | the rounds |
| ``runs/RUN/outgoing/N/DIGEST`` | padded residues of the last rounds' envelopes | coordinator |
| ``runs/RUN/amendments/KEY.sealed`` | an amendment that waits, after that key | ``study amend`` |
| ``runs/RUN/pause``, ``runs/RUN/end`` | that no round begins; that the run ends | ``study pause``, ``study end`` |
| ``runs/RUN/lobby`` | that the first round waits until all are ready | ``server --lobby`` |
| ``runs/RUN/authority`` | the authority under which the run was first served | ``server`` |
| ``runs/RUN/rounds`` | how many rounds the run is to have | ``study extend`` |
| ``runs/RUN/revealed`` | the cohort of the last round that was given up after its sum was fixed | coordinator |
| ``runs/RUN/told`` | who knows that the run is over | the rounds |

``N`` is a number of eight digits: a record's place in its journal, else a round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from secure_fed.core.errors import StateFormatError
from secure_fed.core.storage import LOCK, make_folder, write_durable

FORMAT = 1
"""Version of the layout. Folders of secfacmic 0.1 have this layout and do not say so."""

ADAPTER, CALIBRATION, SUMMARY = "adapter.safetensors", "calibration.safetensors", "summary.json"
"""Results, at a site and in a simulation's folder."""

SWEEP = "sweep.json"
"""What is swept, in a sweep's folder."""

RECORDS = "*.record"
SEALED = "*.sealed"
ENVELOPES = "*.envelope"
INTEGERS = "*.integers"
NOISED = "*.noised"
"""Names of records, of sealed keys, of kept, spooled and sent envelopes, and of stored integers, noised ones too."""


def numbered(number: int) -> str:
    """A number as files are named by it: names sort as numbers do."""
    return f"{number:08d}"


def record_file(journal: Path, seq: int) -> Path:
    """Where the record of that number lies in a folder of records."""
    return journal / f"{numbered(seq)}.record"


def sealed_key(folder: Path, epoch: int) -> Path:
    """Where the sealed key of an epoch lies in a folder of keys."""
    return folder / f"{epoch:06d}.sealed"


def site_envelope(folder: Path, site: str) -> Path:
    """Where a site's envelope lies in a folder with one of each site."""
    return folder / f"{site}.envelope"


def acceptance_note(folder: Path, study: str, number: int) -> Path:
    """Where a study's note of that number lies in a folder of acceptances."""
    return folder / f"{study}.{numbered(number)}.signed"


def kept_round(folder: Path, run: str, round_number: int) -> Path:
    """Folder of a round's envelopes below a server's ``--keep-envelopes``, which is a folder outside of the state."""
    return folder / run / numbered(round_number)


@dataclass(frozen=True)
class RunState:
    """One run's folder; only its names, whether they are there or not."""

    path: Path

    @property
    def journal(self) -> Path:
        """Folder of the records."""
        return self.path / "journal"


class SiteRun(RunState):
    """One run at a site."""

    @property
    def adapter(self) -> Path:
        """Adapter and moments after the last record."""
        return self.path / ADAPTER

    @property
    def outbox(self) -> Path:
        """Folder of updates."""
        return self.path / "outbox"

    @property
    def heads(self) -> Path:
        """Folder of private heads."""
        return self.path / "heads"

    @property
    def refused(self) -> Path:
        """Folder of refusals."""
        return self.path / "refused"

    @property
    def evidence(self) -> Path:
        """Folder of second records."""
        return self.path / "evidence"

    def integers(self, round_number: int) -> Path:
        """A round's rounded update."""
        return self.outbox / f"{numbered(round_number)}.integers"

    def envelope(self, round_number: int) -> Path:
        """A round's update as it was sent."""
        return self.outbox / f"{numbered(round_number)}.envelope"

    def noised(self, state: str) -> Path:
        """The noised and rounded update at an adapter state of that digest."""
        return self.outbox / f"{state[:32]}.noised"

    @property
    def snapshot(self) -> Path:
        """The data of a site with a budget as they were when the run began."""
        return self.path / "snapshot.safetensors"

    def withdrawn(self, round_number: int) -> Path:
        """The note that a round's update was dropped: the last attempt it was sealed for, else 0, and the head."""
        return self.outbox / f"{numbered(round_number)}.withdrawn"

    def all_integers(self) -> list[Path]:
        """The rounded updates that are kept, by round: of the adapter's state and of the one before."""
        return sorted(self.outbox.glob(INTEGERS))

    def all_noised(self) -> list[Path]:
        """The noised updates that are kept."""
        return sorted(self.outbox.glob(NOISED))

    def envelopes(self) -> list[Path]:
        """The updates that are kept as they were sent, by round."""
        return sorted(self.outbox.glob(ENVELOPES))

    def updates(self) -> list[int]:
        """Rounds with an update in the outbox, in order."""
        found = {path.stem for suffix in ("integers", "envelope") for path in self.outbox.glob(f"*.{suffix}")}
        return sorted(int(stem) for stem in found)

    def head(self, round_number: int) -> Path:
        """The private head after a round."""
        return self.heads / numbered(round_number)

    @property
    def bound(self) -> Path:
        """What the site has bound itself to in the open round."""
        return self.path / "bound.json"

    @property
    def before(self) -> Path:
        """Adapter and moments before the last sum."""
        return self.path / "before.safetensors"

    def question(self, name: str) -> Path:
        """The last ``cohort``, ``arrived`` or ``checked`` that the site has answered, for a server that lost them."""
        return self.path / f"{name}.frame"

    def pin(self, round_number: int) -> Path:
        """The digest of a round's one candidate."""
        return self.path / "pins" / numbered(round_number)

    def refusal(self, round_number: int) -> Path:
        """The note that a round's aggregate was refused, under which key."""
        return self.refused / numbered(round_number)

    def second_record(self, digest: str) -> Path:
        """A record that the coordinator signed besides the one in the journal."""
        return self.evidence / f"{digest}.record"


class ServerRun(RunState):
    """One run at a server."""

    @property
    def spool(self) -> Path:
        """Folder of what was received, a folder a round."""
        return self.path / "spool"

    @property
    def incoming(self) -> Path:
        """Folder of what is on its way from the sites."""
        return self.path / "incoming"

    @property
    def outgoing(self) -> Path:
        """Folder of what sites may fetch, by its SHA-256; may be copied to any web server."""
        return self.path / "outgoing"

    def shown(self, round_number: int) -> Path:
        """Folder of the padded residues of a round's envelopes, by their SHA-256, which sites may fetch."""
        return self.outgoing / numbered(round_number)

    def shown_rounds(self) -> list[int]:
        """Rounds that have such a folder, in order."""
        return sorted(int(path.name) for path in self.outgoing.glob("[0-9]" * 8) if path.is_dir())

    def spooled_round(self, round_number: int) -> Path:
        """Folder of what was received for a round, a folder an attempt."""
        return self.spool / numbered(round_number)

    def spooled(self, round_number: int, attempt: int) -> Path:
        """Folder of what was received for an attempt of a round, a file a site."""
        return self.spooled_round(round_number) / f"{attempt:04d}"

    def frame(self, round_number: int, attempt: int, name: str) -> Path:
        """A word of an attempt: ``cohort``, ``arrived``, ``checked``, or with a site's name its REVEAL or shares."""
        return self.spooled(round_number, attempt) / f"{name}.frame"

    def amendment(self, key: str) -> Path:
        """The amendment that waits and follows the key of that id."""
        return self.path / "amendments" / f"{key}.sealed"

    @property
    def pause(self) -> Path:
        """There while the coordinator's people let no round begin."""
        return self.path / "pause"

    @property
    def lobby(self) -> Path:
        """There while the first round waits until all are ready."""
        return self.path / "lobby"

    @property
    def end(self) -> Path:
        """There once the coordinator's people have ended the run."""
        return self.path / "end"

    @property
    def authority(self) -> Path:
        """Fingerprints of the authority with which the run was first served."""
        return self.path / "authority"

    @property
    def rounds(self) -> Path:
        """How many rounds the run is to have, once the coordinator's people want more than the study's."""
        return self.path / "rounds"

    @property
    def revealed(self) -> Path:
        """Whose sum was fixed in the last round that was given up after that."""
        return self.path / "revealed"

    @property
    def told(self) -> Path:
        """Who knows that the run is over."""
        return self.path / "told"


@dataclass(frozen=True)
class StateFolder:
    """A state folder of either kind, which may be there or not.

    Args:
        path: the folder.

    Raises:
        StateFormatError: it is of a layout that this program does not know.
    """

    path: Path
    _mode: ClassVar[int] = 0o755

    def __post_init__(self) -> None:
        # Here, so that nothing can reach into a folder that it would misread.
        try:
            found = self._format.read_text(encoding="ascii", errors="replace").strip()[:20]
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise StateFormatError(f"{self._format}: cannot be read ({error.strerror}); expected it so") from error
        if found != str(FORMAT):
            raise StateFormatError(
                f"{self.path}: a state folder of layout {found!r}; this program reads layout {FORMAT} and folders "
                "that name none: use the version of secfacmic that wrote it, or a newer one"
            )

    def begin(self) -> None:
        """Make the folder, and name its layout in it.

        Raises:
            StorageError: it cannot be made.
        """
        make_folder(self.path, self._mode)
        if self.path.stat().st_mode & 0o777 & ~self._mode:
            self.path.chmod(self._mode)
        if not self._format.exists():
            write_durable(self._format, f"{FORMAT}\n".encode())

    def begun(self) -> bool:
        """Whether a server or a site was here: anything lies in it that only they, or what sets them up, leave."""
        site, server = SiteState(self.path), ServerState(self.path)
        own = (server.key, server.certificates, site.keys, site.accepted)
        return any(path.exists() for path in (self._format, self._run, self.status, self.runs, self.closed, *own))

    @property
    def _format(self) -> Path:
        return self.path / "format"

    @property
    def lock(self) -> Path:
        """Held by the process that uses the folder."""
        return self.path / LOCK

    @property
    def closed(self) -> Path:
        """The mark that the study is closed here."""
        return self.path / "closed"

    @property
    def ledger_heads(self) -> Path:
        """The newest privacy-ledger head of every site."""
        return self.path / "ledger_heads.json"

    @property
    def status(self) -> Path:
        """Where the process stands."""
        return self.path / "status.json"

    @property
    def metrics_token(self) -> Path:
        """The token by which the process's figures may be read."""
        return self.path / "metrics.token"

    @property
    def logs(self) -> Path:
        """Folder of logs."""
        return self.path / "log"

    def log(self, name: str) -> Path:
        """A process's log."""
        return self.logs / f"{name}.jsonl"

    @property
    def runs(self) -> Path:
        """Folder of the runs."""
        return self.path / "runs"

    def run_folders(self) -> Iterator[Path]:
        """Folders of the runs that are there, by id."""
        yield from sorted(self.runs.glob("*"))

    def begun_runs(self) -> Iterator[Path]:
        """Folders of the runs that have a genesis here, by id."""
        for folder in self.run_folders():
            if record_file(RunState(folder).journal, 0).exists():
                yield folder

    @property
    def current_run(self) -> str | None:
        """Id of the run that the folder is in, None before the first."""
        return self._run.read_text(encoding="ascii", errors="replace").strip() if self._run.is_file() else None

    def enter_run(self, run: str) -> None:
        """Name the run that the folder is in from now on, durably.

        Raises:
            StorageError: it cannot be written.
        """
        write_durable(self._run, run.encode())

    @property
    def _run(self) -> Path:
        return self.path / "run"


class SiteState(StateFolder):
    """A site's state folder, for the site's own user only."""

    _mode: ClassVar[int] = 0o700

    def run(self, run: str) -> SiteRun:
        """The folder of the run of that id."""
        return SiteRun(self.runs / run)

    @property
    def keys(self) -> Path:
        """Folder of the study's sealed keys, a file an epoch."""
        return self.path / "keys"

    @property
    def accepted(self) -> Path:
        """Folder of the studies that were accepted here."""
        return self.path / "accepted"

    @property
    def ledger(self) -> Path:
        """Folder of a privacy ledger of version 0.1."""
        return self.path / "privacy"

    @property
    def features(self) -> Path:
        """The feature cache."""
        return self.path / "features.sqlite"

    @property
    def forgotten(self) -> Path:
        """The list of forgotten patients."""
        return self.path / "forgotten.json"

    @property
    def sent(self) -> Path:
        """The list of all that left the site."""
        return self.path / "sent.jsonl"

    @property
    def drill(self) -> Path:
        """Which attacks were tried on the installation, and what came of them."""
        return self.path / "drill.json"

    @property
    def adapter(self) -> Path:
        """The adapter, after the last round."""
        return self.path / ADAPTER

    @property
    def calibration(self) -> Path:
        """The adapter's temperature at this site."""
        return self.path / CALIBRATION

    @property
    def summary(self) -> Path:
        """The adapter's figures at this site."""
        return self.path / SUMMARY


class ServerState(StateFolder):
    """A server's state folder."""

    def run(self, run: str) -> ServerRun:
        """The folder of the run of that id."""
        return ServerRun(self.runs / run)

    @property
    def key(self) -> Path:
        """The coordinator's signing key."""
        return self.path / "coordinator.key"

    @property
    def certificates(self) -> Path:
        """Folder of the server's certificate."""
        return self.path / "tls"
