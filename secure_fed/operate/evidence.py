"""A site's part in a study as one archive, and its check by somebody who has nothing else.

The archive is a plain zip file, the same bytes for the same state. ``manifest.signed`` names every other file with size
and SHA-256 and is signed by the site; what it holds:

``study/``       study.toml and study.safetensors
``journal/RUN/`` the signed records of every run, amendments among them
``accepted/``    who accepted the study, when, and what was shown
``ledger/``      what of the privacy ledger depends on no patient: claim, plans, releases, and what travelled of it
``sent.jsonl``   every message that left the site
``attacks.json``   which attacks were tried on the installation, if any were
``index.html``   all of this for a person to read; the site's own words, like the rest
``policy.json``  what the site demands of a study; ``versions.json`` and ``bom.json`` what it ran (CycloneDX 1.5)
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import ValidationError

from secure_fed.clients.acceptance import notes, policy, when
from secure_fed.clients.budget import ledger_folder
from secure_fed.clients.outgoing_log import SentMessage, read_sent
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.canonical import canonical_json
from secure_fed.core.errors import EvidenceError, RecordError
from secure_fed.core.layout import RECORDS, SiteState
from secure_fed.core.storage import NO_ROOM, durable, exclusive, refuse_foreign, scratch_folder
from secure_fed.core.tomlfile import FileModel
from secure_fed.privacy.accounting import Mechanism, epsilon_spent
from secure_fed.privacy.keys import Identity, load_identity
from secure_fed.privacy.ledger import Ledger
from secure_fed.protocol.envelope import MAGIC as ENVELOPE_MAGIC
from secure_fed.protocol.envelope import EnvelopeHeader
from secure_fed.protocol.journal import find_runs
from secure_fed.protocol.records import Chain, RecordFolder
from secure_fed.protocol.signing import (
    ZERO_DIGEST,
    Count,
    SignedHeader,
    check_payload,
    parse_header,
    payload_fields,
    sign_frame,
    split_frame,
    verify_signature,
)
from secure_fed.protocol.study import AgreedStudy, load_study
from secure_fed.protocol.study_tables import Hex64, Name

_SENT = "sent.jsonl"
"""In an archive, as in a state folder."""

MAGIC = b"SFX2"
MAX_HEADER = 2048
MANIFEST = "manifest.signed"
_DATE = (1980, 1, 1, 0, 0, 0)
_POSITION = re.compile(r"( of | for )?(round \d+ of )?run [0-9a-f]+(: )?")
"""In a release's purpose; the rest says what was released."""

_BLOCK = 2**20


class _ManifestHeader(SignedHeader):
    version: Literal[1]
    study: Hex64
    site: Name


class _Listed(FileModel):
    size: Count
    sha256: Hex64


class _Manifest(FileModel):
    format: Literal[1]
    site: Name
    study: Hex64
    files: dict[str, _Listed]


# --- packing ---


def pack_evidence(folder: Path, into: Path, page: Callable[[dict[str, Any]], str] | None = None) -> dict[str, Any]:
    """Write a site's archive, whole or not at all.

    Args:
        folder: the site's, or its ``site.toml``; the site must not be running.
        into: the archive.
        page: makes ``index.html`` of what :func:`verify_evidence` finds; without it there is none.

    Returns:
        The manifest.

    Raises:
        OutputError: ``into`` is there already, and no archive of this site and study.
        StorageError: the site is running, or the archive cannot be written.
        EvidenceError, RecordError, LedgerError: what is to be packed does not verify.
    """
    file = read_site_file(folder)
    study_path, state = Path(file.study), file.state_folder
    agreed = load_study(study_path)
    refuse_foreign(into, lambda _: _is_of(into, file.site, agreed.study.id))
    identity = load_identity(Path(file.identity), file.site)
    if not state.path.is_dir():
        raise EvidenceError(f"{state.path}: no folder; expected the state of a site that took part in the study")
    with exclusive(state.path):
        parts: dict[str, Path | bytes] = {
            "study/study.toml": study_path,
            "study/study.safetensors": study_path.with_suffix(".safetensors"),
            "policy.json": _json(policy(file)),
            "versions.json": _json(_versions()),
            "bom.json": _json(bill_of_materials()),
        }
        # By their names, as all else: whatever a person has put beside them stays.
        for path in sorted(state.accepted.glob(f"{agreed.study.id}.*")):
            parts[f"accepted/{path.name}"] = path
        for run in find_runs(state.path) if state.current_run is not None else []:
            for path in sorted(run.journal.glob(RECORDS)):
                parts[f"journal/{run.folder.name}/{path.name}"] = path
        ledger = ledger_folder(file)
        if Ledger.exists(ledger):
            # Nothing of the register: who was in which release, and what the fullest spent, tells of single patients.
            parts["ledger/public.json"] = _json(Ledger(ledger).public_summary(agreed.study.id))
        if state.sent.exists():
            data = state.sent.read_bytes()
            parts[_SENT] = data[: data.rfind(b"\n") + 1]
        if state.drill.exists():
            parts["attacks.json"] = state.drill
        if page is not None:
            with scratch_folder() as scratch:
                bare = scratch / "evidence.zip"
                _seal(bare, dict(parts), agreed.study.id, file.site, identity)
                parts["index.html"] = page(verify_evidence(bare)).encode()
        return _seal(into, parts, agreed.study.id, file.site, identity)


