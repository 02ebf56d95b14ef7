"""``site.toml``: what one site decides for itself. No message from the server can change any of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationInfo, field_validator

from secure_fed.errors import SiteFileError
from secure_fed.study import MIN_SITES_HE, Name, Shares, Study, Text
from secure_fed.tomlfile import FileModel, parse_table, read_toml


class SiteData(FileModel):
    """The site's images.

    Attributes:
        folder: with ``manifest.csv``, or one folder a class (and perhaps ``unlabelled``).
        kind: ``patients`` unless the images are public or simulated.
        unit: what counts as one patient; ``image`` only for data without patient ids.
        shares: how a folder without a split column is split.
    """

    folder: Text
    kind: Literal["patients", "public", "simulated"] = "patients"
    unit: Literal["patient", "image"] = "patient"
    shares: Shares | None = None


class SiteServer(FileModel):
    """How the site reaches the server.

    Attributes:
        address: ``host:port``; the host must be one of the names in the server's certificate.
        authority: certificate of the study's authority, ``ca.crt``; no other is trusted.
    """

    address: Annotated[str, StringConstraints(pattern=r"^(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}$")]
    authority: Text


class SitePrivacy(FileModel):
    """The site's privacy budget. Once a ledger is begun, only epsilon can change, and only fall.

    Attributes:
        epsilon: budget of each patient over the life of the ledger.
        delta: its other half; far below one over the number of patients.
        n_ref: declared number of training patients, by which noisy sums are divided; public, so never the count;
            the study's if not set.
    """

    epsilon: Annotated[float, Field(gt=0, le=100)]
    delta: Annotated[float, Field(gt=0, le=1e-3)] = 1e-5
    n_ref: Annotated[int, Field(ge=1, le=10**9)] | None = None


class SiteFile(FileModel):
    """``site.toml``; relative paths start at its folder.

    Attributes:
        site: the name under which the site is in the study.
        study: path of ``study.toml``.
        state: folder of the site's journal copy, outbox, feature cache and keys.
        identity: folder of its private keys.
        checkpoint: the backbone's weights on this node, for sites without internet.
        server: how the site reaches the server; not needed to simulate.
        privacy: the budget under which the site trains; without one, and without a ledger that remembers one, it
            trains without differential privacy.
        allow_plain: whether a study without encryption is joined; never with patients' data.
        min_sites: fewest contributors this site asks of an aggregate; a study that asks for less is refused.
        amendments: which rotations of the study's key are applied unasked: all, those by which no site joins, or
            none; others are accepted by hand.
        threads: CPU threads of training; other counts give other rounding.
        skip_unreadable: go on without images that cannot be decoded.
    """

    format: Literal[1]
    site: Name
    study: Text
    state: Text
    identity: Text
    checkpoint: Text | None = None
    server: SiteServer | None = None
    privacy: SitePrivacy | None = None
    data: SiteData
    allow_plain: bool = False
    min_sites: Annotated[int, Field(ge=1, le=4096)] = MIN_SITES_HE
    amendments: Literal["all", "removals", "none"] = "removals"
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    skip_unreadable: bool = False

    @field_validator("allow_plain")
    @classmethod
    def _patients_are_encrypted(cls, allowed: bool, info: ValidationInfo) -> bool:
        data = info.data.get("data")
        if allowed and data is not None and data.kind == "patients":
            raise ValueError('patients\' data are never sent in plain; expected false, or data.kind "public"')
        return allowed

    def refuse_study(self, study: Study) -> None:
        """Check a study against this site's own policy.

        Raises:
            SiteFileError: naming everything that the site does not allow.
        """
        reasons = []
        if study.mode == "plain" and not self.allow_plain:
            reasons.append('study mode = "plain": updates would leave unencrypted; allow_plain is false here')
        if study.mode == "he" and study.min_sites < self.min_sites:
            reasons.append(f"study min_sites = {study.min_sites}; this site asks for at least {self.min_sites}")
        if reasons:
            raise SiteFileError(f"site {self.site} refuses study {study.name}:\n  " + "\n  ".join(reasons))


def with_budget(file: SiteFile, epsilon: float | None, delta: float | None) -> SiteFile:
    """The site file with the budget that the command line gives, if it gives one.

    Raises:
        SiteFileError: a figure out of range, or a delta without epsilon.
    """
    if epsilon is None and delta is None:
        return file
    content = {} if file.privacy is None else file.privacy.model_dump(exclude_none=True)
    content |= {name: value for name, value in (("epsilon", epsilon), ("delta", delta)) if value is not None}
    privacy = parse_table(content, SitePrivacy, SiteFileError, "--epsilon, --delta")
    return file.model_copy(update={"privacy": privacy})


def read_site_file(path: Path) -> SiteFile:
    """Read ``site.toml`` with its paths made absolute.

    Raises:
        SiteFileError: with every error of the file.
    """
    file = read_toml(path, SiteFile, SiteFileError)
    base = path.resolve().parent
    paths = {name: str(base / getattr(file, name)) for name in ("study", "state", "identity")}
    checkpoint = None if file.checkpoint is None else str(base / file.checkpoint)
    data = file.data.model_copy(update={"folder": str(base / file.data.folder)})
    server = file.server
    if server is not None:
        server = server.model_copy(update={"authority": str(base / server.authority)})
    return file.model_copy(update={**paths, "checkpoint": checkpoint, "data": data, "server": server})
