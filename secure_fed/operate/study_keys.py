"""The study's key at a site: made and sealed to all by the key maker, taken by the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from secure_fed.clients.keyring import KeyRing
from secure_fed.clients.replica import Replica
from secure_fed.clients.sitefile import read_site
from secure_fed.core.errors import KeyFileError
from secure_fed.core.storage import refuse_foreign, write_durable
from secure_fed.privacy.keys import Identity, PublicIdentity, create_sealed_key, load_identity
from secure_fed.protocol.sealed_key import KEY_MAGIC, SealedKeyHeader, read_sealed_file
from secure_fed.protocol.signing import ZERO_DIGEST
from secure_fed.protocol.study import AgreedStudy
from secure_fed.protocol.study_tables import Member
from secure_fed.transport.certificates import root_fingerprint


def create_key(site: Path, study: Path, into: Path) -> SealedKeyHeader:
    """Make a key for a new run and seal it to all sites; at the study's key maker only.

    Args:
        site: the key maker's ``site.toml``.
        study: the study; must be the one that the site is for.
        into: where the sealed key file is written.

    Raises:
        SiteFileError: the study is another.
        KeyFileError: this site makes no keys.
        OutputError: ``into`` is there already, and no sealed key file.
        StorageError: the file cannot be written; then the site does not hold the key either.
    """
    agreed, identity, ring = _open(site, study)
    return _keep(ring, create_sealed_key(agreed, identity, ring.newest[0] + 1), into)


def rotate_key(
    site: Path,
    study: Path,
    into: Path,
    add: Sequence[PublicIdentity] = (),
    remove: Sequence[str] = (),
    authority: Path | None = None,
) -> SealedKeyHeader:
    """Make the key that replaces the one of the current run; at the study's key maker only.

    Args:
        site, study, into: as for :func:`create_key`.
        add: sites that join, to train; one that the study lists and that has left comes back with its weight there.
        remove: names of sites that leave.
        authority: certificate of the authority that sites trust alone from then on, if it changes.

    Raises:
        KeyFileError: also if the members cannot change so, or this site has no record of the run yet.
        CertificateError: ``authority`` is not one root's, or not valid now.
        SiteFileError, OutputError, StorageError: as for :func:`create_key`.
    """
    file, agreed = read_site(site, study)
    here = Replica(file, agreed)
    chain = here.state.chain
    if chain.run == ZERO_DIGEST:
        raise KeyFileError(
            f"{file.state}: no record of a run yet, so that no key of it can be replaced; expected its first, "
            "which secfacmic client fetches when it connects: rotate then; before a run: secfacmic keys create"
        )
    weights = {site.name: site.weight for site in agreed.study.sites}
    joining = tuple(Member(name=each.name, keys=each.keys, weight=weights.get(each.name, 1.0)) for each in add)
    epoch, rounds = here.keys.newest[0] + 1, (chain.round, chain.rounds)
    trusted = None if authority is None else root_fingerprint(authority)
    sealed = create_sealed_key(
        *(agreed, here.identity, epoch, chain.key, chain.members, joining, tuple(remove), rounds, trusted)
    )
    chain.amended(sealed)  # as everybody will; here before anybody holds it
    return _keep(here.keys, sealed, into)


def accept_key(site: Path, sealed: Path) -> SealedKeyHeader:
    """Take a sealed key at a site, after checking its maker, study and epoch.

    Args:
        site: its ``site.toml``.
        sealed: the sealed key file.

    Raises:
        KeyFileError: refused; what the site held stays.
    """
    agreed, _, ring = _open(site)
    return ring.accept(read_sealed_file(sealed, agreed)[1])


def held_keys(site: Path) -> dict[int, SealedKeyHeader]:
    """The headers of the keys that a site holds, by epoch.

    Args:
        site: its ``site.toml``.

    Raises:
        KeyFileError: one is damaged or of another study.
    """
    *_, ring = _open(site)
    return ring.headers


def _open(site: Path, study: Path | None = None) -> tuple[AgreedStudy, Identity, KeyRing]:
    file, agreed = read_site(site, study)
    identity = load_identity(Path(file.identity), file.site)
    return agreed, identity, KeyRing(file.state_folder.keys, agreed, identity)


def _keep(ring: KeyRing, sealed: bytes, into: Path) -> SealedKeyHeader:
    """Write the file for the others first: a key that only the maker holds would be of no use."""
    refuse_foreign(into, lambda head: head.startswith(KEY_MAGIC))
    write_durable(into, sealed)
    return ring.accept(sealed)
