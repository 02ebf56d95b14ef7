"""Pages that a person signs or files: what a site agrees to, and what an evidence archive holds.

Each is one file that loads nothing and runs nothing, and prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secure_fed.clients.acceptance import when
from secure_fed.operate.evidence import counted, sent_in_words
from secure_fed.report.page import fill, source


@dataclass(frozen=True)
class Block:
    """A part of a page: a title, sentences, points, and a table."""

    title: str
    text: Sequence[str] = ()
    items: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def _changes(terms: Mapping[str, Any]) -> Iterator[str]:
    """Who has joined or left since the study was made, and in how many rounds whoever joins takes part."""
    now = terms.get("members_now")
    if now is None or sorted(now) == sorted(member["name"] for member in terms["members"]):
        return
    yield f"Hospitals have joined or left since: by the newest key the members are {', '.join(now)}."
    if terms["rounds_left"] is not None:
        yield (
            f"When that key was made {terms['rounds_left']} of {terms['rounds_now']} rounds were left: a hospital that "
            "joins with it sends at most so many updates."
        )


def consent_page(terms: Mapping[str, Any]) -> str:
    """What taking part means, to be read, printed and signed.

    Args:
        terms: as :func:`secure_fed.clients.acceptance.terms` gives them.
    """
    leaves, budget = terms["leaves"], terms["budget"]
    observer = not leaves["updates"]
    blocks = [
        Block("What leaves this hospital", ("It goes to the study's server, and to nobody else.",), _leaves(terms)),
        Block("What never leaves it", items=_never(leaves)),
        Block("Privacy budget", _budget(budget, observer)),
        Block(
            "Who takes part",
            (
                f"Sums are made of at least {terms['min_sites']} hospitals; {terms['quorum']['needed']} must agree to "
                "each of them.",
                *_changes(terms),
            ),
            columns=("hospital", "role", "share in the average", ""),
            rows=[
                (
                    member["name"],
                    "contributes" if member["role"] == "train" else "observes",
                    f"{member['weight']:g}" if member["role"] == "train" else "none",
                    "makes the study's key" if member["key_maker"] else "",
                )
                for member in terms["members"]
            ],
        ),
        Block("What is protected against whom", items=threats(terms)),
        Block(
            "Identity of what is accepted",
            (
                f"Study {terms['study']}, digest {terms['study_id']}. Another digest is another study, and needs "
                "another acceptance. The software refuses to run under weaker terms than those of this page.",
            ),
        ),
    ]
    return _page(
        f"Taking part in {terms['study']}",
        f"secfacmic: {terms['site']}",
        f"{terms['site']} {'only observes' if observer else 'contributes'}, for {counted(terms['rounds'], 'round')}.",
        blocks,
        "This page records nothing by itself: secfacmic site accept STUDY --site SITE --by NAME does.",
        signature=terms["site"],
    )


def threats(terms: Mapping[str, Any]) -> tuple[str, ...]:
    """The threat model in five lines, as this study has it; docs/threat-model.md has it whole."""
    server = "The coordinator's server sees who takes part, when and how much is sent. "
    pads = terms["quorum"]["collusion"]
    if terms["mode"] != "he":
        server += "Nothing is encrypted: it reads every contribution, and the model."
        together = "Nothing hides a contribution from whoever works together with the server."
    else:
        server += "It adds encrypted numbers that it cannot open, and learns neither images nor the model."
        if not pads:
            together = (
                "A hospital that works together with the server can open another hospital's single contributions: the "
                "members of the study trust one another not to."
            )
        else:
            some = "A hospital that works" if pads == 1 else f"Up to {pads} hospitals that work"
            together = (
                f"{some} together with the server cannot open another hospital's single contribution: without a "
                "privacy budget they learn, for each state of the model, one sum over at least "
                f"{terms['quorum']['needed'] - pads} others, unless people there released another."
            )
    return (
        server,
        "The other hospitals see sums over all hospitals, never one hospital's own contribution, and the model that "
        "follows from them.",
        together,
        "A sum over all hospitals can tell something of the patients behind it. Only a privacy budget bounds that; "
        "without one, nothing does.",
        "Whoever holds this hospital's computer, its keys or its images is not kept out by anything in the study.",
    )


def _never(leaves: Mapping[str, Any]) -> list[str]:
    alone = ", but inside encrypted sums over all hospitals, as said above" if leaves["never_alone"] else ""
    return [
        "Images, and what is computed of a single image.",
        "Names, ids and file names.",
        "Diagnoses and labels.",
        f"How many images or patients there are, and how the model fares on them{alone}.",
        "What the local settings say, and the text of any error.",
    ]


def _leaves(terms: Mapping[str, Any]) -> list[str]:
    leaves = terms["leaves"]
    found = []
    if leaves["updates"]:
        how = "encrypted and signed: the server cannot read it" if terms["mode"] == "he" else "NOT encrypted"
        found.append(
            f"A contribution in each of {counted(leaves['updates'], 'round')}: "
            f"{leaves['update_values']:,} numbers that say how "
            f"the model should change, {how}. {leaves['update_bytes'] / 1e6:.2f} MB each."
        )
        found.append(
            "With it, readable: the hospital's name, the study, the round and attempt, counters and check sums, and "
            "how far its privacy account has come."
        )
    found += [f"Inside the encrypted numbers: {line}." for line in leaves["statistics"]]
    if leaves["validation_counts"]:
        found.append(
            "Inside the encrypted numbers: how many test images there were, and how many of them the model got right. "
            "Only the sum over all hospitals is ever opened."
        )
    found.append("Short answers to the server: how far this hospital is, and a check that all hold the same model.")
    found.append("That the computer is connected: its network address, and when.")
    return found


def _budget(budget: Mapping[str, Any] | None, observer: bool) -> list[str]:
    if budget is not None:
        return [
            f"Everything that leaves is ({budget['epsilon']:g}, {budget['delta']:g})-differentially private for each "
            f"{budget['unit']}: what anybody can learn of one {budget['unit']} is bounded, against everybody and for "
            "ever. The account is kept at this hospital; nobody else can raise the budget.",
        ]
    if observer:
        return ["None is needed: an observer contributes nothing."]
    return ["None. The sums, which all hospitals of the study open, are not differentially private."]


def evidence_page(found: Mapping[str, Any]) -> str:
    """What an evidence archive holds, for a data-protection officer.

    Args:
        found: as :func:`secure_fed.operate.evidence.verify_evidence` gives it.
    """
    ledger, software = found["ledger"], found["software"]
    drill, sent = found["drill"], sent_in_words(found)
    blocks = [
        Block(
            "What was agreed",
            (
                f"Study {found['study']}, digest {found['study_id']}: {counted(found['study_rounds'], 'round')}, "
                f"{'encrypted' if found['mode'] == 'he' else 'NOT encrypted'}.",
                f"{found['together'][0].upper()}{found['together'][1:]}.",
            ),
        ),
        Block(
            "Who accepted it",
            columns=("accepted by", "at", "runs", "budget"),
            rows=[
                (one["by"], when(one["accepted_ms"]), str(one["runs"]), _budget_words(one["budget"]))
                for one in found["all_acceptances"]
            ],
        ),
        Block(
            "Who took part",
            (
                f"{counted(found['runs'], 'run')}, {counted(found['rounds'], 'round')}, "
                f"{counted(found['records'], 'record')} that all members have.",
            ),
            columns=("hospital", "role", "in how many sums"),
            rows=[(one["name"], one["role"], str(one["sums"])) for one in found["members"]],
        ),
        Block(
            "What was sent",
            (f"{sent[0].upper()}{sent[1:]}. In sums: {counted(found['updates_in_sums'], 'contribution')}.",),
            columns=("time (UTC)", "round", "what", "bytes", "digest"),
            rows=[
                (row["time"], str(row["round"]), row["code"], f"{row['bytes']:,}", row["digest"][:16])
                for row in found["sent"]
            ],
        ),
        Block("What was spent", (f"Privacy account: {ledger}.",)),
        Block(
            "Which attacks were tried on this installation",
            () if drill else ("None is recorded: secfacmic drill --site SITE tries them, and keeps what came of it.",),
            columns=("attack", "by whom", "tried", "held"),
            rows=[
                (row["id"], row["attacker"], row["tried"], "yes" if row["held"] else "NO")
                for row in (drill or {"attacks": ()})["attacks"]
            ],
        ),
        Block(
            "Which software",
            (
                ", ".join(f"{name} {value}" for name, value in sorted(software.items()))
                + f"; {found['packages']} packages, listed with their versions in bom.json.",
            ),
        ),
    ]
    return _page(
        f"Evidence of {found['site']}",
        f"secfacmic: study {found['study']}",
        "What this hospital agreed to, sent and spent. The archive around this page proves it.",
        blocks,
        "This page is the hospital's own words. Check the archive itself: secfacmic evidence verify FILE.",
    )


def _budget_words(budget: Mapping[str, Any] | None) -> str:
    return "none" if budget is None else f"epsilon {budget['epsilon']:g}, delta {budget['delta']:g}, a {budget['unit']}"


def _page(title: str, eyebrow: str, headline: str, blocks: Sequence[Block], footer: str, signature: str = "") -> str:
    return fill(
        "document.html",
        source("document.css"),
        "base-uri 'none'; form-action 'none'",
        title=title,
        eyebrow=eyebrow,
        headline=headline,
        blocks=blocks,
        footer=footer,
        signature=signature,
    )
