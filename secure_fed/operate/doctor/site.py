"""Checks at a site. What loads torch is imported where it is used: before that, free memory is measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from secure_fed.core.layout import SEALED, SiteState
from secure_fed.core.status import is_running
from secure_fed.operate.doctor.finding import END, Fault, Finding, attempt, check
from secure_fed.operate.doctor.machine import disk, flwr, keeps, memory, modes
from secure_fed.operate.doctor.network import examine_way
from secure_fed.operate.standing import is_over
from secure_fed.protocol.study import AgreedStudy, load_study

if TYPE_CHECKING:
    from secure_fed.clients.sitefile import SiteFile

MEMORY = 1.5e9
"""Bytes that a site needs free; its libraries alone take 0.8 GB."""


def examine_site(path: Path) -> Iterator[Finding]:
    """Look at a site.

    Args:
        path: its ``site.toml``.
    """
    found, file = attempt("site file", lambda: _site_file(path))
    yield found
    yield check("flwr version", flwr)
    if file is None:
        return
    found, agreed = attempt("study", lambda: _study(file))
    yield found
    state = Path(file.state)
    yield check("key modes", lambda: modes([*Path(file.identity).glob("*.key"), *SiteState(state).keys.glob(SEALED)]))
    if agreed is not None and is_over(state, agreed) and not is_running(state):
        yield Finding("end", True, END)
        yield check("ledger", lambda: _ledger(file))
        return
    yield check("identity", lambda: _identity(file))
    yield check("state folder", lambda: keeps(state))
    yield check("memory", lambda: memory(MEMORY))
    yield check("image formats", _formats)
    yield check("ledger", lambda: _ledger(file))
    yield from examine_way(file, agreed)
    if agreed is None:
        return
    yield check("membership", lambda: _membership(file, agreed))
    yield check("disk", lambda: disk(state, agreed, updates=2))
    yield check("backbone", lambda: _backbone(file, agreed))
    yield check("data folder", lambda: _data(file, agreed))


def _site_file(path: Path) -> tuple[SiteFile, str]:
    from secure_fed.clients.sitefile import read_site_file

    file = read_site_file(path)
    return file, f"{path}: site {file.site}"


def _study(file: SiteFile) -> tuple[AgreedStudy, str]:
    agreed = load_study(Path(file.study))
    file.refuse_study(agreed.study)
    return agreed, f"{agreed.study.name}, id {agreed.study.id}"


def _identity(file: SiteFile) -> str:
    from secure_fed.privacy.keys import load_identity

    load_identity(Path(file.identity), file.site)
    return f"{file.identity}: readable"


def _membership(file: SiteFile, agreed: AgreedStudy) -> str:
    from secure_fed.clients.acceptance import require_acceptance, when
    from secure_fed.clients.keyring import membership

    identity, ring, _ = membership(file, agreed)
    accepted = require_acceptance(file, agreed, identity.keys.signing)
    if agreed.study.mode == "he":
        epoch, key = ring.newest
        if not epoch:
            raise Fault("the study's key is not here", "take it: secfacmic keys accept study.key --site site.toml")
        ring.secret(key)
    return f"accepted by {accepted.by} on {when(accepted.accepted_ms)}; the study's key opens"


def _ledger(file: SiteFile) -> str:
    from secure_fed.clients.budget import ledger_folder
    from secure_fed.privacy.ledger import CLOSED, Ledger

    folder = ledger_folder(file)
    if not Ledger.exists(folder):
        return "none: nothing was spent here" + ("" if file.privacy else ", and no budget is set")
    facts = Ledger(folder).summary()
    if (folder / CLOSED).exists():
        raise Fault(
            f"{folder}: restored, and closed until the journal confirms its head",
            "start the site: it opens by itself when server and sites hold no later head",
        )
    spent, budget = facts["epsilon_spent"], facts["epsilon_budget"]
    if file.privacy is not None and file.privacy.epsilon > budget:
        raise Fault(
            f"site.toml asks for epsilon {file.privacy.epsilon:g}; the ledger's budget is {budget:g}",
            f"set epsilon = {budget:g} or less: a budget can only be lowered",
        )
    return f"verifies; epsilon {spent:.3f} of {budget:g} spent{_local(file)}"


def _formats() -> str:
    from secure_fed.clients.reading import FORMATS, transfer_syntaxes

    syntaxes = transfer_syntaxes()
    missing = [name for name, plugins in syntaxes.items() if not plugins]
    if missing:
        raise Fault(
            f"no decoder for DICOM's {', '.join(missing)}",
            "install secfacmic's dependencies again: pip install --force-reinstall secfacmic",
        )
    names = "".join(f"\n  {name} ({', '.join(plugins)})" for name, plugins in syntaxes.items())
    return f"{', '.join(one.name for one in FORMATS)}; DICOM's transfer syntaxes, and what decodes them:{names}"


def _backbone(file: SiteFile, agreed: AgreedStudy) -> str:
    from secure_fed.model.backbone import load_backbone

    loaded = load_backbone(agreed.study.backbone, None if file.checkpoint is None else Path(file.checkpoint))
    return f"{loaded.description}, digest and id as in the study, features finite"


def _data(file: SiteFile, agreed: AgreedStudy) -> str:
    from secure_fed.clients.decoding import decode_all
    from secure_fed.clients.images import present_images, rules_of

    images = present_images(file, agreed)
    decoded = decode_all(
        [image.source for image in images], lambda pictures: [True for _ in pictures], 64, rules_of(file, agreed)
    )
    broken = [f"{images[one.index].path}: {one.reason}" for batch in decoded for one in batch if one.reason]
    if broken and not file.skip_unreadable:
        shown = "\n".join(broken[:10]) + (f"\nand {len(broken) - 10} more" if len(broken) > 10 else "")
        raise Fault(
            f"{len(broken)} of {len(images)} images cannot be decoded{_local(file)}:\n{shown}",
            "replace or remove them, or set skip_unreadable = true in site.toml",
        )
    patients = len({image.patient for image in images})
    left_out = f", {len(broken)} left out" if broken else ""
    return f"{len(images)} images of {patients} {file.data.unit}s{left_out}{_local(file)}"


def _local(file: SiteFile) -> str:
    """What is said of a figure of patients that no budget has paid for."""
    from secure_fed.clients.budget import LOCAL, unpaid

    return f" ({LOCAL})" if unpaid(file) else ""
