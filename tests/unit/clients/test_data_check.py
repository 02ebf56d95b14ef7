"""``data check``: copies, leaks and unusable files are found; a killed check goes on where it was."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from secure_fed.cli import main
from secure_fed.clients import duplicates
from secure_fed.clients.data import SiteImage
from secure_fed.clients.data_check import check_data, noted
from secure_fed.clients.decoding import MOST_WORKERS
from secure_fed.clients.duplicates import (
    Fingerprint,
    exact_copies,
    fingerprint,
    fingerprints,
    inseparable,
    near_twins,
)
from secure_fed.clients.features import FeatureCache
from secure_fed.clients.rules import Facts, Rules
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.tomlfile import write_toml

COMMAND = [sys.executable, "-P", "-m", "secure_fed.cli", "data", "check", "--site"]


def picture(seed, size=64):
    """Smooth structure, as in photographs; different ones look different."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 12), dtype=np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC)


def looking(bits):
    return Fingerprint(bytes(32), bytes(bits), 1, 1)


def test_a_note_on_one_file_is_not_buried_under_one_that_all_files_have():
    images = [SiteImage(Path(f"{number}.dcm"), "p", 0, "train") for number in range(4)]
    notes = [("common",), ("common",), ("common", "rare"), ()]
    looks = [looking(range(32))._replace(facts=Facts(notes=note)) for note in notes]
    found = noted(list(zip(images, looks, strict=True)))
    assert found == ["2.dcm: rare", "0.dcm: common", "1.dcm: common", "2.dcm: common"]


def test_fingerprints_know_copies_in_any_form_and_near_twins_by_look(tmp_path):
    image = picture(0)
    image.save(tmp_path / "a.bmp")
    image.convert("RGB").save(tmp_path / "b.png")
    image.save(tmp_path / "c.jpg", quality=70)
    first, second, third = (fingerprint(Image.open(tmp_path / name)) for name in ("a.bmp", "b.png", "c.jpg"))
    other = fingerprint(picture(1))
    assert first == second
    assert first.pixels != third.pixels
    assert exact_copies([first, None, third, second, other]) == [[0, 3]]
    assert near_twins([first, None, third, second, other]) == [[0, 2, 3]]
    assert near_twins([None, None]) == near_twins([]) == []


def test_a_picture_of_few_grey_levels_is_told_as_masks_have_them_whatever_its_file():
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for few in (2, 8, 9, 1):
        notes = fingerprint(Image.fromarray(levels % few * 20), Facts(notes=("first",))).facts.notes
        assert notes[0] == "first"
        assert any("as masks, labels and drawings have" in note for note in notes) == (few in (2, 8))


def test_files_are_read_once_where_nothing_is_known_of_them_and_decoded_once_where_all_is(tmp_path, monkeypatch):
    images = []
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
        images.append(SiteImage(tmp_path / f"{number}.png", str(number), 0, "train"))
    with FeatureCache(tmp_path / "features.sqlite") as cache:
        with monkeypatch.context() as patch:
            patch.setattr(duplicates, "identities", None)
            first = fingerprints(images, cache)
            other = fingerprints(images, cache, rules=Rules(background="white"))  # by these nothing is known either
            assert all(other.found)
        monkeypatch.setattr(duplicates, "_fingerprinted", None)
        again = fingerprints(images, cache)
    assert [one.look for one in again.found if one] == [one.look for one in first.found if one]
    assert all(first.found)
    assert not first.unreadable


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.integers(0, 255), max_size=12), max_size=12), st.integers(0, 20))
def test_near_twins_are_the_connected_components(flipped, bits):
    looks = np.zeros((len(flipped), 256), dtype=np.uint8)
    for row, places in zip(looks, flipped, strict=True):
        row[list(places)] = 1
    found = [looking(np.packbits(row)) for row in looks]
    groups = {index: {index} for index in range(len(looks))}
    for i, j in combinations(range(len(looks)), 2):
        if np.count_nonzero(looks[i] != looks[j]) <= bits and groups[i] is not groups[j]:
            groups[i] |= groups[j]
            for member in groups[j]:
                groups[member] = groups[i]
    expected = sorted({tuple(sorted(group)) for group in groups.values() if len(group) > 1})
    assert near_twins(found, bits) == [list(group) for group in expected]


