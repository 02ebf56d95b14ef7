"""``site.toml``: what one site decides for itself. No message from the server can change any of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from secure_fed.clients.rules import MOST_PIXELS
from secure_fed.core.errors import SiteFileError
from secure_fed.core.layout import SiteState
from secure_fed.core.tomlfile import FileModel, parse_table, reachable, read_toml, spelled
from secure_fed.model.device import DeviceChoice
from secure_fed.protocol.simulation_table import Shares
from secure_fed.protocol.study import MIN_SITES_HE, AgreedStudy, Study, load_study
from secure_fed.protocol.study_tables import Name, Text

SITE_FILE = "site.toml"
"""A site's own file; a site is named to a command by it, or by the folder that it is in."""

ADDRESS = r"^(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}$"
SLICES = r"^(middle|all|every:[1-9][0-9]{0,3})$"


class SiteData(FileModel):
    """The site's images.

    Attributes:
        folder: with ``manifest.csv``, or one folder a class (and perhaps ``unlabelled``).
        kind: ``patients`` unless the images are public or simulated.
        unit: what counts as one patient; ``image`` only for data without patient ids.
        shares: how a folder without a split column is split.
        unlabelled: another folder, of images without labels, as target of domain adaptation.
        slices: of each series of slices, be it one file or many: ``middle``, ``every:N`` or ``all``; without it each
            file is one image, of many frames the middle one.
        leave_out: DICOM files that are left out: ``scout``, ``screenshot``, ``no picture`` (segmentations, reports).
        patients: which ids are one patient, if not in ``patients.csv`` of the folder.
        only: paths below the folder; if there are any, this site has these images and no others of it.
        most_pixels: of one picture; a larger one is refused before it is unpacked.
    """

    folder: Text
    kind: Literal["patients", "public", "simulated"] = "patients"
    unit: Literal["patient", "image"] = "patient"
    shares: Shares | None = None
    unlabelled: Annotated[Text | None, Field(examples=["/data/without-labels"])] = None
    slices: Annotated[
        Annotated[str, spelled(SLICES, "middle, all or every:N, as in every:3")] | None,
        Field(examples=["middle"]),
    ] = None
    leave_out: tuple[Literal["scout", "screenshot", "no picture"], ...] = ()
    patients: Annotated[Text | None, Field(examples=["patients.csv"])] = None
    only: tuple[Text, ...] = ()
    most_pixels: Annotated[int, Field(ge=1, le=2**32)] = MOST_PIXELS


class SiteServer(FileModel):
    """How the site reaches the server.

    Attributes:
        address: ``host:port``; the host must be one of the names in the server's certificate.
        authority: certificate of the study's authority, ``ca.crt``; no other is trusted. Before an amendment changes
            it, the new one is appended to the file.
        proxy: HTTP proxy on the way, ``http://proxy.example.org:3128``; the environment's ``HTTPS_PROXY`` if not set.
        wait_seconds: how long a look for messages may wait at the server for something to come; fewer where a proxy or
            firewall cuts silent connections, 0 to look again and again.
    """

    address: Annotated[
        Annotated[
            str,
            spelled(ADDRESS, "HOST:PORT, as in fl.example.org:8443"),
            AfterValidator(lambda address: reachable(f"https://{address}").removeprefix("https://")),
        ],
        Field(examples=["fl.example.org:8443"]),
    ]
    authority: Annotated[Text, Field(examples=["study/ca.crt"])]
    proxy: Annotated[
        Annotated[
            str,
            spelled(r"^https?://[^/\s]+/?$", "a URL, as in http://proxy.example.org:3128", 300),
            AfterValidator(reachable),
        ]
        | None,
        Field(examples=["http://proxy.example.org:3128"]),
    ] = None
    wait_seconds: Annotated[int, Field(ge=0, le=25, examples=[0])] = 25


class SitePrivacy(FileModel):
    """The site's privacy budget. Once a ledger is begun, only epsilon can change, and only fall.

    Attributes:
        epsilon: budget of each patient over the life of the ledger.
        delta: its other half; far below one over the number of patients.
        n_ref: declared number of training patients, by which noisy sums are divided; public, so never the count;
            the study's if not set.
        run_epsilon: what one run may cost a patient, at most ``epsilon``; public. If not set, the ledger's life is
            shared by ``runs`` in equal parts of squared mu.
        runs: how many runs the site means to take part in, if ``run_epsilon`` is not set.
        reply_seconds: after how many seconds, or a multiple, a reply leaves for which data or the ledger were read; at
            least twice the worst case that the client measures at its start. If not set, that, in whole seconds.
    """

    epsilon: Annotated[float, Field(gt=0, le=100, examples=[3.0])]
    delta: Annotated[float, Field(gt=0, le=1e-3)] = 1e-5
    n_ref: Annotated[Annotated[int, Field(ge=1, le=10**9)] | None, Field(examples=[500])] = None
    run_epsilon: Annotated[Annotated[float, Field(gt=0, le=100)] | None, Field(examples=[1.0])] = None
    runs: Annotated[int, Field(ge=1, le=1000)] = 1
    reply_seconds: Annotated[Annotated[float, Field(gt=0, le=86400)] | None, Field(examples=[60.0])] = None


