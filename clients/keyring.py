"""What makes a site a member of a study: its identity, and the study's sealed keys, taken, opened and destroyed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from secure_fed.clients.sitefile import SiteFile
from secure_fed.core.errors import KeyFileError, SiteFileError
from secure_fed.core.layout import SEALED, sealed_key
from secure_fed.core.storage import make_folder, sync_folder, write_durable
from secure_fed.privacy.ckks import StudySecret
from secure_fed.privacy.keys import Identity, load_identity, open_sealed_key
from secure_fed.protocol.records import Chain, RecordFolder
from secure_fed.protocol.sealed_key import SealedKeyHeader, check_sealed_key
from secure_fed.protocol.signing import PRIVATE, ZERO_DIGEST
from secure_fed.protocol.study import AgreedStudy
from secure_fed.protocol.study_tables import Member


class KeyRing:
    """Sealed key files in a folder, one an epoch; what they hold is opened in memory only.

    Args:
        folder: made with the first key, 0700.
        agreed: the study.
        identity: the site's.
    """

    def __init__(self, folder: Path, agreed: AgreedStudy, identity: Identity) -> None:
        self._folder = folder
        self._agreed = agreed
        self._identity = identity
        self._opened: dict[str, StudySecret] = {}
        self._read: list[Path] = []
        self._headers: dict[int, SealedKeyHeader] = {}

    @property
    def headers(self) -> dict[int, SealedKeyHeader]:
        """Headers of the keys held, by epoch in ascending order; a key may arrive while the site runs.

        Raises:
            KeyFileError: a file is damaged or of another study.
        """
        paths = sorted(self._folder.glob(SEALED))
        if paths != self._read:
            headers = [check_sealed_key(path.read_bytes(), self._agreed) for path in paths]
            self._headers = {header.epoch: header for header in headers}
            self._read = paths
        return self._headers

    @property
    def newest(self) -> tuple[int, str]:
        """Epoch and id of the newest key; 0 and zeros before the first."""
        epoch = max(self.headers, default=0)
        return epoch, self.headers[epoch].key if epoch else ZERO_DIGEST

    def accept(self, sealed: bytes) -> SealedKeyHeader:
        """Store a sealed key after checking maker, study, epoch, and that this site can open it.

        Raises:
            KeyFileError: refused; what the site held stays.
        """
        header = check_sealed_key(sealed, self._agreed)
        epoch, key = self.newest
        if header.epoch < epoch or (header.epoch == epoch and header.key != key):
            raise KeyFileError(
                f"sealed key: epoch {header.epoch}, key {header.key[:16]}; this site holds epoch {epoch}, "
                f"key {key[:16]}; an older or a second key of an epoch is refused"
            )
        self._opened[header.key] = open_sealed_key(sealed, self._agreed, self._identity)
        make_folder(self._folder, 0o700)
        write_durable(self._file(header.epoch), sealed, PRIVATE)
        return header

    def holds(self, key: str) -> bool:
        """Whether the key of that id is here."""
        return any(header.key == key for header in self.headers.values())

    def secret(self, key: str) -> StudySecret:
        """Open the key of that id.

        Raises:
            KeyFileError: it is not here.
        """
        if key not in self._opened:
            epochs = [epoch for epoch, header in self.headers.items() if header.key == key]
            if not epochs:
                raise KeyFileError(f"key {key[:16]} is not here; take its sealed key file: secfacmic keys accept")
            sealed = self._file(epochs[0]).read_bytes()
            self._opened[key] = open_sealed_key(sealed, self._agreed, self._identity)
        return self._opened[key]

    def may_begin(self, key: str) -> bool:
        """Whether a run may begin under a key: the newest, or one that the newest replaced in its run.

        A key that replaced another goes on with that one's run and begins none. A site that joins late lacks the older
        keys; it may still follow their run, without opening anything.
        """
        newest = max(self.headers, default=0)
        known = {header.key: header for header in self.headers.values()}
        current = self.headers[newest].key if newest else ZERO_DIGEST
        while current in known:
            if current == key:
                return known[key].previous == ZERO_DIGEST
            current = known[current].previous
        return current != ZERO_DIGEST and not self.holds(key)

    def destroy_before(self, key: str) -> None:
        """Destroy all keys older than this one."""
        held = dict(self.headers)
        (newest,) = (epoch for epoch, header in held.items() if header.key == key)
        for epoch, header in held.items():
            if epoch < newest:
                self._opened.pop(header.key, None)
                self._file(epoch).unlink()
        sync_folder(self._folder)

    def joined(self, name: str) -> Member | None:
        """The site of that name as a key held here lets it join, if one does."""
        return _joined(reversed(self.headers.values()), name)

    def _file(self, epoch: int) -> Path:
        return sealed_key(self._folder, epoch)


class Membership(NamedTuple):
    """A site's place in a study.

    Attributes:
        identity: its private keys.
        keys: the study's sealed keys that it holds.
        site: itself, as the study lists it or as a key that it holds lets it join.
    """

    identity: Identity
    keys: KeyRing
    site: Member


def membership(file: SiteFile, agreed: AgreedStudy) -> Membership:
    """Open a site's identity and keys, and find it in a study under this identity. Changes nothing.

    Args:
        file: its ``site.toml``, paths absolute.
        agreed: the study.

    Raises:
        KeyFileError: the identity cannot be read, or a key that the site holds is damaged or of another study.
        StudyError: neither the study, nor a key that it holds or has held in its run, has a site of that name.
        SiteFileError: the study knows that site by another identity.
    """
    identity = load_identity(Path(file.identity), file.site)
    keys = KeyRing(file.state_folder.keys, agreed, identity)
    listed = {site.name: site for site in agreed.study.sites}
    site = (
        listed.get(file.site) or keys.joined(file.site) or _joined_before(file, agreed) or agreed.study.site(file.site)
    )
    if identity.keys != site.keys:
        raise SiteFileError(
            f"{file.identity}: not the keys that the study names for site {file.site}; use the identity folder "
            "whose public file went to the coordinator"
        )
    return Membership(identity, keys, site)


def _joined_before(file: SiteFile, agreed: AgreedStudy) -> Member | None:
    """A site as its copy of the journal says that it joined: the key that let it in was destroyed once a newer one was
    in force."""
    run = file.state_folder.current_run
    if run is None:
        return None
    records = RecordFolder(file.state_folder.run(run).journal).replay(Chain(agreed))
    amendments = [record.amendment for record in records if record.amendment is not None]
    return _joined(reversed(amendments), file.site)


def _joined(newest_first: Iterable[SealedKeyHeader], name: str) -> Member | None:
    return next((site for header in newest_first for site in header.added if site.name == name), None)
