"""Phantoms: files fit their manifests, patients stay whole, pictures differ by class and by scanner."""

from __future__ import annotations

import csv
import hashlib
import multiprocessing
import os
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from secure_fed.core.errors import DataError, OutputError, StorageError
from secure_fed.lab.phantoms import (
    CLASSES,
    SIZE,
    PhantomSite,
    SliceFacts,
    default_sites,
    draw_facts,
    make_phantoms,
    render_slice,
    scanner_of,
)

SITE = PhantomSite("north", patients=80, scanner=3, class_mix=(0.4, 0.3, 0.2, 0.1), unlabelled=0.25)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pixels(folder: Path) -> tuple[npt.NDArray[np.float64], list[str], list[str]]:
    rows = [row for row in rows_of(folder) if row["label"]]
    images = [np.asarray(Image.open(folder / row["path"]).resize((20, 20), Image.Resampling.BOX)) for row in rows]
    return (
        np.stack(images).reshape(len(rows), -1) / 255.0,
        [r["label"] for r in rows],
        [r["split"] for r in rows],
    )


@pytest.fixture(scope="module")
def north(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantoms")
    make_phantoms(root, [SITE], seed=7)
    return root / "north"


def test_same_seed_same_files_whatever_the_other_sites(north: Path, tmp_path: Path) -> None:
    make_phantoms(tmp_path, [PhantomSite("south", 3, 4, (1, 1, 1, 1), 0.0), SITE], seed=7)
    assert contents(tmp_path / "north") == contents(north)


@pytest.mark.parametrize(
    ("site", "seed"),
    [
        (SITE, 8),
        (replace(SITE, name="east"), 7),
        (replace(SITE, scanner=4), 7),
        (replace(SITE, patients=79), 7),
        (replace(SITE, unlabelled=0.2), 7),
    ],
)
def test_other_seed_or_site_other_files(north: Path, tmp_path: Path, site: PhantomSite, seed: int) -> None:
    make_phantoms(tmp_path, [site], seed=seed)
    pictures = {digest for name, digest in contents(tmp_path / site.name).items() if name.endswith(".png")}
    assert not pictures & set(contents(north).values())


def test_manifest_names_every_picture_once(north: Path) -> None:
    rows = rows_of(north)
    assert list(rows[0]) == ["path", "patient", "label", "split"]
    on_disk = {str(path.relative_to(north)) for path in (north / "images").iterdir()}
    assert sorted(row["path"] for row in rows) == sorted(on_disk)
    for row in rows:
        with Image.open(north / row["path"]) as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", "L", (SIZE, SIZE))
            low, high = picture.getextrema()
            assert low < 60 < 200 < high


def test_patients_are_whole(north: Path) -> None:
    rows = rows_of(north)
    by_patient: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_patient.setdefault(row["patient"], []).append(row)
    assert len(by_patient) == SITE.patients
    for members in by_patient.values():
        assert 1 <= len(members) <= 4
        assert len({(row["label"], row["split"]) for row in members}) == 1
    assert {len(members) for members in by_patient.values()} == {1, 2, 3, 4}


def test_class_mix_and_split_shares(north: Path) -> None:
    patients = {row["patient"]: (row["label"], row["split"]) for row in rows_of(north)}
    counts = Counter(patients.values())
    assert counts["", "unlabelled"] == 20
    labelled = {label: sum(counts[label, s] for s in ("train", "val", "test")) for label in CLASSES}
    assert labelled == dict(zip(CLASSES, (24, 18, 12, 6), strict=True))
    for label, total in labelled.items():
        for split, share in (("train", 0.60), ("val", 0.15), ("test", 0.25)):
            assert abs(counts[label, split] - share * total) <= 1
    assert all((split == "unlabelled") == (label == "") for label, split in patients.values())


def test_classes_show_and_scanners_differ(tmp_path: Path) -> None:
    mix = (1.0, 1.0, 1.0, 1.0)
    home, away = PhantomSite("home", 260, 1, mix, 0.0), PhantomSite("away", 100, 2, mix, 0.0)
    assert scanner_of(1).kind != scanner_of(2).kind
    make_phantoms(tmp_path, [home, away], seed=0)
    x, labels, splits = pixels(tmp_path / "home")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    test = np.array(splits) == "test"
    y = np.array(labels)
    model.fit(x[~test], y[~test])
    at_home = balanced_accuracy_score(y[test], model.predict(x[test]))
    x_away, y_away, _ = pixels(tmp_path / "away")
    elsewhere = balanced_accuracy_score(y_away, model.predict(x_away))
    assert at_home > 0.45
    assert elsewhere < at_home - 0.10


def test_pictures_keep_to_their_facts() -> None:
    scanner = scanner_of(1)
    healthy = render_slice(SliceFacts("no tumour", "ventricles"), scanner, patient=5).astype(float)
    facts = SliceFacts(
        "meningioma", "ventricles", x=-0.5, y=0.0, radius=0.2, shape="round", margin="sharp",
        texture="uniform", contact="dura",
    )  # fmt: skip
    change = np.abs(render_slice(facts, scanner, patient=5) - healthy)
    left, right = change[:, : SIZE // 2].mean(), change[:, SIZE // 2 :].mean()
    assert left > 3 * right
    assert facts.side == "left"
    assert facts.region == "temporal lobe"


def test_kinds_differ_in_place_and_shape() -> None:
    rng = np.random.default_rng(0)
    drawn = {label: [draw_facts(label, rng) for _ in range(200)] for label in CLASSES}
    assert all(facts.radius == 0 for facts in drawn["no tumour"])
    assert all(facts.side == "midline" and facts.level == "base" for facts in drawn["pituitary tumour"])
    assert all(facts.contact in ("dura", "falx") for facts in drawn["meningioma"])
    assert all(facts.contact == "inside" for facts in drawn["glioma"])
    blurred = {label: sum(f.margin == "blurred" for f in drawn[label]) for label in CLASSES}
    assert blurred["glioma"] > 100 > 50 > blurred["meningioma"]
    for label in CLASSES[1:]:
        for facts in drawn[label]:
            assert np.hypot(facts.x / 0.8, facts.y) < 0.84
            assert facts.region
    with pytest.raises(DataError, match="no class"):
        draw_facts("metastasis", rng)


def test_default_sites_differ() -> None:
    sites = default_sites(5)
    assert len({site.name for site in sites}) == len({site.scanner for site in sites}) == 5
    assert len({scanner_of(site.scanner).bias for site in sites}) == 5
    with pytest.raises(DataError, match="at least 1"):
        default_sites(0)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a/b"},
        {"name": ".."},
        {"patients": 0},
        {"scanner": -1},
        {"unlabelled_scanner": -1},
        {"unlabelled": 1.0},
        {"class_mix": (0.0, 0.0, 0.0, 0.0)},
        {"class_mix": (1.0, -0.1, 1.0, 1.0)},
    ],
)
def test_senseless_sites_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    site = PhantomSite(**{**SITE.__dict__, **change})
    with pytest.raises(DataError, match="expected"):
        make_phantoms(tmp_path, [site], seed=0)
    assert not any(tmp_path.iterdir())