def test_patients_with_one_anothers_images_are_inseparable_unless_all_look_alike():
    looks = [looking(np.packbits(np.random.default_rng(i).integers(0, 2, 256))) for i in range(4)]
    images = [SiteImage(Path(str(i)), name, 0, "train") for i, name in enumerate("abbcde")]
    found = [looks[0], looks[0], looks[1], looks[1], looks[2], looks[3]]
    assert inseparable(images, found) == [frozenset("abc")]
    # Thirty patients whose images the hash does not tell apart, two of whom share a picture.
    alike = [Fingerprint(bytes([i]) * 32, bytes(32), 1, 1) for i in (*range(30), 29)]
    owners = [SiteImage(Path(str(i)), f"p{i:02}", 0, "train") for i in range(31)]
    assert inseparable(owners, alike) == [frozenset({"p29", "p30"})]


@pytest.fixture
def hospital(federation, tmp_path):
    """Site ash with a folder of its own, to be filled."""
    path = federation.folder / "sites" / "ash" / "site.toml"
    file = read_site_file(path)
    folder = tmp_path / "hospital"
    folder.mkdir()
    data = file.data.model_copy(update={"folder": str(folder), "unit": "patient"})
    write_toml(path, file.model_copy(update={"data": data}))
    return path, folder


def write(folder, rows, columns="path,patient,label,split"):
    (folder / "manifest.csv").write_text("\n".join([columns, *(",".join(row) for row in rows)]) + "\n")


@pytest.fixture
def check(monkeypatch, capsys):
    """Runs the command as its entry point does; exit code, stdout, stderr."""

    def run(path, *arguments):
        monkeypatch.setattr(sys, "argv", ["secfacmic", "data", "check", "--site", str(path), *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), *capsys.readouterr()

    return run


def test_a_leaking_manifest_is_reported_and_refused(hospital, check):
    path, folder = hospital
    for number in range(6):
        picture(number).save(folder / f"{number}.png")
    picture(0).save(folder / "again.bmp")  # the same picture in another format
    picture(1).save(folder / "near.jpg", quality=60)
    picture(3).resize((200, 20)).save(folder / "wide.png")
    (folder / "broken.png").write_bytes((folder / "2.png").read_bytes()[:60])
    rows = [(f"{number}.png", f"p{number}", "dark", "train") for number in range(6)]
    rows += [("again.bmp", "q1", "dark", "test"), ("near.jpg", "q2", "light", "val")]
    rows += [("wide.png", "q3", "", "unlabelled"), ("broken.png", "q4", "light", "test")]
    write(folder, rows)
    code, text, errors = check(path, "--json")
    assert code == 24
    assert "1 pictures lie in more than one split" in errors
    report = json.loads(text)
    assert report["classes"]["dark"] == {"train": 6, "val": 0, "test": 1}
    assert report["missing_classes"] == ["striped"]
    assert report["patients"] == {"train": 6, "val": 1, "test": 2, "unlabelled": 1, "all": 10}
    assert report["exact_copies"]["across_splits"] == report["exact_copies"]["groups"] == 1
    # The hash does not see proportions: the wide one is a twin of what it was made of.
    twins = report["near_twins"]["listed"]
    assert report["near_twins"]["across_splits"] == 2
    assert [[image["split"] for image in group] for group in twins] == [["train", "val"], ["train", "unlabelled"]]
    assert report["unreadable"]["count"] == 1
    assert "broken.png" in report["unreadable"]["listed"][0]
    assert report["far_from_size"]["listed"] == [f"{folder}/wide.png: 200 x 20"]
    assert len(report["leaks"]) == 1
    # Near twins alone are told, not refused.
    write(folder, [row for row in rows if row[0] != "again.bmp"])
    code, text, _ = check(path)
    assert code == 0
    assert "near twins: 2 groups, 4 images; 2 across splits" in text
    write(folder, [*rows[:-1], ("broken.png", "p0", "dark", "val")])
    code, _, errors = check(path)
    assert code == 22
    assert "patient 'p0' is in split 'val'" in errors


def test_the_page_shows_what_the_check_found(hospital, check, tmp_path):
    path, folder = hospital
    for number in range(6):
        picture(number).save(folder / f"{number}.png")
    Image.new("L", (64, 64), 9).save(folder / "blank.png")
    picture(7, 20).save(folder / "tiny.png")
    Image.merge("RGB", [picture(8), picture(9), picture(10)]).save(folder / "colour.png")
    picture(0).save(folder / "again.bmp")
    names = [f"{number}.png" for number in range(6)] + ["blank.png", "tiny.png", "colour.png", "again.bmp"]
    rows = [(name, f"patient {name}", "dark", "train" if name != "again.bmp" else "test") for name in names]
    write(folder, rows)
    code, _, _ = check(path, "--html", str(tmp_path / "page.html"))
    assert code == 24  # the page is there all the same
    text = (tmp_path / "page.html").read_text()
    assert "1 picture lies in more than one split" in text
    shown = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]+)"', text)
    assert {"blank.png", "tiny.png", "colour.png"} <= set(shown)
    assert not {"1.png", "2.png"} & set(shown)


