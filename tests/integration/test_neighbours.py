"""What leaves a site with a budget, compared on neighbouring data: the guard against the next leak.

Two worlds differ by one patient. In both the noise is nothing and roundings are fixed, so that what leaves is a
function of the data. Codes, sizes, times, headers, numbers of entries, exits and archives must be equal; integers
may differ by what one patient is claimed to move them.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from secure_fed.clients import learner, private_round
from secure_fed.clients import site as site_module
from secure_fed.clients.budget import ledger_folder
from secure_fed.clients.data import Split
from secure_fed.clients.duplicates import Fingerprints
from secure_fed.clients.features import Labelled, SiteFeatures
from secure_fed.clients.files import Notes
from secure_fed.clients.images import Found
from secure_fed.clients.outgoing_log import SentList
from secure_fed.clients.private_round import PrivateRounds
from secure_fed.clients.reply_clock import ReplyClock
from secure_fed.clients.sitefile import SiteFile, SitePrivacy, read_site_file
from secure_fed.clients.snapshot import write_snapshot
from secure_fed.core.errors import SecfacmicError, TwinsError
from secure_fed.core.layout import SiteRun
from secure_fed.core.tomlfile import read_toml, write_toml
from secure_fed.lab.simulation import prepare
from secure_fed.model.adapters import initial_parameters
from secure_fed.operate import evidence
from secure_fed.operate.evidence import pack_evidence
from secure_fed.privacy import class_statistics, memory_sums, validation
from secure_fed.privacy.accounting import Mechanism, Noise, mu_squared_of
from secure_fed.privacy.dp_training import Descent
from secure_fed.privacy.guard import check_training
from secure_fed.privacy.ledger import LMMD_SHARE, Ledger, opened
from secure_fed.protocol import codec, memory
from secure_fed.protocol.envelope import RoundPosition
from secure_fed.protocol.ledger_heads import LedgerHeads
from secure_fed.protocol.rounds import ReplyCode
from secure_fed.protocol.study import AgreedStudy, Template
from tests.conftest import CLASSES, TRAINING, Federation, exchange, make_template
from tests.integration.test_anomaly import template as anomaly_template
from tests.unit.clients.test_dicom import as_bytes, dicom
from tests.unit.clients.test_reading import nifti

CLIP, RATE, N_REF = 4.0, 0.5, 20
SPLITS: tuple[Split, ...] = ("train", "val", "test", "unlabelled")


Form = Literal["png", "bmp", "dcm", "nii.gz"]


class Patient(NamedTuple):
    """One patient: its split, and the label and the direction of each image."""

    split: Split
    images: tuple[tuple[int, int], ...]
    scale: float = 1.0
    pictures: str = ""
    """Of whom the pictures are copies; its own by default."""
    form: Form = "png"
    """Of its files: of ``dcm`` and ``nii.gz`` there is one, of as many frames or slices as images."""


World = dict[str, Patient]


def patient(split: Split, *labels: int, seed: int = 0, **changes: Any) -> Patient:
    return Patient(split, tuple((label, seed * 1000 + number) for number, label in enumerate(labels)), **changes)


def others() -> World:
    world = {f"t{n}": patient("train", n % 3, seed=n + 1) for n in range(6)}
    world |= {f"v{n}": patient("val", n % 3, seed=n + 21) for n in range(3)}
    return world | {f"u{n}": patient("unlabelled", 0, seed=n + 31) for n in range(2)}


def features_of(world: World, dim: int) -> SiteFeatures:
    rows: dict[Split, list[NDArray[np.float32]]] = {split: [] for split in SPLITS}
    labels: dict[Split, list[int]] = {split: [] for split in SPLITS}
    owners: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for name, one in world.items():
        for label, seed in one.images:
            row = np.random.default_rng(seed).standard_normal(dim)
            rows[one.split].append(np.float32(one.scale) * (row / np.linalg.norm(row)).astype(np.float32))
            labels[one.split].append(label)
            owners[one.split].append(name)
    parts = {
        split: Labelled(
            np.array(rows[split], dtype=np.float32).reshape(-1, dim), np.array(labels[split], dtype=np.int64)
        )
        for split in SPLITS
    }
    digests = {
        name: frozenset(f"{one.pictures or name} {number or ''}".strip().encode() for number in range(len(one.images)))
        for name, one in world.items()
    }
    return SiteFeatures(
        parts["train"], parts["val"], parts["test"], parts["unlabelled"].x, 0, 0,
        {split: tuple(found) for split, found in owners.items()}, digests,
    )  # fmt: skip


def no_noise(size: int, std: float) -> NDArray[np.float64]:
    return np.zeros(size)


@contextmanager
def without_chance() -> Iterator[None]:
    with mock.patch.object(private_round, "uniforms", lambda size: np.full(size, 0.5)):
        yield


@contextmanager
def unguarded() -> Iterator[None]:
    with without_chance(), mock.patch.object(private_round, "check_training"):
        yield


@pytest.fixture(scope="module")
def prepared_worlds(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "out"
    prepare(template_of_worlds(), folder, images)
    for name in TRAINING[1:]:
        Federation(folder).site(name).features()
    set_budget(folder)
    return folder


def template_of_worlds(**changes: Any) -> Template:
    return make_template(
        mode="plain",
        rounds=2,
        method=changes.pop("method", {"adapter": "text_head"}),
        privacy={"steps": 1, "validation_rounds": 2, "images_per_patient": 3, "clip": CLIP, "learning_rate": RATE},
        encoding={"bits": 16, "lanes": 2, "value_bound": 10.0},
        **changes,
    )


def set_budget(folder: Path, n_ref: int = N_REF) -> None:
    path = folder / "sites" / "ash" / "site.toml"
    file = read_toml(path, SiteFile, ValueError)  # type: ignore[type-var]
    data = file.data.model_copy(update={"kind": "simulated", "unit": "patient"})
    write_toml(path, file.model_copy(update={"privacy": SitePrivacy(epsilon=8.0, n_ref=n_ref), "data": data}))


WORDS = ["ready", "update", "revealed", "ready", "update", "revealed", "applied"]
"""What a site says in a run of two rounds."""


class Clock:
    """Time that passes only when somebody works or sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


