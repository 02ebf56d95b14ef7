"""What a site agrees to before it takes part, in words, and the signed notes of who agreed and when.

``STATE/accepted/STUDY_ID.N.signed``  a note: a signed frame whose payload is what was shown; the last is in force,
                                      none is ever replaced
``STATE/accepted/STUDY_ID.toml``      the study's file as it was accepted, to compare a later one with
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

from pydantic import StringConstraints

from secure_fed.clients.budget import has_budget, ledger_folder
from secure_fed.clients.sitefile import SiteFile
from secure_fed.core.canonical import canonical_json
from secure_fed.core.errors import LedgerError, NotAcceptedError
from secure_fed.core.layout import SEALED, acceptance_note
from secure_fed.core.storage import make_folder, write_durable
from secure_fed.core.tomlfile import to_toml
from secure_fed.privacy.keys import Identity
from secure_fed.privacy.ledger import Ledger
from secure_fed.protocol.envelope import MAX_HEADER, EnvelopeHeader
from secure_fed.protocol.packing import wire
from secure_fed.protocol.records import Chain, RecordFolder
from secure_fed.protocol.rounds import RoundReply
from secure_fed.protocol.sealed_key import read_sealed_file
from secure_fed.protocol.signing import (
    SIGNATURE_BYTES,
    Count,
    SignedHeader,
    check_payload,
    parse_header,
    payload_fields,
    sign_frame,
    split_frame,
    verify_signature,
)
from secure_fed.protocol.study import AgreedStudy, Study
from secure_fed.protocol.study_tables import Hex64, Name

MAGIC = b"SFP2"
MAX_ACCEPTANCE_HEADER = 2048

LETTERS = 120
"""Of the name of who accepts, at most."""

Person = Annotated[str, StringConstraints(pattern=rf"^[^\x00-\x1f]{{1,{LETTERS}}}$")]

REPLY_WORDS = {
    "site": "its name, by the key that opens the connection",
    "code": "one word of a fixed list: present, ready, update, revealed, applied, more, acknowledged, refused-..., "
    "failed-...",
    "run": "the run it is in, 64 hex digits",
    "position": "how many journal records it has, a number",
    "attestation": "a keyed digest of the adapter that all sites hold, 64 hex digits; the server lacks the key",
    "envelope": "the signed word that the code names: that it is there, with the digest of this acceptance, whether "
    "the study's key is here, version, clock and speed of the line; that it is ready; the update, as above; two "
    "numbers that follow from its encrypted bytes; that a key rotation was applied; with pads, that its shares are "
    "good, the same two numbers of another site's encrypted bytes, and the seed of its own mask once the sum is fixed",
    "carried": "with pads: encrypted shares of that seed, one for each other site; and, of a site that is gone after "
    "the sum was fixed, its share of that one's seed",
}
"""Every field of a reply, and what it says."""

HEADER_WORDS = {
    "version": "of the format",
    "study": "the study's digest",
    "run": "the run's id",
    "head": "digest of the journal record on which it trained",
    "key": "id of the key in force",
    "amendment": "how many key rotations were applied",
    "round": "which round",
    "cohort": "which sites take part in this attempt, as a digest of their signed words",
    "attempt": "which attempt of it",
    "site": "its name",
    "values": "how many numbers the update has: the same for every site",
    "seed": "random digits from which half of the ciphertext follows; zeros without encryption",
    "ledger_seq": "how many updates its privacy ledger has paid for in this study; 0 without a budget",
    "ledger_head": "salted digest of the ledger's entry for the last of them; zeros without a budget",
    "ledger_links": "numbers and salted digests of earlier ones, so that a copied ledger is noticed",
    "hidden": "with pads, digests of the seed of its own mask and of the shares it dealt of it",
    "size": "bytes of the update",
    "payload": "digest of the update as it is sent",
}
"""Every field that an update says in clear, and what it says."""

NEVER = "images, features, file names, patient ids, labels, losses, error texts, the contents of site.toml"
NEVER_ALONE = "class counts, numbers of images or patients, metrics of this site"
"""What may be inside encrypted sums over all sites, and is nowhere else; what is, stands in the terms."""


AGAIN = (
    "again: a further run of a study that this site has taken part in. Its sums are of the same data as those of the "
    "runs before. Whoever has two sums that differ by one site has, without a privacy budget, nearly that site's update"
)
"""What a further run means, to be shown to who accepts it."""


def as_of_key(file: SiteFile, agreed: AgreedStudy) -> dict[str, Any]:
    """What the newest sealed key here says of a study in which hospitals have joined or left.

    To be shown beside the terms, which are the study's: who joins or leaves is accepted by other words.

    Args:
        file: its ``site.toml``.
        agreed: the study.

    Returns:
        ``members_now``, whom it is for, None without a key; ``rounds_left``, how many of its run's ``rounds_now`` were
        left when it was made, both None if it replaced no other.

    Raises:
        KeyFileError: it is damaged, or of another study.
    """
    newest = max(file.state_folder.keys.glob(SEALED), default=None)
    if newest is None:
        return dict.fromkeys(("members_now", "rounds_left", "rounds_now"))
    header, _ = read_sealed_file(newest, agreed)
    closed, rounds = header.rounds or (None, None)
    left = None if closed is None or rounds is None else max(0, rounds - closed)
    return {"members_now": list(header.recipients), "rounds_left": left, "rounds_now": rounds}


def again_words(file: SiteFile, agreed: AgreedStudy) -> list[str]:
    """What a further run means for this site: how its members differ from the last run's, and what both runs' sums
    together reveal without a budget.

    Args:
        file: its ``site.toml``, with the budget it will run under.
        agreed: the study.

    Raises:
        RecordError: the copy of the last run's journal here is damaged.
    """
    last = file.state_folder.current_run
    if last is None:
        return [AGAIN]
    chain, summed = Chain(agreed), set[str]()
    for record in RecordFolder(file.state_folder.run(last).journal).replay(chain):
        summed |= {header.site for header in record.contributors}
    members = {site.name for site in agreed.study.sites if site.role == "train"}
    new, gone = sorted(members - summed), sorted(summed - members)
    lines = [AGAIN, f"the last run, {last[:16]}: {chain.round} rounds, sums over {_names(sorted(summed))}"]
    lines.append(f"the next run can be over {_names(sorted(members))}: new {_names(new)}, gone {_names(gone)}")
    differ = [*new, *gone]
    if not differ:
        lines.append(
            "the same sites; should one of them be missing from a round, the difference of that round's sum and the "
            "last run's tells nearly its update"
        )
    elif len(differ) == 1:
        lines.append(f"the two runs differ by {differ[0]} alone: their sums together tell nearly its update")
    else:
        lines.append(
            f"the two runs differ by {_names(differ)}: their sums together tell nearly the sum of their updates"
        )
    if has_budget(file):
        lines.append("this site's own updates are noised under its privacy budget, whatever is added or taken away")
    else:
        lines.append("this site has no privacy budget: nothing but the other sites hides its update in either sum")
    return lines


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


_ACCEPT = "secfacmic site accept STUDY --site site.toml"
_RESTORE = f"restore the folder from a backup; or, if what was accepted is lost, remove it and accept anew: {_ACCEPT}"


class AcceptanceHeader(SignedHeader):
    """One acceptance.

    Attributes:
        study: the study's id.
        site: who takes part.
        by: who accepted, as they call themselves.
        accepted_ms: the site's clock, milliseconds since 1970.
        number: of this note among the site's of this study, from 1.
        runs: in how many runs of the study the site may take part.
    """

    version: Literal[2]
    study: Hex64
    site: Name
    by: Person
    accepted_ms: Count
    number: Count
    runs: Count


def terms(file: SiteFile, agreed: AgreedStudy, rounds: int | None = None) -> dict[str, Any]:
    """What taking part means for this site, as a JSON document.

    Args:
        file: its ``site.toml``, with the budget it will run under.
        agreed: the study.
        rounds: of how many, if the run is to have more than the study says.
    """
    study = agreed.study
    rounds = study.rounds if rounds is None else rounds
    payload = wire(study.mode, agreed.lanes).payload_bytes
    observes = file.observes(study)
    budget = None if observes else _budget(file)
    counts = study.encoding.share_validation and not observes and not study.method.sums
    counted = counts or (study.method.sums and not observes)
    padded = study.pads and not observes
    return {
        "study": study.name,
        "study_id": study.id,
        "site": file.site,
        "role": "observer" if observes else "train",
        "mode": study.mode,
        "rounds": rounds,
        "leaves": {
            "updates": 0 if observes else rounds,
            "update_bytes": payload,
            "update_header_bytes": 8 + MAX_HEADER + SIGNATURE_BYTES,
            "update_values": agreed.lanes.values,
            "update_bits": study.encoding.bits,
            "validation_counts": counts,
            "statistics": [] if observes or not study.method.sums else _statistics(agreed, budget is not None),
            "reply_fields": {
                field.name: REPLY_WORDS[field.name]
                for field in dataclasses.fields(RoundReply)
                if (field.name != "envelope" or not observes) and (field.name != "carried" or padded)
            },
            "update_fields": {
                name: HEADER_WORDS[name]
                for name in EnvelopeHeader.model_fields
                if not observes and (name != "hidden" or padded)
            },
            "never": NEVER if counted else f"{NEVER}; {NEVER_ALONE}",
            "never_alone": NEVER_ALONE if counted else "",
        },
        "budget": budget,
        "policy": policy(file),
        "members": [
            {
                "name": member.name,
                "role": member.role,
                "weight": member.weight,
                "key_maker": member.name == study.key_maker,
            }
            for member in study.sites
        ],
        "min_sites": study.min_sites,
        "quorum": dataclasses.asdict(study.quorum(study.sites)),
    }


def _budget(file: SiteFile) -> dict[str, Any] | None:
    """The budget that the site will run under: of its file, else the one that its ledger remembers."""
    if file.privacy is not None:
        return {"epsilon": file.privacy.epsilon, "delta": file.privacy.delta, "unit": file.data.unit}
    if not Ledger.exists(ledger_folder(file)):
        return None
    try:
        account = Ledger(ledger_folder(file)).account
    except LedgerError:
        return None  # no round is paid by it: the site refuses to start for that
    return {"epsilon": account.epsilon, "delta": account.delta, "unit": account.unit}


_MOST_NOISED = 128
"""Dimensions above which one sum of a site with a budget is warned of (docs/results/brain_mri.md)."""


def _statistics(agreed: AgreedStudy, budget: bool) -> list[str]:
    """What a site says in a study of sums, and what the sums disclose."""
    study, basis = agreed.study, agreed.initial.basis
    if not study.method.one_sum:
        return _around_centroids(study, budget)
    assert basis is not None, "study new makes one for each method that uses one"
    lines = [
        f"round 1: patients by class, the sums of their features by class and of the products of features, in "
        f"{basis.dimensions} dimensions; each patient counts 1",
    ]
    if study.rounds > 1:
        lines.append(
            "round 2: nothing but zeros, as histograms would cost more budget than they tell"
            if budget
            else "round 2: histograms of how validation patients, and training patients under heads without them, "
            "fare under each shrinkage; no single image's figures; " + _counted(study)
        )
    if budget and basis.dimensions > _MOST_NOISED:
        lines.append(
            f"warning: under this site's budget the noise lies in {basis.dimensions} dimensions and drowns what tells "
            f'classes apart; expected at most {_MOST_NOISED}: ask for a study with features.basis = "public" and '
            "dimensions = 32"
        )
    if not budget:
        lines += [
            "all sites read the sums over all sites: of a class that one site alone has, they are that site's; the "
            "mean of few patients is nearly a patient's feature, so that a class with fewer than "
            f"{study.method.min_patients} in the sum is left out of the head, though its sum was read",
            "patients' images are given to one such sum and to no other, in any run or study",
        ]
    return lines


def _counted(study: Study) -> str:
    return (
        "nothing but zeros where sites with a budget, which send such, could leave fewer than "
        f"{study.min_sites} without one in a sum"
    )


def _around_centroids(study: Study, budget: bool) -> list[str]:
    last = study.rounds
    lines = [
        f"rounds 1 to {last - 1}: of normal training patients, by each of {study.method.centroids} centroids, the sum "
        "of the patch features nearest to it and their weight; each patient weighs 1"
        + ("" if budget else ", and the number of patients"),
        f"round {last}: nothing but zeros, as a histogram would cost more budget than it tells"
        if budget
        else f"round {last}: a histogram of the largest scores of normal validation patients; {_counted(study)}",
    ]
    if not budget:
        lines += [
            "all sites read the sums over all sites: a centroid's mean over few patients is nearly a patch of one, so "
            f"that one with fewer than {study.method.min_patients} stays where it was, though its sum was read",
            "patients' images are given to one run of such sums and to no other, in any study",
        ]
    return lines


def policy(file: SiteFile) -> dict[str, Any]:
    """What this site demands of any study: the part of ``site.toml`` that names no place on its disk."""
    fields = ("allow_plain", "min_sites", "max_epsilon", "studies", "amendments")
    content = file.model_dump(mode="json", include=set(fields))
    return {**content, "data": {"kind": file.data.kind, "unit": file.data.unit}}


def record_acceptance(
    file: SiteFile, agreed: AgreedStudy, identity: Identity, by: str, *, again: bool = False, rounds: int | None = None
) -> Path:
    """Note durably who accepted a study here, beside the notes before.

    Args:
        file: the site's ``site.toml``, with the budget it will run under.
        agreed: the study.
        identity: the site's.
        by: who accepts.
        again: accept one run more than the site has taken part in.
        rounds: as for :func:`terms`.

    Returns:
        Where the note lies.

    Raises:
        NotAcceptedError: nobody is named, or by what is no name; or ``again`` before there was a run; or a note before
            is damaged.
        StorageError: it cannot be written.
    """
    if not by:
        raise NotAcceptedError(
            f"study {agreed.study.name}: not accepted, and nothing was recorded; to accept what is shown above, give "
            "the name of who does: --by NAME"
        )
    if len(by) > LETTERS or not by.isprintable():
        raise NotAcceptedError(
            f"study {agreed.study.name}: not accepted, and nothing was recorded; the name of who accepts has {len(by)} "
            f"letters, or some that cannot be printed; expected up to {LETTERS} in one line"
        )
    begun = len(list(file.state_folder.begun_runs()))
    if again and not begun:
        raise NotAcceptedError(
            f"study {agreed.study.name}: --again, but site {file.site} has taken part in no run of it yet; expected a "
            "second run to accept: leave --again out"
        )
    before = notes(file.state_folder.accepted, agreed.study.id, file.site, identity.keys.signing)
    payload = canonical_json(terms(file, agreed, rounds))
    header = AcceptanceHeader(
        version=2,
        study=agreed.study.id,
        site=file.site,
        by=by,
        accepted_ms=time.time_ns() // 1_000_000,
        number=len(before) + 1,
        runs=max([1, begun + again, *(note.runs for note, _ in before)]),
        **payload_fields(payload),
    )
    file.state_folder.begin()
    folder = file.state_folder.accepted
    make_folder(folder, 0o700)
    path = acceptance_note(folder, agreed.study.id, header.number)
    write_durable(folder / f"{agreed.study.id}.toml", to_toml(agreed.study).encode())
    write_durable(path, sign_frame(MAGIC, header, identity.signing, payload))
    return path


def check_acceptance(data: bytes, key: str) -> tuple[AcceptanceHeader, dict[str, Any]]:
    """Check a note.

    Args:
        data: the note.
        key: the site's public signing key, 64 hex digits.

    Returns:
        Who accepted what and when, and the terms that were shown.

    Raises:
        NotAcceptedError: it is damaged, or not signed by that key.
    """
    frame = split_frame(MAGIC, data, MAX_ACCEPTANCE_HEADER, NotAcceptedError)
    verify_signature(MAGIC, frame.header, frame.signature, key, NotAcceptedError)
    header = parse_header(frame.header, AcceptanceHeader, NotAcceptedError)
    check_payload(frame, header, NotAcceptedError)
    shown: dict[str, Any] = json.loads(bytes(frame.payload))
    return header, shown


def notes(folder: Path, study: str, site: str, key: str) -> list[tuple[AcceptanceHeader, dict[str, Any]]]:
    """A site's notes of a study, oldest first, as :func:`check_acceptance` gives them.

    Args:
        folder: where they lie.
        study: the study's id.
        site: the site's name.
        key: its public signing key, 64 hex digits.

    Raises:
        NotAcceptedError: one is damaged, of another site or study, not signed by that key, or missing in between.
    """
    found = []
    for number, path in enumerate(sorted(folder.glob(f"{study}.*.signed")), 1):
        try:
            header, shown = check_acceptance(path.read_bytes(), key)
        except NotAcceptedError as error:
            raise NotAcceptedError(f"{path}: {error}; {_RESTORE}") from None
        if (header.study, header.site, header.number) != (study, site, number):
            raise NotAcceptedError(
                f"{path}: note {header.number} of another study or site, or one is missing; expected note {number} of "
                f"site {site}; {_RESTORE}"
            )
        found.append((header, shown))
    return found


def acceptance_digest(file: SiteFile, agreed: AgreedStudy, key: str) -> str:
    """SHA-256 of the newest signed note, which only this site can have made: it tells nobody else what is in it.

    Args:
        file: its ``site.toml``.
        agreed: the study.
        key: the site's public signing key, 64 hex digits.

    Raises:
        NotAcceptedError: nobody accepted this very study here, or other terms.
    """
    header = require_acceptance(file, agreed, key)
    note = acceptance_note(file.state_folder.accepted, agreed.study.id, header.number)
    return hashlib.sha256(note.read_bytes()).hexdigest()


def runs_accepted(file: SiteFile, agreed: AgreedStudy, key: str) -> int:
    """In how many runs of a study this site may take part; 0 before anybody accepted it.

    Raises:
        NotAcceptedError: as :func:`notes`.
    """
    before = notes(file.state_folder.accepted, agreed.study.id, file.site, key)
    return before[-1][0].runs if before else 0


def rounds_accepted(file: SiteFile, agreed: AgreedStudy, key: str) -> int:
    """In how many rounds of a run this site may take part; a later note with fewer takes nothing back.

    Raises:
        NotAcceptedError: as :func:`notes`.
    """
    before = notes(file.state_folder.accepted, agreed.study.id, file.site, key)
    return max((int(shown["rounds"]) for _, shown in before), default=0)


def rounds_to_accept(file: SiteFile, agreed: AgreedStudy, key: str, rounds: int | None) -> int:
    """Of how many rounds the terms are that are to be accepted: those before, or more.

    Args:
        file: its ``site.toml``.
        agreed: the study.
        key: the site's public signing key, 64 hex digits.
        rounds: how many are asked for; None for no more than before.

    Raises:
        NotAcceptedError: fewer than the study has or were accepted before; or its method has a fixed number.
    """
    least = max(agreed.study.rounds, rounds_accepted(file, agreed, key))
    if rounds is not None and (rounds < least or (agreed.study.method.sums and rounds > least)):
        fixed = ", as its method has" if agreed.study.method.sums else " or more"
        raise NotAcceptedError(f"{rounds} rounds of study {agreed.study.name}; expected {least}{fixed}")
    return least if rounds is None else rounds


def require_acceptance(file: SiteFile, agreed: AgreedStudy, key: str) -> AcceptanceHeader:
    """The last note of this very study at this site.

    Args:
        file: its ``site.toml``.
        agreed: the study.
        key: the site's public signing key.

    Raises:
        NotAcceptedError: there is none, or it is not by this site's key; or the site would take part under terms
            weaker than those accepted.
    """
    study, folder = agreed.study, file.state_folder.accepted
    found = notes(folder, study.id, file.site, key)
    if found:
        header, accepted = found[-1]
        changed = weaker(accepted, terms(file, agreed))
        if changed:
            raise NotAcceptedError(
                f"study {study.name}: site {file.site} would take part under weaker terms than {header.by} accepted at "
                f"{when(header.accepted_ms)}:\n  " + "\n  ".join(changed) + "\nexpected these or stricter ones: set "
                f"site.toml and the command back as they were; or, if it is meant, accept anew: {_ACCEPT}"
            )
        return header
    others = sorted(folder.glob("*.toml"), key=lambda other: other.stat().st_mtime)
    if others:
        raise NotAcceptedError(
            f"study {study.name}, id {study.id}: not accepted at site {file.site}; accepted was {others[-1].stem}: "
            f"the study was changed. See what changed with: secfacmic study diff {quote(str(others[-1]))} "
            f"{quote(str(file.study))}; then "
            f"accept it by hand: {_ACCEPT}"
        )
    raise NotAcceptedError(
        f"study {study.name}, id {study.id}: not accepted at site {file.site}; expected somebody's word that what "
        f"leaves is known: {_ACCEPT}"
    )


def weaker(accepted: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Each term that protects the site less than the accepted one, with both values; stricter ones are none.

    Args:
        accepted: the terms in a note.
        now: the terms that would hold.
    """
    found = []
    for path, is_weaker in _WEAKER.items():
        before, after = _at(accepted, path), _at(now, path)
        # What a note says nothing about was not accepted.
        if before is _UNSAID or is_weaker(before, after):
            told = "nothing" if before is _UNSAID else json.dumps(before)
            found.append(f"{path}: accepted {told}, now {json.dumps(after)}")
    return found