def _seal(into: Path, parts: dict[str, Path | bytes], study: str, site: str, identity: Identity) -> dict[str, Any]:
    """Write the archive of these parts with their signed manifest."""
    listed = {name: _listed(part) for name, part in sorted(parts.items())}
    manifest = _Manifest(format=1, site=site, study=study, files=listed).model_dump(mode="json")
    payload = canonical_json(manifest)
    header = _ManifestHeader(version=1, study=study, site=site, **payload_fields(payload))
    parts[MANIFEST] = sign_frame(MAGIC, header, identity.signing, payload)
    _write(into, parts)
    return manifest


def _is_of(path: Path, site: str, study: str) -> bool:
    """Whether a file is an archive of this site and study, by the header of its manifest."""
    try:
        with zipfile.ZipFile(path) as archive:
            frame = split_frame(MAGIC, archive.read(MANIFEST), MAX_HEADER, EvidenceError)
            header = parse_header(frame.header, _ManifestHeader, EvidenceError)
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError, EvidenceError):
        return False
    return (header.site, header.study) == (site, study)


def _write(into: Path, parts: dict[str, Path | bytes]) -> None:
    with durable(into, 0o600) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(parts):
            info = zipfile.ZipInfo(name, _DATE)
            info.external_attr = 0o644 << 16
            part = parts[name]
            with archive.open(info, "w", force_zip64=True) as member:
                if isinstance(part, bytes):
                    member.write(part)
                else:
                    with part.open("rb") as source:
                        shutil.copyfileobj(source, member, _BLOCK)


def _listed(part: Path | bytes) -> _Listed:
    if isinstance(part, bytes):
        return _Listed(size=len(part), sha256=hashlib.sha256(part).hexdigest())
    with part.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return _Listed(size=part.stat().st_size, sha256=digest)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _versions() -> dict[str, str]:
    return {
        "secfacmic": importlib.metadata.version("secfacmic"),
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
    }


def bill_of_materials() -> dict[str, Any]:
    """Every Python package of this environment, as a CycloneDX 1.5 document without serial number and time."""
    found = {}
    for distribution in importlib.metadata.distributions():
        facts = distribution.metadata.json
        name, version = distribution.name, distribution.version
        component = {"type": "library", "name": name, "version": version}
        component["purl"] = component["bom-ref"] = f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"
        terms = str(facts.get("license_expression") or facts.get("license") or "")
        entry: dict[str, Any] = dict(component)
        if terms and "\n" not in terms and len(terms) < 100:
            entry["licenses"] = [{"license": {"name": terms}}]
        found[component["purl"]] = entry
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "components": [found[name] for name in sorted(found)],
    }


# --- checking ---


@dataclass(frozen=True)
class _Journals:
    """What the archive's journals say of the site.

    Attributes:
        runs, records, rounds: how many, in all.
        keys: signing keys that the site has had as a member.
        members: name, role and number of sums of each member of any run, by name.
        own: headers of its updates in sums, with the digest by which the list of sent messages names each.
        together: what sites that pool all they have with the server learn at most, in the round of the smallest quorum.
    """

    runs: int
    records: int
    rounds: int
    keys: set[str]
    members: list[dict[str, Any]]
    own: list[tuple[EnvelopeHeader, str]]
    together: str