Where = Callable[[Path, World], AbstractContextManager[None]]
"""Puts a world where the site finds it, until the run is over."""


@contextmanager
def in_memory(folder: Path, world: World) -> Iterator[None]:
    """As if read and encoded, and with neither guard nor rehearsal, which see no patient: fast."""
    initial = Federation(folder).agreed.initial
    patches = memory.GRIDS in initial.adapter
    found = features_of(world, memory.width(initial.adapter) if patches else initial.prompt_features.shape[1])
    with (
        mock.patch.object(learner, "compared_images", return_value=(Found([], Notes(), []), Fingerprints([], {}))),
        mock.patch.object(learner, "by_patient", return_value=([], dict(found.digests))),
        mock.patch.object(learner, "load_features", return_value=found),
        mock.patch.object(learner, "rehearse"),
        mock.patch.object(private_round, "check_training"),
    ):
        yield


def whole_path(
    prepared: Path,
    folder: Path,
    world: World,
    before: Callable[[Path], None] | None = None,
    where: Where = in_memory,
    between: Callable[[Path], None] | None = None,
    integers: list[dict[str, NDArray[np.float64]]] | None = None,
) -> Any:
    """Everything that leaves in a run and afterwards, with what depends on keys or chance masked.

    Args:
        prepared: the study.
        folder: a copy of it is made there.
        world: the site's data.
        before: what its people did before the run.
        where: puts the data there.
        between: what happens to the data after the first round, when the site starts again.
        integers: is given the values that those of each round stand for.
    """
    shutil.copytree(prepared, folder, symlinks=True)
    federation = Federation(folder)
    rest = [federation.site(name) for name in TRAINING[1:]]
    for site in rest:
        site.features()
    clock = Clock()
    real = Descent.run

    def work(self: Descent, adapter: Any, patients: Any, *rest: Any) -> None:
        clock.now += 0.01 * sum(batch.mask.numel() for batch in patients)  # as padded work would
        real(self, adapter, patients, *rest)

    def work_on_ledger(self: Ledger, place: Path) -> None:
        clock.now += 1e-6 * (place / "blocks.jsonl").stat().st_size
        open_ledger(self, place)

    def work_on_snapshot(path: Path, features: SiteFeatures, key: bytes) -> None:
        clock.now += 0.001 * len(features.train.y)
        write_snapshot(path, features, key)

    finite, open_ledger = class_statistics.finite_rows, Ledger.__init__

    def work_on_sums(x: Any, owners: Any) -> Any:
        clock.now += 0.01 * len(x)
        return finite(x, owners)

    with (
        without_chance(),
        where(folder, world),
        mock.patch.object(Descent, "run", work),
        mock.patch.object(class_statistics, "finite_rows", work_on_sums),
        mock.patch.object(Ledger, "__init__", work_on_ledger),
        mock.patch.object(site_module, "write_snapshot", work_on_snapshot),
    ):
        if before is not None:
            before(folder)
        ash = federation.site("ash")
        assert ash._private is not None
        ash._private._noise = no_noise
        sites = [ash, *rest]
        from secure_fed.server.coordinator import Coordinator

        coordinator = Coordinator.begin(federation.agreed, folder / "server", federation.signing, "0" * 64)
        sent, hold = SentList(folder / "sites/ash/state"), ReplyClock(1.0, clock, clock.sleep)
        left: list[Any] = []
        ash.features()  # what is wrong is settled before the first message
        while True:
            began = hold.begin()
            try:
                reply = ash.respond(coordinator.request(ash.name, ash.run, ash.position))
            except SecfacmicError as error:
                left.append(("fails", error.exit_code))
                break
            if ash.read_data:
                hold.hold(began)
            sent.add(reply, coordinator.round if hasattr(coordinator, "round") else 0)
            header = None
            if reply.code == ReplyCode.UPDATE:
                from secure_fed.core.errors import EnvelopeError
                from secure_fed.protocol.envelope import MAGIC, MAX_HEADER, EnvelopeHeader
                from secure_fed.protocol.signing import parse_header, split_frame

                frame = split_frame(MAGIC, reply.envelope, MAX_HEADER, EnvelopeError)
                facts = parse_header(frame.header, EnvelopeHeader, EnvelopeError).model_dump(mode="json")
                masked = ("run", "head", "cohort", "ledger_head", "payload")
                header = {name: value for name, value in facts.items() if name not in masked}
                header["ledger_links"] = [seq for seq, _ in facts["ledger_links"]]
                if integers is not None:
                    lanes = np.frombuffer(frame.payload, "<i4").astype(np.int64)
                    integers.append(federation.agreed.layout(len(integers) + 1).decode(lanes, [1.0]))
            # A REVEAL's two numbers are of the integers, and so is its length.
            size = 0 if reply.code == ReplyCode.REVEALED else len(reply.envelope)
            left.append((reply.code.value, reply.position, size, header, round(clock.now - began, 6)))
            coordinator.receive(reply)
            if between is not None and reply.code == ReplyCode.REVEALED:
                between(folder)
                between = None
                ash = sites[0] = federation.site("ash")  # as a new process would
                assert ash._private is not None
                ash._private._noise = no_noise
            if coordinator.finished or len(left) > 2 * len(WORDS):  # a site that sends nothing is never done with
                break
            for site in sites[1:]:
                exchange(coordinator, site)
            coordinator.advance()
        status = (
            json.loads((folder / "sites/ash/state/status.json").read_text())
            if (folder / "sites/ash/state/status.json").exists()
            else {}
        )
        with mock.patch.object(evidence, "bill_of_materials", return_value={}):  # seconds, of packages and no patient
            pack_evidence(folder / "sites/ash", folder / "evidence.zip")
        with zipfile.ZipFile(folder / "evidence.zip") as archive:
            names = sorted(archive.namelist())
            public = json.loads(archive.read("ledger/public.json"))
        run = coordinator.run
        names = [name.replace(run, "RUN") for name in names]
        public["anchors"] = len(public["anchors"])
        text = json.dumps(public).replace(run, "RUN").replace(run[:16], "RUN")
        rows = [(row.seq, row.code, row.code == "revealed" or row.bytes) for row in sent.read()]
        ledger = Ledger(ledger_folder(read_site_file(folder / "sites/ash/site.toml")))
        return left, names, text, rows, status, ledger.head[0]