_UNSAID = object()


def _at(shown: Any, path: str) -> Any:
    for name in path.split("."):
        if not isinstance(shown, dict) or name not in shown:
            return _UNSAID
        shown = shown[name]
    return shown


def _more(accepted: Any, now: Any) -> bool:
    return bool(now > accepted)


def _less(accepted: Any, now: Any) -> bool:
    return bool(now < accepted)


def _other(accepted: Any, now: Any) -> bool:
    return bool(now != accepted)


def _names_more(accepted: Any, now: Any) -> bool:
    return not set(now) <= set(accepted)


def _limit_raised(accepted: float | None, now: float | None) -> bool:
    return accepted is not None and (now is None or now > accepted)


def _takes_more(accepted: list[str], now: list[str]) -> bool:
    return bool(accepted) and (not now or _names_more(accepted, now))


def _falls(*strictest_first: Any) -> Callable[[Any, Any], bool]:
    return lambda accepted, now: strictest_first.index(now) > strictest_first.index(accepted)


def _budget_weaker(accepted: dict[str, Any] | None, now: dict[str, Any] | None) -> bool:
    if accepted is None:
        return False
    if now is None or _falls("patient", "image")(accepted["unit"], now["unit"]):
        return True
    return bool(now["epsilon"] > accepted["epsilon"] or now["delta"] > accepted["delta"])


_WEAKER: dict[str, Callable[[Any, Any], bool]] = {
    "study_id": _other,
    "members": _other,
    "role": _falls("observer", "train"),
    "mode": _falls("he", "plain"),
    "rounds": _more,
    "min_sites": _less,
    "quorum.needed": _less,
    "quorum.faulty": _less,
    "quorum.collusion": _less,
    "budget": _budget_weaker,
    "policy.allow_plain": _falls(False, True),
    "policy.min_sites": _less,
    "policy.max_epsilon": _limit_raised,
    "policy.studies": _takes_more,
    "policy.amendments": _falls("none", "removals", "all"),
    "policy.data.kind": lambda accepted, now: accepted == "patients" and now != accepted,
    "policy.data.unit": _falls("patient", "image"),
    "leaves.updates": _more,
    "leaves.update_bytes": _more,
    "leaves.update_header_bytes": _more,
    "leaves.update_values": _more,
    "leaves.update_bits": _more,
    "leaves.validation_counts": _falls(False, True),
    "leaves.reply_fields": _names_more,
    "leaves.update_fields": _names_more,
}
"""What an acceptance binds, and when a value is weaker than an accepted one."""


def when(milliseconds: int) -> str:
    """A note's time, UTC."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")