class SiteFile(FileModel):
    """``site.toml``; relative paths start at its folder.

    Attributes:
        format: of this file; 1 is the only one so far.
        site: the name under which the site is in the study.
        study: path of ``study.toml``.
        state: folder of the site's journal copy, outbox, feature cache and keys.
        identity: folder of its private keys.
        checkpoint: the backbone's weights on this node, for sites without internet.
        server: how the site reaches the server; not needed to simulate.
        data: the site's images.
        privacy: the budget under which the site trains; without one, and without a ledger that remembers one, it
            trains without differential privacy.
        allow_plain: whether a study without encryption is joined; never with patients' data.
        min_sites: fewest contributors this site asks of an aggregate; a study that asks for less is refused.
        max_epsilon: this site trains under differential privacy only, with at most this epsilon.
        studies: names or ids of the only studies it takes part in; any if empty.
        amendments: which rotations of the study's key are applied unasked: all, those by which no site joins and
            no authority changes, or none; others are accepted by hand.
        threads: CPU threads of training; other counts give other rounding.
        device: where images are encoded and the adapter is trained: ``auto`` takes a CUDA card if there is one,
            ``cuda:1`` the card of that number. Training under differential privacy, in double
            precision, stays on the CPU.
        features: file of the feature cache, if not ``STATE/features.sqlite``; studies of one site may share it.
        skip_unreadable: go on without images that cannot be decoded.
        similar_cases: how many of the site's own training patients the page of a case may show beside it; 0 for none.
    """

    format: Literal[1]
    site: Name
    study: Text
    state: Text
    identity: Text
    checkpoint: Annotated[Text | None, Field(examples=["weights.safetensors"])] = None
    server: SiteServer | None = None
    privacy: SitePrivacy | None = None
    data: SiteData
    allow_plain: bool = False
    min_sites: Annotated[int, Field(ge=1, le=4096)] = MIN_SITES_HE
    max_epsilon: Annotated[Annotated[float, Field(gt=0, le=100)] | None, Field(examples=[3.0])] = None
    studies: tuple[Text, ...] = ()
    amendments: Literal["all", "removals", "none"] = "removals"
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    device: DeviceChoice = "auto"
    features: Annotated[Text | None, Field(examples=["features.sqlite"])] = None
    skip_unreadable: bool = False
    similar_cases: Annotated[int, Field(ge=0, le=20)] = 0

    @property
    def state_folder(self) -> SiteState:
        """What lies where in the state folder.

        Raises:
            StateFormatError: it is of another layout.
        """
        return SiteState(Path(self.state))

    @property
    def known_server(self) -> SiteServer:
        """How the site reaches its server.

        Raises:
            SiteFileError: the file does not say.
        """
        if self.server is None:
            raise SiteFileError(
                f"site {self.site}: no [server] table in site.toml; expected address and authority of the study's "
                "server"
            )
        return self.server

    @property
    def feature_cache(self) -> Path:
        """Where the feature cache lies."""
        return self.state_folder.features if self.features is None else Path(self.features)

    @field_validator("allow_plain")
    @classmethod
    def _patients_are_encrypted(cls, allowed: bool, info: ValidationInfo) -> bool:
        data = info.data.get("data")
        if allowed and data is not None and data.kind == "patients":
            raise ValueError('patients\' data are never sent in plain; expected false, or data.kind "public"')
        return allowed

    def observes(self, study: Study) -> bool:
        """Whether the study lists this site as an observer, which trains on nothing; one that joins later trains."""
        return any(member.name == self.site and member.role == "observer" for member in study.sites)

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
        if self.studies and study.name not in self.studies and study.id not in self.studies:
            reasons.append(f"study {study.name}, id {study.id}; this site takes part in {', '.join(self.studies)} only")
        if self.max_epsilon is not None and not self.observes(study):
            reasons += self._unprotected(study, self.max_epsilon)
        if reasons:
            raise SiteFileError(f"site {self.site} refuses study {study.name}:\n  " + "\n  ".join(reasons))

    def _unprotected(self, study: Study, most: float) -> list[str]:
        """What falls short of training under differential privacy with at most that epsilon."""
        reasons = []
        if self.privacy is None:
            reasons.append(
                f"no privacy budget; this site demands differential privacy with epsilon at most {most:g}: set "
                "[privacy] epsilon, or give --epsilon"
            )
        elif self.privacy.epsilon > most:
            reasons.append(f"epsilon = {self.privacy.epsilon:g}; this site demands at most {most:g}")
        if study.method.loss == "contrastive" or (study.method.adapter, study.method.norm) == ("facmic", "batch"):
            reasons.append(
                f"study method: loss {study.method.loss}, norm {study.method.norm}, which differential privacy does "
                'not hold for; this site demands it: loss = "class_prompt", norm = "layer"'
            )
        return reasons