def spend_all(*names: str) -> Callable[[Path], None]:
    """Some patients have spent all they had, in an earlier run."""

    def before(folder: Path) -> None:
        with opened(ledger_folder(read_site_file(folder / "sites/ash/site.toml"))) as ledger:
            ledger.register({name: (name.encode(),) for name in names})
            ledger.reserve(Mechanism(1.0, 0.601, 1), "before", "", {ledger.person(name) for name in names})

    def all_before(folder: Path) -> None:
        Federation(folder).site("ash")
        before(folder)

    return all_before


def told_apart(first: str, second: str) -> Callable[[Path], None]:
    """The operator was told of equal pictures, and has settled it."""

    def before(folder: Path) -> None:
        site = Federation(folder).site("ash")
        with suppress(TwinsError):
            site.features()
        with opened(ledger_folder(read_site_file(folder / "sites/ash/site.toml"))) as ledger, suppress(SecfacmicError):
            ledger.distinct(first, second)

    return before


def counted_before(*names: str) -> Callable[[Path], None]:
    """Some patients validated in an earlier run, in which nobody trained."""

    def before(folder: Path) -> None:
        Federation(folder).site("ash")
        with opened(ledger_folder(read_site_file(folder / "sites/ash/site.toml"))) as ledger:
            ledger.register({name: (name.encode(),) for name in names})
            ledger.reserve(validation.mechanism(12.0), "before", "", {ledger.person(name) for name in names})

    return before


def linked(first: str, second: str) -> Callable[[Path], None]:
    """The operator has said that two ids are one patient."""

    def before(folder: Path) -> None:
        Federation(folder).site("ash")
        with opened(ledger_folder(read_site_file(folder / "sites/ash/site.toml"))) as ledger:
            ledger.register({name: (name.encode(),) for name in (first, second)})
            ledger.link(first, second)

    return before


ONE = {
    "one more who trains": (others(), patient("train", 1, seed=99)),
    "one more who validates": (others(), patient("val", 1, seed=99)),
    "the only one who validates": (
        {name: one for name, one in others().items() if one.split != "val"},
        patient("val", 1, seed=99),
    ),
    "the only one who trains": (
        {name: one for name, one in others().items() if one.split != "train"},
        patient("train", 1, seed=99),
    ),
    "the only patient at all": ({}, patient("train", 1, seed=99)),
    "unlabelled only": (others(), patient("unlabelled", 0, seed=99)),
    "all classes": (others(), patient("train", 0, 1, 2, seed=99)),
    "500 images": (others(), patient("train", *([1] * 500), seed=99)),
    "images that are not finite": (others(), patient("train", 1, 2, seed=99, scale=float("nan"))),
    "a validated image that is not finite": (others(), patient("val", 1, seed=99, scale=float("inf"))),
    "huge features": (others(), patient("train", 1, seed=99, scale=1e30)),
}


@pytest.mark.parametrize("case", ONE)
def test_nothing_that_leaves_depends_on_one_patient_but_integers(
    prepared_worlds: Path, tmp_path: Path, case: str
) -> None:
    world, one = ONE[case]
    without = whole_path(prepared_worlds, tmp_path / "without", world)
    with_one = whole_path(prepared_worlds, tmp_path / "with", {**world, "p": one})
    assert without == with_one
    codes = [message[0] for message in without[0]]
    assert codes == WORDS
    # What was made for a READY comes from memory, and waits for nothing.
    assert [time for code, _, _, _, time in without[0] if code == "update"] == [0.0, 0.0]


def test_a_new_patient_beside_a_spent_cohort(prepared_worlds: Path, tmp_path: Path) -> None:
    spent = spend_all(*others())
    without = whole_path(prepared_worlds, tmp_path / "without", others(), spent)
    with_one = whole_path(prepared_worlds, tmp_path / "with", {**others(), "p": patient("train", 1, seed=99)}, spent)
    assert without == with_one
    assert [message[0] for message in without[0]] == WORDS  # over nobody noise is sent


