"""Checks of the machine that a site and a server share: versions, files, memory, disk, dates of certificates."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import stat
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from secure_fed.core.storage import try_out
from secure_fed.operate.doctor.finding import Fault
from secure_fed.protocol.packing import wire
from secure_fed.protocol.study import AgreedStudy
from secure_fed.transport.certificates import SOON_DAYS

SPARE_DISK = 200e6


def flwr() -> str:
    """The pinned version of flwr is installed."""
    wanted = next(
        (line for line in importlib.metadata.requires("secfacmic") or () if line.startswith("flwr==")), "flwr==?"
    ).partition("==")[2]
    found = importlib.metadata.version("flwr")
    if found != wanted:
        raise Fault(f"flwr {found}; expected {wanted} exactly", f"pip install flwr=={wanted}")
    return f"flwr {found}"


def modes(paths: list[Path]) -> str:
    """Files with keys are for their owner alone."""
    loose = [path for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077]
    if loose:
        names = " ".join(map(str, loose))
        raise Fault(f"others can read {names}", f"chmod 600 {names}; if others were on this machine, make new keys")
    return f"{len(paths)} key files, for their owner only"


def memory(needed: float) -> str:
    """So many bytes of memory are free."""
    with open("/proc/meminfo", encoding="ascii") as stream:
        facts = dict(line.split(":", 1) for line in stream)
    free = int(facts["MemAvailable"].split()[0]) * 1024
    if free < needed:
        raise Fault(
            f"{free / 1e9:.1f} GB of memory are free; expected at least {needed / 1e9:.1f} GB",
            "end other programs, or give the machine more memory",
        )
    return f"{free / 1e9:.1f} GB of memory free"


def disk(state: Path, agreed: AgreedStudy, updates: int, kept: int = 0) -> str:
    """There is room for the whole study, for so many updates of a round and the next, and so many that are kept."""
    study = agreed.study
    sizes = wire(study.mode, agreed.lanes)
    needed = (study.rounds + 2 * updates + kept) * sizes.payload_bytes + SPARE_DISK
    place = next(parent for parent in (state, *state.resolve().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise Fault(
            f"{place}: {free / 1e9:.2f} GB are free; expected at least {needed / 1e9:.2f} GB for {study.rounds} rounds",
            "free space, or put the state folder on another disk",
        )
    if not os.access(place, os.W_OK):
        raise Fault(f"{place}: cannot be written", "give this account the folder")
    return f"{free / 1e9:.1f} GB free of {needed / 1e9:.2f} GB needed for the whole study"


def keeps(state: Path) -> str:
    """The state folder's file system locks, and keeps what was written."""
    place = next(parent for parent in (state, *state.resolve().parents) if parent.exists())
    try:
        try_out(place)
    except OSError as error:
        raise Fault(
            f"{place}: a file cannot be locked, written, made durable or renamed there ({error.strerror})",
            "put the state folder on a local disk, or have the network file system's lock service started",
        ) from None
    return f"{place}: files can be locked and made durable"


def days_left(certificate: x509.Certificate, name: str, mend: str) -> int:
    """For how many days a certificate is valid.

    Args:
        certificate: it.
        name: what it is called in messages.
        mend: what to do if it is not, or not for long.

    Raises:
        Fault: it is not, or not for long.
    """
    now = datetime.now(UTC)
    days = (certificate.not_valid_after_utc - now).days
    if certificate.not_valid_before_utc > now:
        raise Fault(
            f"{name}: valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on; it is {now:%Y-%m-%d %H:%M}",
            "set this computer's clock by NTP; if it is right, make a new certificate",
        )
    if days < SOON_DAYS:
        over = "is over since" if days < 0 else f"ends in {days} days, on"
        raise Fault(f"{name}: its time {over} {certificate.not_valid_after_utc:%Y-%m-%d}", mend)
    return days