def with_budget(file: SiteFile, epsilon: float | None, delta: float | None) -> SiteFile:
    """The site file with the budget that the command line gives, if it gives one.

    Raises:
        SiteFileError: a figure out of range, or a delta without epsilon.
    """
    if epsilon is None and delta is None:
        return file
    return file.model_copy(update={"privacy": given_budget(epsilon, delta, file.privacy)})


def given_budget(epsilon: float | None, delta: float | None, known: SitePrivacy | None = None) -> SitePrivacy:
    """The budget that the command line gives, at least one half of it.

    Args:
        epsilon, delta: what was given.
        known: where the rest comes from.

    Raises:
        SiteFileError: a figure out of range, or a delta without epsilon.
    """
    if epsilon is None and known is None:
        raise SiteFileError(f"--delta {delta:g}: half of a budget; expected --epsilon beside it, or neither")
    content = {} if known is None else known.model_dump(exclude_none=True)
    content |= {name: value for name, value in (("epsilon", epsilon), ("delta", delta)) if value is not None}
    where = "the budget of --epsilon and --delta (leave both out for a run without one)"
    return parse_table(content, SitePrivacy, SiteFileError, where)


def with_device(file: SiteFile, device: DeviceChoice | None) -> SiteFile:
    """The site file with the device that the command line gives, if it gives one."""
    return file if device is None else file.model_copy(update={"device": device})


def new_site_file(path: Path, name: str, identity: Path, data: Path, kind: str, address: str | None) -> SiteFile:
    """The ``site.toml`` of a new site, which keeps what the coordinator sends in ``study/`` beside it.

    Args:
        path: where it is to be; nothing is written.
        name: the site's.
        identity: folder of its keys.
        data: folder of its images.
        kind: of the data.
        address: ``host:port`` of the server, if known yet.

    Raises:
        SiteFileError: a value does not fit, or there is a file already.
    """
    if path.exists():
        raise SiteFileError(f"{path}: exists; expected a folder without one: edit it, or choose another folder")
    content = {
        "format": 1,
        "site": name,
        "study": "study/study.toml",
        "state": "state",
        "identity": str(identity),
        "data": {"folder": str(data.resolve()), "kind": kind},
    }
    if address is not None:
        content["server"] = {"address": address, "authority": "study/ca.crt"}
    return parse_table(content, SiteFile, SiteFileError, str(path))


def site_file_in(path: Path) -> Path:
    """A site's file, by the file's own path or by its folder's."""
    return path / SITE_FILE if path.is_dir() else path


def read_site(path: Path, study: Path | None = None) -> tuple[SiteFile, AgreedStudy]:
    """Read ``site.toml`` and the study that it is for.

    Args:
        path: the file, or the folder that it is in.
        study: a copy of the study, which must be the same; the one that the file names if not given.

    Raises:
        SiteFileError: with every error of the file, or because the study is another.
        StudyError: the study cannot be read.
    """
    file = read_site_file(path)
    own = Path(file.study)
    agreed = load_study(own if study is None else study)
    if study is not None and study.resolve() != own.resolve() and load_study(own).study.id != agreed.study.id:
        raise SiteFileError(f"{path}: is for study {own}, another than {study}; name the same study in both")
    return file, agreed


def read_site_file(path: Path) -> SiteFile:
    """Read ``site.toml`` with its paths made absolute.

    Args:
        path: the file, or the folder that it is in.

    Raises:
        SiteFileError: with every error of the file.
    """
    path = site_file_in(path)
    if not path.exists():
        raise SiteFileError(
            f"{path}: no such file; expected a site's folder or its site.toml, which secfacmic site init makes"
        )
    file = read_toml(path, SiteFile, SiteFileError)
    base = path.resolve().parent
    paths = {name: str(base / getattr(file, name)) for name in ("study", "state", "identity")}
    checkpoint = None if file.checkpoint is None else str(base / file.checkpoint)
    extra = None if file.data.unlabelled is None else str(base / file.data.unlabelled)
    same = None if file.data.patients is None else str(base / file.data.patients)
    folders = {"folder": str(base / file.data.folder), "unlabelled": extra, "patients": same}
    data = file.data.model_copy(update=folders)
    features = None if file.features is None else str(base / file.features)
    server = file.server
    if server is not None:
        server = server.model_copy(update={"authority": str(base / server.authority)})
    others = {"checkpoint": checkpoint, "data": data, "server": server, "features": features}
    return file.model_copy(update={**paths, **others})