def test_who_validated_before_and_now_trains(prepared_worlds: Path, tmp_path: Path) -> None:
    vals = [name for name, one in others().items() if one.split == "val"]
    world, one = others(), patient("train", 1, seed=99)
    without = whole_path(prepared_worlds, tmp_path / "without", world, counted_before(*vals))
    with_one = whole_path(prepared_worlds, tmp_path / "with", {**world, "p": one}, counted_before(*vals, "p"))
    assert without == with_one
    assert [message[0] for message in without[0]] == WORDS


def test_one_patient_in_two_splits(prepared_worlds: Path, tmp_path: Path) -> None:
    """Under two ids, which were linked; beside others who train and validate, and alone."""
    for place, world in enumerate((others(), {})):
        both = {**world, "p": patient("train", 1, seed=99), "q": patient("val", 2, seed=98)}
        without = whole_path(prepared_worlds, tmp_path / f"without-{place}", world)
        with_one = whole_path(prepared_worlds, tmp_path / f"with-{place}", both, linked("p", "q"))
        assert without == with_one


def test_copies_of_others_pictures_are_settled_before_the_start(prepared_worlds: Path, tmp_path: Path) -> None:
    copy = patient("train", 1, seed=99, pictures="t0")
    with pytest.raises(TwinsError, match=r"1 pairs of patient ids[\s\S]*p  t0"):
        whole_path(prepared_worlds, tmp_path / "unsettled", {**others(), "p": copy})
    settled = told_apart("p", "t0")
    without = whole_path(prepared_worlds, tmp_path / "without", others(), settled)
    with_one = whole_path(prepared_worlds, tmp_path / "with", {**others(), "p": copy}, settled)
    assert without == with_one


# --- from the very files ---