def verify_evidence(path: Path, page: Callable[[dict[str, Any]], str] | None = None) -> dict[str, Any]:
    """Check an archive: every digest, the site's signature, journal, acceptance, ledger, and the list of what was sent
    against the updates that the journal names.

    Who holds the archive alone learns that all of it belongs together and that nobody but the site and the coordinator
    made it; whether the study is the one meant says its id.

    Args:
        path: the archive.
        page: what :func:`pack_evidence` makes ``index.html`` with. The site's signature says only that the site wrote
            the page; with this it must also say what the other files say. A page of another version has other words
            and is not compared.

    Returns:
        What was found, in words and figures.

    Raises:
        EvidenceError: the first thing that does not hold.
        StudyError, RecordError, NotAcceptedError: likewise, of the parts.
    """
    with scratch_folder() as folder:
        frame, header, manifest = _unpack(path, folder)
        agreed = load_study(folder / "study" / "study.toml")
        if (agreed.study.id, agreed.study.id) != (manifest.study, header.study) or manifest.site != header.site:
            raise EvidenceError(
                f"{path}: is of study {manifest.study[:16]}, but holds study {agreed.study.id[:16]}; expected one study"
            )
        site = manifest.site
        journals = _journals(folder, agreed, site)
        keys = {key for key in journals.keys if _signed_by(key, frame)}
        if not keys:
            raise EvidenceError(f"{path}: its manifest is not signed by the key that the study names for site {site}")
        (key,) = keys
        acceptances = notes(SiteState(folder).accepted, agreed.study.id, site, key)
        if not acceptances:
            raise EvidenceError(f"{path}: no acceptance of study {agreed.study.id[:16]}; expected one at least")
        accepted, shown = acceptances[-1]
        sent = _sent(folder, journals, site)
        found = {
            "site": site,
            "study": agreed.study.name,
            "study_id": agreed.study.id,
            "accepted_by": accepted.by,
            "accepted": when(accepted.accepted_ms),
            "acceptances": len(acceptances),
            "budget_accepted": shown["budget"],
            "runs_accepted": accepted.runs,
            "all_acceptances": [
                {"by": note.by, "accepted_ms": note.accepted_ms, "runs": note.runs, "budget": terms["budget"]}
                for note, terms in acceptances
            ],
            "mode": agreed.study.mode,
            "together": journals.together,
            "study_rounds": agreed.study.rounds,
            "members": journals.members,
            "runs": journals.runs,
            "records": journals.records,
            "rounds": journals.rounds,
            "updates_in_sums": len(journals.own),
            "messages_sent": len(sent),
            "bytes_sent": sum(row.bytes for row in sent),
            "sent": [row.model_dump(mode="json", include={"time", "round", "code", "bytes", "digest"}) for row in sent],
            "ledger": _ledger(folder, agreed, journals, site),
            "software": _software(folder),
            "drill": _drill(folder),
            "packages": _packages(folder),
        }
        return {**found, "page": None if page is None else _compared(path, folder, found, page(found))}


def _compared(path: Path, folder: Path, found: dict[str, Any], expected: str) -> str:
    """Hold the archive's page against the one that its other files make; says what came of it."""
    page, version, own = folder / "index.html", found["software"]["secfacmic"], _versions()["secfacmic"]
    if not page.exists():
        return "no index.html in it"
    if version != own:
        return f"index.html was made by secfacmic {version}, this is {own}: it was not compared with the files"
    if page.read_bytes() != expected.encode():
        raise EvidenceError(
            f"{path}: index.html is not the page that the other files make; expected it to say what they say: do "
            "not believe the page, and ask the site for an archive packed anew"
        )
    return "index.html says what the files say"