def test_refuses_repeated_names_and_used_folders(tmp_path: Path) -> None:
    small = PhantomSite("one", 2, 0, (1, 1, 1, 1), 0.0)
    with pytest.raises(DataError, match="once"):
        make_phantoms(tmp_path, [small, small], seed=0)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        make_phantoms(tmp_path, [small], seed=0)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["notes.txt"]


def die(*_: object) -> None:
    assert multiprocessing.parent_process() is not None
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secure_fed.lab.phantoms.os.sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr("secure_fed.lab.phantoms._make_site", die)
    with pytest.raises(StorageError, match="a process that draws phantoms was ended"):
        make_phantoms(tmp_path, default_sites(2), 0)


@pytest.mark.slow
def test_two_thousand_pictures_in_twenty_seconds(tmp_path: Path) -> None:
    start = time.process_time()
    make_phantoms(tmp_path, [PhantomSite("many", 800, 1, (1, 1, 1, 1), 0.0)], seed=0)
    taken = time.process_time() - start
    count = len(rows_of(tmp_path / "many"))
    assert taken * 2000 / count < 20


def test_unlabelled_patients_may_have_another_scanner_and_nothing_else_changes(tmp_path: Path) -> None:
    moved = replace(SITE, unlabelled_scanner=9)
    make_phantoms(tmp_path / "one", [SITE], seed=7)
    make_phantoms(tmp_path / "two", [moved], seed=7)
    one, two = (tmp_path / name / SITE.name for name in ("one", "two"))
    assert (one / "manifest.csv").read_bytes() == (two / "manifest.csv").read_bytes()
    rows = list(csv.DictReader((one / "manifest.csv").open()))
    assert {row["split"] == "unlabelled" for row in rows} == {True, False}
    for row in rows:
        equal = (one / row["path"]).read_bytes() == (two / row["path"]).read_bytes()
        assert equal == (row["split"] != "unlabelled")