@pytest.fixture(scope="module")
def prepared_files(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """The same with the packaged backbone."""
    folder = tmp_path_factory.mktemp("files") / "out"
    prepare(template_of_worlds(backbone={"model": "mini-clip", "weights": "file", "file": "mini-clip.safetensors"}),
            folder, images)  # fmt: skip
    for name in TRAINING[1:]:
        Federation(folder).site(name).features()
    set_budget(folder)
    return folder


def own_folder(folder: Path) -> Path:
    return folder / "pictures"


def pictures_of(one: Patient) -> NDArray[np.uint8]:
    """[images, 60, 80], each from black to white, so that every format shows the same."""
    drawn = []
    for label, seed in one.images:
        picture = np.random.default_rng(seed).integers(0, 256, (20, 20 + label), dtype=np.uint8)
        drawn.append(np.array(Image.fromarray(picture).resize((80, 60))))
        drawn[-1][0, :2] = 0, 255
    return np.array(drawn)


def write_files(folder: Path, world: World) -> None:
    """Pictures and manifest; one that is not finite is a file that breaks off.

    Whose a DICOM file is says the file alone.
    """
    place = own_folder(folder)
    place.mkdir()
    lines = ["path,patient,label,split,frame"]
    for name, one in world.items():
        shown = pictures_of(world[one.pictures] if one.pictures else one)
        paths = [place / f"{name}-{number}.{one.form}" for number in range(len(shown))]
        owner = name
        if one.form == "dcm":
            paths, owner = paths[:1] * len(paths), ""
            paths[0].write_bytes(as_bytes(dicom(shown, PatientID=name)))
        elif one.form == "nii.gz":
            paths = paths[:1] * len(paths)
            paths[0].write_bytes(nifti(np.moveaxis(shown, 0, 2)))
        else:
            for path, picture in zip(paths, shown, strict=True):
                Image.fromarray(picture).save(path)
        for path in set(paths) if not np.isfinite(one.scale) else ():
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
        for number, (path, (label, _)) in enumerate(zip(paths, one.images, strict=False)):
            word = "" if one.split == "unlabelled" else CLASSES[label]
            frame = number if len(set(paths)) < len(paths) else ""
            lines.append(f"{path.name},{owner},{word},{one.split},{frame}")
    (place / "manifest.csv").write_text("\n".join(lines) + "\n")


@contextmanager
def in_files(folder: Path, world: World) -> Iterator[None]:
    """Read, checked and encoded by the site itself, whose guard and rehearsal run too, with noise as it should be."""
    write_files(folder, world)
    path = folder / "sites/ash/site.toml"
    file = read_toml(path, SiteFile, ValueError)  # type: ignore[type-var]
    data = file.data.model_copy(update={"folder": str(own_folder(folder))})
    write_toml(path, file.model_copy(update={"data": data, "skip_unreadable": True}))
    checked: list[Descent] = []

    def guard(adapter: Any, loss: Any, descent: Descent) -> None:
        checked.append(descent)
        check_training(adapter, loss, Descent(descent.settings, descent.noise_std, descent.n_ref))

    with (
        mock.patch.object(private_round, "check_training", guard),
        mock.patch.object(learner, "rehearse", wraps=learner.rehearse) as rehearsed,
    ):
        yield
    assert checked
    assert rehearsed.called


def lose(folder: Path) -> None:
    """The new patient's pictures are gone, another's is broken."""
    for path in own_folder(folder).glob("p-*"):
        path.unlink()
    (own_folder(folder) / "t3-0.png").write_bytes(b"no picture")
    (own_folder(folder) / "t1-0.dcm").write_bytes(b"no picture")


FILES: dict[str, tuple[Patient, Callable[[Path], None] | None]] = {
    "who trains": (patient("train", 1, 2, 1, 1, seed=99), None),
    "who validates, and is lost in the run": (patient("val", 1, seed=99), lose),
    "whose file is broken": (patient("train", 1, seed=99, scale=float("nan")), None),
    "who trains on frames of a DICOM file": (patient("train", 1, 2, 1, 1, seed=99, form="dcm"), None),
    "who trains on slices of a NIfTI volume": (patient("train", 1, 2, 1, 1, seed=99, form="nii.gz"), None),
    "whose DICOM file is broken": (patient("train", 1, 2, seed=99, scale=float("nan"), form="dcm"), None),
    "whose NIfTI volume is broken": (patient("train", 1, 2, seed=99, scale=float("nan"), form="nii.gz"), None),
}


def others_in_files() -> World:
    """Those who are there anyway, some of them in files of other formats."""
    world = {**others(), "x0": patient("test", 0, seed=41)}
    world["t1"] = world["t1"]._replace(form="dcm")
    world["t2"] = patient("train", 2, 2, seed=3, form="nii.gz")
    world["v1"] = patient("val", 1, 1, seed=22, form="dcm")
    world["u0"] = world["u0"]._replace(form="nii.gz")
    return world


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("case", FILES)
def test_from_files_to_envelopes_nothing_depends_on_one_patient_but_integers(
    prepared_files: Path, tmp_path: Path, case: str
) -> None:
    one, between = FILES[case]
    first: list[dict[str, NDArray[np.float64]]] = []
    second: list[dict[str, NDArray[np.float64]]] = []
    world = others_in_files()
    without = whole_path(prepared_files, tmp_path / "without", world, None, in_files, between, first)
    with_one = whole_path(prepared_files, tmp_path / "with", {**world, "p": one}, None, in_files, between, second)
    assert without == with_one
    assert [message[0] for message in without[0]] == WORDS
    moved = float(np.linalg.norm(first[0][codec.UPDATE] - second[0][codec.UPDATE]))
    rounding = 10.0 / 2**15 * first[0][codec.UPDATE].size ** 0.5
    assert moved <= RATE * CLIP / N_REF + rounding
    if np.isfinite(one.scale):  # the harness sees the patient at all
        assert moved > rounding or second[0][codec.COUNTS][0] == first[0][codec.COUNTS][0] + 1
    else:
        assert moved == 0


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("form", ["bmp", "dcm"])
def test_files_with_equal_pictures_are_settled_before_anything_leaves(
    prepared_files: Path, tmp_path: Path, form: Form
) -> None:
    world = others_in_files()
    copied = {**world, "p": patient("train", 0, seed=99, pictures="t0", form=form)}
    with pytest.raises(TwinsError, match=r"1 pairs of patient ids[\s\S]*p  t0"):
        whole_path(prepared_files, tmp_path / "unsettled", copied, None, in_files)
    assert SentList(tmp_path / "unsettled/sites/ash/state").read() == []
    settled = told_apart("p", "t0")
    with_one = whole_path(prepared_files, tmp_path / "with", copied, settled, in_files)
    assert whole_path(prepared_files, tmp_path / "without", world, settled, in_files) == with_one


# --- one sum ---


@pytest.fixture(scope="module")
def prepared_sums(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("sums") / "out"
    template = make_template(
        mode="plain",
        rounds=2,
        method={"adapter": "gaussian_head", "most_patients": 40, "min_patients": 2},
        features={"basis": "random", "dimensions": 16},
        encoding={"bits": 18, "precision_bits": 24, "value_bound": 1.0},
    )
    prepare(template, folder, images)
    for name in TRAINING[1:]:
        Federation(folder).site(name).features()
    set_budget(folder)
    return folder


@pytest.mark.parametrize(
    "case", ["one more who trains", "the only patient at all", "500 images", "images that are not finite"]
)
def test_nothing_that_leaves_of_one_sum_depends_on_one_patient_but_integers(
    prepared_sums: Path, tmp_path: Path, case: str
) -> None:
    world, one = ONE[case]
    first: list[dict[str, NDArray[np.float64]]] = []
    second: list[dict[str, NDArray[np.float64]]] = []
    without = whole_path(prepared_sums, tmp_path / "without", world, integers=first)
    assert without == whole_path(prepared_sums, tmp_path / "with", {**world, "p": one}, integers=second)
    assert [message[0] for message in without[0]] == WORDS
    scales = class_statistics.SCALES
    moved = [scale * (first[0][name] - second[0][name]).ravel() for name, scale in scales.items()]
    length = float(np.linalg.norm(np.concatenate(moved)))
    assert length <= class_statistics.SENSITIVITY + 1e-3
    assert (length > 0.1) == np.isfinite(one.scale)


# --- a memory of normal images ---

SUMS, DARK = 2, 0
"""Rounds that have a release, and the class that is normal."""


@pytest.fixture(scope="module")
def prepared_memory(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A study of anomalies, of one memory."""
    folder = tmp_path_factory.mktemp("memory") / "out"
    prepare(anomaly_template(mode="plain", rounds=SUMS + 1, privacy={"images_per_patient": 3}), folder, images)
    for name in TRAINING[1:]:
        Federation(folder).site(name).features()
    set_budget(folder)
    return folder


MEMORY = {
    "one more who trains": (others(), patient("train", DARK, DARK, 1, seed=99)),
    "one who is not normal": (others(), patient("train", 1, 2, seed=99)),
    "one more who validates": (others(), patient("val", DARK, seed=99)),
    "the only patient at all": ({}, patient("train", DARK, seed=99)),
    "500 images": (others(), patient("train", *([DARK] * 500), seed=99)),
    "images that are not finite": (others(), patient("train", DARK, seed=99, scale=float("nan"))),
    "huge features": (others(), patient("train", DARK, seed=99, scale=1e30)),
}


@pytest.mark.parametrize("case", MEMORY)
def test_nothing_that_leaves_of_a_memory_depends_on_one_patient_but_integers(
    prepared_memory: Path, tmp_path: Path, case: str
) -> None:
    world, one = MEMORY[case]
    first: list[dict[str, NDArray[np.float64]]] = []
    second: list[dict[str, NDArray[np.float64]]] = []
    without = whole_path(prepared_memory, tmp_path / "without", world, integers=first)
    assert without == whole_path(prepared_memory, tmp_path / "with", {**world, "p": one}, integers=second)
    assert [message[0] for message in without[0]] == WORDS[:3] * (SUMS + 1) + WORDS[-1:]
    # The first sums are around the same centroids; those of later rounds follow from what was released before.
    moved = [memory_sums.scale_of(name) * (second[0][name] - first[0][name]) for name in first[0]]
    length = float(np.linalg.norm(np.concatenate(moved)))
    assert length <= memory_sums.sensitivity(Federation(prepared_memory).agreed.initial.adapter) + 1e-2
    assert (length > 0.1) == (one.split == "train" and one.images[0][0] == DARK and bool(np.isfinite(one.scale)))
    # Nobody has paid for the histogram, be they there or not, nor for numbers of patients.
    for sent in (*first, *second):
        assert not any(sent[name].any() for name in sent if name.endswith("_patients"))
    assert not any(value.any() for sent in (first[-1], second[-1]) for value in sent.values())


# --- released means, for each use of them ---

USES: dict[str, dict[str, Any]] = {
    "synthesis": {"adapter": "low_rank", "rank": 2, "lmmd_weight": 1.0},
    "witness": {"adapter": "facmic", "lmmd_weight": 1.0},
    "attraction": {"adapter": "facmic", "lmmd_weight": 1.0},
}


@pytest.fixture(scope="module", params=USES)
def prepared_means(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "out"
    template = template_of_worlds(method=USES[request.param])
    private = template.privacy.model_copy(update={"lmmd_use": request.param})
    prepare(template.model_copy(update={"privacy": private}), folder, images)
    for name in TRAINING[1:]:
        Federation(folder).site(name).features()
    set_budget(folder, 100_000)  # so many that means are worth their cost
    return folder


def left_with(share: float, *names: str) -> Callable[[Path], None]:
    """Ids that the operator has said are one patient, who has this share of the budget left after another study."""

    def before(folder: Path) -> None:
        Federation(folder).site("ash")
        everything = mu_squared_of(8.0, 1e-5)
        with opened(ledger_folder(read_site_file(folder / "sites/ash/site.toml"))) as ledger:
            ledger.register({name: (name.encode(),) for name in names})
            for name in names[1:]:
                ledger.link(names[0], name)
            spent = Mechanism(1.0, ((1 - share) * everything + 1e-9) ** -0.5, 1)
            ledger.reserve(spent, "before", "", {ledger.person(names[0])})

    return before


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.06, 0.18, 0.3, 0.45, 0.8, 1.0])
def test_with_class_means_nothing_depends_on_one_patient_in_three_splits(
    prepared_means: Path, tmp_path: Path, share: float
) -> None:
    one = {
        "p": patient("train", 1, 2, seed=99),
        "q": patient("unlabelled", 0, seed=98),
        "r": patient("val", 0, seed=97),
    }
    before = left_with(share, *one)
    without = whole_path(prepared_means, tmp_path / "without", others(), before)
    assert without == whole_path(prepared_means, tmp_path / "with", {**others(), **one}, before)
    assert [message[0] for message in without[0]] == WORDS


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, 1e30, float("nan")])
def test_with_class_means_nothing_depends_on_one_patient_without_labels(
    prepared_means: Path, tmp_path: Path, scale: float
) -> None:
    one = patient("unlabelled", *[0] * 500, seed=99, scale=scale)
    without = whole_path(prepared_means, tmp_path / "without", others())
    assert without == whole_path(prepared_means, tmp_path / "with", {**others(), "p": one})
    assert [message[0] for message in without[0]] == WORDS


# --- the integers, by how much ---


class Outputs(NamedTuple):
    updates: list[NDArray[np.float64]]
    counts: list[tuple[int, int]]
    sums: list[NDArray[np.float64]]
    """Of validation patients, before noise; counts are these rounded, half to even."""
    entries: int


EXACT_COUNTS = validation.exact_counts


def rounds_on(
    prepared: Path, folder: Path, worlds: list[World], noise: Noise = no_noise, links: tuple[tuple[str, str], ...] = ()
) -> Outputs:
    """All rounds of several runs, each on data of its own, always at the same adapters."""
    file = read_site_file(prepared / "sites/ash/site.toml")
    agreed = Federation(prepared).agreed
    (folder / "identity").mkdir(parents=True)
    privacy = SitePrivacy(epsilon=8.0, n_ref=N_REF, run_epsilon=4.0)
    places = {"state": str(folder / "state"), "identity": str(folder / "identity"), "privacy": privacy}
    file = file.model_copy(update=places)
    heads = LedgerHeads(folder / "heads")
    outputs = Outputs([], [], [], 0)
    initial = agreed.initial.adapter

    def quantise(update: NDArray[np.float64], draws: NDArray[np.float64], counts: tuple[int, int]) -> NDArray[np.int64]:
        outputs.updates.append(update)
        outputs.counts.append(counts)
        return np.zeros(1, dtype=np.int64)

    def exact_counts(right: NDArray[np.bool_], patients: Sequence[str]) -> NDArray[np.float64]:
        outputs.sums.append(EXACT_COUNTS(right, patients))
        return outputs.sums[-1]

    with unguarded(), mock.patch.object(validation, "exact_counts", exact_counts):
        for number, world in enumerate(worlds):
            rounds = PrivateRounds(file, agreed, heads, "1" * 64, None, noise)
            features = features_of(world, agreed.initial.prompt_features.shape[1])
            rounds.settle(features.digests, features.digests)
            for first, second in links if number == 0 else ():
                with opened(ledger_folder(file)) as ledger:
                    ledger.link(first, second)
            run = f"{number:064x}"
            for place in (1, 2):
                position = RoundPosition(run, "0" * 64, "0" * 64, 0, place)
                rounds.integers(
                    position,
                    f"state {place}",
                    initial,
                    initial,
                    SiteRun(folder / run),
                    lambda found=features: found,
                    quantise,
                )  # type: ignore[misc]
    return outputs._replace(entries=Ledger(ledger_folder(file)).head[0])


def compare(prepared: Path, folder: Path, without: list[World], with_one: list[World]) -> None:
    """No output may move by more than what the ledger charges one patient for."""
    first = rounds_on(prepared, folder / "without", without)
    second = rounds_on(prepared, folder / "with", with_one)
    assert (first.entries, len(first.updates)) == (second.entries, len(second.updates))
    for one, other in zip(first.updates, second.updates, strict=True):
        assert np.linalg.norm(one - other) <= RATE * CLIP / N_REF * (1 + 1e-9)
    for exact, moved in zip(first.sums, second.sums, strict=True):
        assert np.linalg.norm(exact - moved) <= validation.SENSITIVITY * (1 + 1e-9)
    for counts, others_too in zip(first.counts, second.counts, strict=True):
        assert max(abs(one - other) for one, other in zip(counts, others_too, strict=True)) <= 2  # 0.5 and 1.5: 0 and 2


LABEL = st.integers(0, 2)
PATIENT = st.builds(
    lambda split, labels, seed, scale: patient(split, *labels, seed=seed, scale=scale),
    st.sampled_from(SPLITS),
    st.lists(LABEL, min_size=1, max_size=5),
    st.integers(40, 90),
    st.sampled_from([1.0, 1.0, 1e-12, 1e30, float("nan")]),
)
WORLD = st.dictionaries(st.sampled_from([f"q{n}" for n in range(8)]), PATIENT, max_size=6)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WORLD, WORLD, PATIENT, PATIENT, st.booleans())
@example({"q": patient("val", 0, 0, seed=40)}, {}, patient("train", 0, 0, seed=40), patient("val", 0, seed=40), False)
def test_random_neighbours_through_two_runs(
    prepared_worlds: Path,
    tmp_path_factory: pytest.TempPathFactory,
    world: World,
    later: World,
    one: Patient,
    then: Patient,
    again: bool,
) -> None:
    """A patient that is there in one run or in both, in whatever splits, beside whatever others."""
    folder = tmp_path_factory.mktemp("pair")
    compare(
        prepared_worlds,
        folder,
        [world, later, world],
        [{**world, "p": one}, {**later, "p": then} if again else later, {**world, "p": then}],
    )
    shutil.rmtree(folder)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WORLD, PATIENT)
def test_random_neighbours_over_the_whole_path(
    prepared_worlds: Path, tmp_path_factory: pytest.TempPathFactory, world: World, one: Patient
) -> None:
    folder = tmp_path_factory.mktemp("paths")
    without = whole_path(prepared_worlds, folder / "without", world)
    assert without == whole_path(prepared_worlds, folder / "with", {**world, "p": one})
    assert [message[0] for message in without[0]] == WORDS
    shutil.rmtree(folder)


def test_a_validation_patient_who_turns_to_training_takes_nobody_along(prepared_worlds: Path, tmp_path: Path) -> None:
    world = others()
    moves = {**world, "p": patient("val", 1, seed=99)}
    compare(prepared_worlds, tmp_path, [world, world], [moves, {**world, "p": patient("train", 1, seed=99)}])


def test_with_every_patient_in_two_splits_and_linked_ids(prepared_worlds: Path, tmp_path: Path) -> None:
    """Two ids that were linked are one patient, whose gradient is clipped once."""
    world = others()
    twins = {**world, "p": patient("train", 1, seed=99), "q": patient("train", 2, seed=98)}
    alone = rounds_on(prepared_worlds, tmp_path / "alone", [world, world])
    both = rounds_on(prepared_worlds, tmp_path / "both", [twins, twins], links=(("p", "q"),))
    # Who trains is not counted among those who validate, under whichever id.
    apart = {**world, "p": patient("train", 1, seed=99), "q": patient("val", 2, seed=98)}
    torn = rounds_on(prepared_worlds, tmp_path / "torn", [apart, apart], links=(("p", "q"),))
    assert torn.counts == alone.counts
    for one, other in zip(alone.updates, both.updates, strict=True):
        assert np.linalg.norm(one - other) <= RATE * CLIP / N_REF * (1 + 1e-9)


def test_counts_are_of_the_adapter_in_use_and_not_of_that_at_which_a_round_begins(
    prepared_worlds: Path, tmp_path: Path
) -> None:
    """They differ if the study takes the mean of the adapters."""
    file, agreed = read_site_file(prepared_worlds / "sites/ash/site.toml"), Federation(prepared_worlds).agreed
    (tmp_path / "identity").mkdir()
    file = file.model_copy(update={"state": str(tmp_path / "state"), "identity": str(tmp_path / "identity")})
    features = features_of(others(), agreed.initial.prompt_features.shape[1])
    prompts, initial, counted = agreed.initial.prompt_features, agreed.initial.adapter, []
    # Class vectors that lie on the validation images, so that all are right.
    used = {"offsets": np.stack([features.val.x[features.val.y == k].sum(axis=0) for k in range(3)]) - prompts}
    with unguarded():
        rounds = PrivateRounds(file, agreed, LedgerHeads(tmp_path / "heads"), "1" * 64, None, no_noise)
        rounds.settle(features.digests, features.digests)
        for place, (begun, taken) in enumerate([(initial, used), (used, initial)], 1):
            rounds.integers(
                *(RoundPosition("5" * 64, "0" * 64, "0" * 64, 0, place), f"state {place}", begun, taken),
                *(SiteRun(tmp_path / "run"), lambda: features),
                lambda update, draws, counts: (counted.append(counts), np.zeros(1, dtype=np.int64))[1],
            )
    assert counted[0] == (3, 3)
    assert counted[1][1] < 3


def test_who_can_pay_for_one_of_two_means_is_left_out_of_the_other_in_silence(
    prepared_worlds: Path, tmp_path: Path
) -> None:
    """A patient with labelled and unlabelled images, whose budget ends between the two: nobody else may notice."""
    agreed = Federation(prepared_worlds).agreed
    changes = {"adapter": "low_rank", "rank": 2, "lmmd_weight": 1.0}
    study = agreed.study.model_copy(
        update={
            "method": agreed.study.method.model_copy(update=changes),
            "privacy": agreed.study.privacy.model_copy(update={"lmmd_use": "synthesis"}),
        }
    )
    prompts = agreed.initial.prompt_features
    initial = initial_parameters(study.method, prompts.shape[1], prompts, 1)
    everything, releases = mu_squared_of(8.0, 1e-5), []
    for place, left in enumerate([1.0, 1.5 * LMMD_SHARE, 0.5 * LMMD_SHARE]):
        folder = tmp_path / str(place)
        (folder / "identity").mkdir(parents=True)
        privacy = SitePrivacy(epsilon=8.0, n_ref=100_000)  # so many that means are worth their cost
        places = {"state": str(folder / "state"), "identity": str(folder / "identity"), "privacy": privacy}
        file = read_site_file(prepared_worlds / "sites/ash/site.toml").model_copy(update=places)
        world = {**others(), "p": patient("train", 1, seed=99), "q": patient("unlabelled", 1, seed=98)}
        world |= {"r": patient("val", 1, seed=97), "s": patient("unlabelled", 1, seed=96)}
        features = features_of(world, prompts.shape[1])
        rounds = PrivateRounds(
            file, AgreedStudy(study, agreed.initial), LedgerHeads(folder / "heads"), "1" * 64, None, no_noise
        )
        rounds.settle(features.digests, features.digests)
        with opened(ledger_folder(file)) as ledger:
            ledger.link("p", "q")
            ledger.link("r", "s")
            before = Mechanism(1.0, ((1 - left) * everything + 1e-9) ** -0.5, 1)
            ledger.reserve(before, "before", "", {ledger.person("p")})
        with unguarded():
            rounds.integers(
                *(RoundPosition("5" * 64, "0" * 64, "0" * 64, 0, 1), "state", initial, initial),
                *(SiteRun(folder / "run"), lambda found=features: found),
                lambda update, draws, counts: np.zeros(1, dtype=np.int64),
            )  # type: ignore[misc]
        found = Ledger(ledger_folder(file))
        for one in ("p", "r"):
            releases.append([event.seq in found.taken_part(one) for event in found.of_run("5" * 64)])
    # Labelled means, unlabelled means, the round's training and its validation counts: four entries each time.
    assert releases[::2] == [[True, True, True, False], [True, False, False, False], [False] * 4]
    # Counts cost all that was declared for the run, so that whoever is in its means is not counted as well.
    assert releases[1::2] == [[False, True, False, False]] * 3


def test_no_image_is_judged_beside_another_one() -> None:
    """In a batch one image more may move the last bit of another's logits, and turn what is right into wrong."""
    x, y = np.eye(4, dtype=np.float32), np.zeros(4, dtype=np.int64)

    def adapter(images: torch.Tensor) -> torch.Tensor:
        return torch.eye(2, dtype=torch.float64)[[int(len(images) > 1)] * len(images)]

    none = Labelled(x[:0], y[:0])
    features = SiteFeatures(none, Labelled(x, y), none, x[:0], 0, 0, {"val": tuple("abcd")})
    site = SimpleNamespace(
        _adapter=lambda used: adapter,
        _agreed=SimpleNamespace(study=SimpleNamespace(classes=range(2))),
        _noise=no_noise,
    )
    plan, people = SimpleNamespace(validation_noise_multiplier=1.0), {"val": "abcd"}
    assert PrivateRounds._noisy_counts(site, plan, {}, features, people, {"a", "b", "d"}) == (3, 3)  # type: ignore[arg-type]


def test_the_harness_sees_a_patient_at_all(prepared_worlds: Path, tmp_path: Path) -> None:
    """Without this, everything above would pass because nothing is compared."""
    one = rounds_on(prepared_worlds, tmp_path / "one", [others()])
    two = rounds_on(prepared_worlds, tmp_path / "two", [{**others(), "p": patient("train", 1, seed=99)}])
    assert np.linalg.norm(one.updates[0] - two.updates[0]) == pytest.approx(RATE * CLIP / N_REF, rel=1e-6)
    assert dataclasses.is_dataclass(SiteFeatures)