def counted(number: int, noun: str) -> str:
    """As in ``1 run`` and ``2 runs``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def sent_in_words(found: Mapping[str, Any]) -> str:
    """What left the site, of what :func:`verify_evidence` found."""
    if found["updates_in_sums"] and not found["messages_sent"]:
        return (
            "no list of sent messages: the updates in sums went over no network, as in a simulation; a site of a study "
            "over a network has one"
        )
    return f"{counted(found['messages_sent'], 'message')} left this site, {found['bytes_sent']:,} bytes in all"


def in_words(found: dict[str, Any]) -> list[str]:
    """What :func:`verify_evidence` found, a sentence a line."""
    software = ", ".join(f"{name} {value}" for name, value in sorted(found["software"].items()))
    lines = [
        f"site {found['site']}, study {found['study']}, id {found['study_id']}",
        *(
            f"accepted by {one['by']} at {when(one['accepted_ms'])}, for {counted(one['runs'], 'run')} in all, "
            + ("without a privacy budget" if one["budget"] is None else _budget_words(one["budget"]))
            for one in found["all_acceptances"]
        ),
        f"{counted(found['runs'], 'run')} with {counted(found['records'], 'record')} and "
        f"{counted(found['rounds'], 'round')}; {counted(found['updates_in_sums'], 'update')} of this site in sums",
        *(f"member {one['name']}, {one['role']}: in {counted(one['sums'], 'sum')}" for one in found["members"]),
        found["together"],
        sent_in_words(found),
        f"privacy ledger: {found['ledger']}",
        f"software: {software}; {found['packages']} packages in the bill of materials",
        *([found["page"]] if found["page"] else []),
    ]
    if found["drill"] is None:
        return [*lines, "no drill is recorded: attacks on this installation were not tried, or not kept"]
    held = sum(row["held"] for row in found["drill"]["attacks"])
    return [
        *lines,
        f"drill: {held} of {len(found['drill']['attacks'])} attacks held off, with {found['drill']['version']}",
    ]


def _budget_words(budget: dict[str, Any]) -> str:
    return f"epsilon {budget['epsilon']:g} at delta {budget['delta']:g} for each {budget['unit']}"


def _software(folder: Path) -> dict[str, str]:
    """What ran, by name."""
    try:
        found = json.loads(_read(folder, "versions.json"))
        if found["secfacmic"] and all(isinstance(each, str) for each in found.values()):
            return dict(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise EvidenceError(
        "versions.json: malformed; expected the versions that secfacmic evidence packs, as text by name"
    )


def _packages(folder: Path) -> int:
    """How many packages the bill of materials lists."""
    try:
        components = json.loads(_read(folder, "bom.json"))["components"]
        if isinstance(components, list):
            return len(components)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise EvidenceError("bom.json: malformed; expected the bill of materials that secfacmic evidence packs")


def _drill(folder: Path) -> dict[str, Any] | None:
    """The drill's record; None without one."""
    path = folder / "attacks.json"
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        if all({"id", "attacker", "tried", "held"} <= set(row) for row in record["attacks"]) and record["version"]:
            return record
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise EvidenceError("attacks.json: malformed; expected what secfacmic drill --site has kept")