def test_drawn_splits_keep_copies_and_near_twins_together(hospital, federation, check):
    path, folder = hospital
    rows = []
    for number in range(24):
        picture(number).save(folder / f"{number}.png")
        picture(number).save(folder / f"{number}-twin.jpg", quality=60)
        label = "dark" if number % 2 else "light"
        rows += [(f"{number}.png", f"p{number}", label), (f"{number}-twin.jpg", f"q{number}", label)]
    write(folder, rows, "path,patient,label")
    code, text, _ = check(path, "--json")
    assert code == 0
    report = json.loads(text)
    assert (report["near_twins"]["groups"], report["near_twins"]["across_splits"]) == (24, 0)
    assert report["patients"]["train"] < report["patients"]["all"] == 48
    assert all(count % 2 == 0 for count in report["patients"].values())
    features = federation.site("ash").features()
    assert all(
        {patient[1:] for patient in features.patients[one]}.isdisjoint(
            patient[1:] for patient in features.patients[two]
        )
        for one, two in combinations(features.patients, 2)
    )


def rows_of(cache, table):
    try:
        return sqlite3.connect(f"file:{cache}?mode=ro", uri=True).execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    except sqlite3.Error:
        return 0


def killed_midway(command, cache, table):
    """Kill a process (and what it started dies with it) once it has kept something."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = rows_of(cache, table)
    deadline = time.monotonic() + 120
    while rows_of(cache, table) <= before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return rows_of(cache, table) - before


@pytest.mark.slow
def test_a_killed_check_and_a_killed_encoding_go_on(hospital, federation, check):
    path, folder = hospital
    count = 1500
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (24, 24), dtype=np.uint8)).save(folder / f"{number}.bmp")
    write(folder, [(f"{n}.bmp", f"p{n // 3}", "dark" if n % 2 else "light", "train") for n in range(count)])
    cache = federation.folder / "sites" / "ash" / "state" / "features.sqlite"
    before = rows_of(cache, "fingerprints")
    kept = killed_midway([*COMMAND, str(path)], cache, "fingerprints")
    assert 0 < kept < count
    assert check(path)[0] == 0
    assert rows_of(cache, "fingerprints") == before + count
    code = "import sys, pathlib, secure_fed.clients.site as s; s.Site.open(pathlib.Path(sys.argv[1])).features()"
    kept = killed_midway([sys.executable, "-P", "-c", code, str(path)], cache, "features")
    assert 0 < kept < count
    features = federation.site("ash").features()
    assert features.encoded == count - kept
    assert len(features.train.y) == count


def test_mirrored_views_are_counted_where_it_is_said_how_long_encoding_takes(federation):
    file = read_site_file(federation.folder / "sites" / "ash" / "site.toml")
    study = federation.agreed.study
    mirrored = study.model_copy(update={"backbone": study.backbone.model_copy(update={"mirrored": True})})
    found = [check_data(file, replace(federation.agreed, study=one)) for one in (study, mirrored)]
    plain, both = (one["encoding"] for one in found)
    trained = sum(splits["train"] for splits in found[0]["classes"].values()) + found[0]["unlabelled"]
    assert 0 < trained < plain["images"] == found[0]["images"]
    assert both["images"] == plain["images"] + trained
    assert both["seconds"] == pytest.approx(
        both["seconds_per_image"] * both["images"] / min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    )