def _unpack(path: Path, folder: Path) -> tuple[Any, _ManifestHeader, _Manifest]:
    """Take the archive apart into a folder, checking every file against the manifest."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            if MANIFEST not in names or len(set(names)) != len(names):
                raise EvidenceError(
                    f"{path}: no {MANIFEST}, or a file twice; expected a file made by secfacmic evidence"
                )
            if any(info.compress_type != zipfile.ZIP_STORED or not _plain(info.filename) for info in infos):
                raise EvidenceError(
                    f"{path}: compressed files or strange names; expected a file made by secfacmic evidence"
                )
            frame = split_frame(MAGIC, archive.read(MANIFEST), MAX_HEADER, EvidenceError)
            header = parse_header(frame.header, _ManifestHeader, EvidenceError)
            check_payload(frame, header, EvidenceError)
            manifest = _Manifest.model_validate_json(bytes(frame.payload))
            strangers = sorted(set(names) ^ {MANIFEST, *manifest.files})
            if strangers:
                raise EvidenceError(
                    f"{path}: {', '.join(strangers[:5])}: in the archive or its manifest, but not in both"
                )
            for info in infos:
                if info.filename == MANIFEST:
                    continue
                target = folder / info.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy, _BLOCK)
                if _listed(target) != manifest.files[info.filename]:
                    raise EvidenceError(f"{path}: {info.filename} is not the file that the manifest names")
    except ValidationError:
        raise EvidenceError(f"{path}: its manifest is malformed; expected a file made by secfacmic evidence") from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise  # of where it is taken apart: no word against the archive
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise EvidenceError(f"{path}: cannot be read ({reason}); expected a file made by secfacmic evidence") from None
    return frame, header, manifest


def _plain(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return "\\" not in name and not name.startswith("/") and ".." not in parts and not name.endswith("/")


def _signed_by(key: str, frame: Any) -> bool:
    try:
        verify_signature(MAGIC, frame.header, frame.signature, key, EvidenceError)
    except EvidenceError:
        return False
    return True


def _journals(folder: Path, agreed: AgreedStudy, site: str) -> _Journals:
    keys = {member.keys.signing for member in agreed.study.sites if member.name == site}
    own: list[tuple[EnvelopeHeader, str]] = []
    runs = records = rounds = 0
    roles = {member.name: member.role for member in agreed.study.sites}
    sums: Counter[str] = Counter()
    quorums = [agreed.study.quorum(agreed.study.sites)]
    for run in sorted((folder / "journal").glob("*")):
        chain = Chain(agreed)
        for record in RecordFolder(run).replay(chain):
            for entry, header in zip(record.header.contributors, record.contributors, strict=False):
                sums[header.site] += 1
                if header.site == site:
                    digest = hashlib.sha256(ENVELOPE_MAGIC + entry.signed[0]).hexdigest()
                    own.append((header, digest))
            if record.header.kind == "aggregate":
                quorums.append(chain.quorum)
            roles |= {member.name: member.role for member in record.members.values()}
            member = record.members.get(site)
            if member is not None:
                keys.add(member.keys.signing)
        if chain.run != run.name:
            raise RecordError(f"journal/{run.name}: its records are of run {chain.run[:16]}")
        runs, records, rounds = runs + 1, records + chain.length, rounds + chain.round
    members = [{"name": name, "role": role, "sums": sums[name]} for name, role in sorted(roles.items())]
    weakest = min(quorums, key=lambda quorum: quorum.needed)
    return _Journals(runs, records, rounds, keys, members, own, weakest.claim)


def _sent(folder: Path, journals: _Journals, site: str) -> list[SentMessage]:
    path = folder / _SENT
    if not path.exists():
        return []  # nothing went over a network: a simulation
    rows = read_sent(path.read_bytes(), _SENT)
    listed = {row.envelope for row in rows}
    for header, digest in journals.own:
        if digest not in listed:
            raise EvidenceError(
                f"{_SENT}: lacks the update of round {header.round} in run {header.run[:16]}, which the journal has of "
                f"{site}; expected every message that left: the list was cut, or the site ran elsewhere too"
            )
    return rows


def _ledger(folder: Path, agreed: AgreedStudy, journals: _Journals, site: str) -> str:
    """What was declared and released, and that every head which travelled is in it."""
    path = folder / "ledger" / "public.json"
    travelled = {(header.ledger_seq, header.ledger_head) for header, _ in journals.own}
    if not path.exists():
        if any(seq for seq, _ in travelled):
            raise EvidenceError(f"ledger: not in the archive, but {site} sent updates that a ledger paid for")
        return "none"
    try:
        facts = json.loads(path.read_bytes())
        heads = [ZERO_DIGEST, *facts["anchors"]]
        delta, budget = float(facts["delta"]), float(facts["epsilon_budget"])
        releases = [Mechanism(one["sensitivity"], one["noise_std"], one["steps"]) for one in facts["releases"]]
        kinds = Counter(_POSITION.sub("", one["purpose"]) or "clipped gradients" for one in facts["releases"])
        declared = [float(plan["epsilon"]) for plan in facts["plans"]]
        said = float(facts["epsilon_at_most"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise EvidenceError(f"{path.name}: no public part of a ledger; expected what evidence packs") from None
    for seq, head in travelled:
        if seq >= len(heads) or heads[seq] != head:
            raise EvidenceError(f"ledger: paid for no update {seq} with head {head[:16]}, which {site} sent")
    at_most = min(budget, epsilon_spent(releases, delta))
    if abs(at_most - said) > 1e-9 or max(declared, default=0.0) > budget * (1 + 1e-6):
        raise EvidenceError(
            f"ledger: its releases cost a patient who was in all of them epsilon {at_most}, with {budget:g} at most; "
            f"its summary says {said}, and its runs declare {declared}"
        )
    of = "".join(f", {number} of {kind}" for kind, number in sorted(kinds.items()))
    return (
        f"{counted(len(declared), 'run')} declared, {counted(len(releases), 'release')}{of}; "
        f"{counted(len(heads) - 1, 'update')} in this study; "
        f"epsilon at most {at_most:.4f} of {budget:g} for a patient at delta {delta:g}"
    )


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError:
        raise EvidenceError(f"{name}: not in the archive; expected it in a file made by secfacmic evidence") from None
