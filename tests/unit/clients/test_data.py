import csv
import os
import unicodedata
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_fed.clients.data import DRAWN_ALONE, Choice, _largest_remainder, read_data
from secure_fed.clients.files import Notes
from secure_fed.core.errors import DataError, LabelError, ManifestError
from secure_fed.protocol.simulation_table import Shares
from tests.unit.clients.test_dicom import RAMP, as_bytes, dicom

CLASSES = ("zebra", "ant", "mole")  # not in alphabetical order
SHARES = Shares(train=0.6, val=0.1, test=0.1, unlabelled=0.2)


def folders(root, counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03}.png").touch()
    return root


def manifest(root, rows, columns=("path", "patient", "label", "split"), files=True):
    root.mkdir(exist_ok=True)
    for row in rows:
        if files and row[0]:
            (root / row[0]).parent.mkdir(parents=True, exist_ok=True)
            (root / row[0]).touch()
    with (root / "manifest.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(rows)
    return root


def test_class_ids_come_from_the_study(tmp_path):
    folders(tmp_path, {"mole": 10, "zebra": 10, "ant": 10})
    images = read_data(tmp_path, CLASSES, "image", SHARES, 0)
    assert all(image.label == CLASSES.index(image.path.parent.name) for image in images if image.label is not None)
    assert {image.label for image in images} == {0, 1, 2, None}
    assert [image.path for image in images] == sorted(image.path for image in images)
    assert all(image.patient == image.path.relative_to(tmp_path).as_posix() for image in images)


def test_a_class_may_be_missing_and_unlabelled_images_may_lie_beside(tmp_path):
    folders(tmp_path, {"ant": 10, "unlabelled": 4})
    images = read_data(tmp_path, CLASSES, "image", Shares(train=0.5, val=0.5, test=0, unlabelled=0), 0)
    assert Counter((image.label, image.split) for image in images) == {
        (1, "train"): 5,
        (1, "val"): 5,
        (None, "unlabelled"): 4,
    }


def test_hidden_and_housekeeping_files_are_passed_over_and_subfolders_searched(tmp_path):
    folders(tmp_path, {"ant": 2, "ant/deeper": 1, ".cache": 3, "ant/.thumbs": 2})
    (tmp_path / "ant" / ".DS_Store").touch()
    (tmp_path / "ant" / "Thumbs.db").touch()
    (tmp_path / "README.txt").touch()
    images = read_data(tmp_path, CLASSES, "image", SHARES, 0)
    assert [image.path.relative_to(tmp_path).as_posix() for image in images] == [
        "ant/000.png",
        "ant/001.png",
        "ant/deeper/000.png",
    ]


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_data(tmp_path / "absent", CLASSES, "image", SHARES, 0)
    with pytest.raises(DataError, match="no image"):
        read_data(tmp_path, CLASSES, "image", SHARES, 0)
    (tmp_path / "ant").mkdir()
    with pytest.raises(DataError, match="no image"):
        read_data(tmp_path, CLASSES, "image", SHARES, 0)
    with pytest.raises(DataError, match="no image"):
        read_data(manifest(tmp_path / "m", []), CLASSES, "patient", None, 0)


def test_class_folders_need_shares_and_images_as_the_unit(tmp_path):
    folders(tmp_path, {"ant": 3})
    with pytest.raises(DataError, match="no patient ids"):
        read_data(tmp_path, CLASSES, "patient", SHARES, 0)
    with pytest.raises(DataError, match="no shares"):
        read_data(tmp_path, CLASSES, "image", None, 0)


def test_strange_folders_are_all_named(tmp_path):
    folders(tmp_path, {"ant": 1, "Zebra": 2, "bee": 3})
    with pytest.raises(LabelError, match=r"'Zebra' \(2 images\), 'bee' \(3 images\); expected 'zebra', 'ant', 'mole'"):
        read_data(tmp_path, CLASSES, "image", SHARES, 0)


def test_manifest_with_splits(tmp_path):
    rows = [
        ("b/1.png", "p1", "ant", "train"),
        ("a/2.png", "p1", "zebra", "train"),
        ("c.png", "p2", "mole", "test"),
        ("d.png", "p3", "", "unlabelled"),
        ("e.png", "p4", "ant", "unlabelled"),
    ]
    images = read_data(manifest(tmp_path, rows), CLASSES, "patient", None, 0)
    assert [(i.path.relative_to(tmp_path).as_posix(), i.patient, i.label, i.split) for i in images] == [
        ("a/2.png", "p1", 0, "train"),
        ("b/1.png", "p1", 1, "train"),
        ("c.png", "p2", 2, "test"),
        ("d.png", "p3", None, "unlabelled"),
        ("e.png", "p4", None, "unlabelled"),
    ]
    # A split column holds even if shares are set; images count as patients if the site says so.
    same = read_data(tmp_path, CLASSES, "image", SHARES, 5)
    assert [i.split for i in same] == [i.split for i in images]
    assert [i.patient for i in same] == ["a/2.png", "b/1.png", "c.png", "d.png", "e.png"]


def test_a_spreadsheets_byte_order_mark_and_spaces_do_no_harm(tmp_path):
    manifest(tmp_path, [("a.png", " p1", "ant ", "train")])
    text = (tmp_path / "manifest.csv").read_text()
    (tmp_path / "manifest.csv").write_text(text, encoding="utf-8-sig")
    assert read_data(tmp_path, CLASSES, "patient", None, 0)[0].label == 1


def test_manifest_columns(tmp_path):
    manifest(tmp_path, [("a.png", "ant")], columns=("path", "label"))
    with pytest.raises(ManifestError, match="no column split; found path, label"):
        read_data(tmp_path, CLASSES, "patient", None, 0)
    with pytest.raises(ManifestError, match=r"line 2: 'a.png' has no patient; expected an id, a DICOM file"):
        read_data(tmp_path, CLASSES, "patient", SHARES, 0)
    assert read_data(tmp_path, CLASSES, "image", SHARES, 0)[0].label == 1
    (tmp_path / "manifest.csv").write_bytes(b"path,patient,label,split\n\xff\xfe\n")
    with pytest.raises(ManifestError, match="line 2: 1 cells; expected 4"):
        read_data(tmp_path, CLASSES, "patient", None, 0)
    (tmp_path / "manifest.csv").write_bytes(b"")
    with pytest.raises(ManifestError, match="found none"):
        read_data(tmp_path, CLASSES, "patient", None, 0)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (("gone.png", "p", "ant", "train"), "line 3: path 'gone.png': no such file"),
        (("../out.png", "p", "ant", "train"), "leads out of the data folder"),
        (("/etc/hostname", "p", "ant", "train"), "leads out of the data folder"),
        (("link.png", "p", "ant", "train"), "leads out of the data folder"),
        (("b.png", "", "ant", "train"), "has no patient"),
        (("b.png", "p", "ant", "Train"), "split 'Train'; expected one of train, val, test, unlabelled"),
        (("b.png", "p", "ant", ""), "split ''"),
        (("b.png", "p", "", "val"), "no label but split 'val'"),
        (("", "p", "ant", "train"), "no path"),
        (("./a.png", "p", "ant", "train"), "is also on line 2"),
        (("b.png", "first", "ant", "test"), "patient 'first' is in split 'test', but on line 2 in 'train'"),
    ],
)
def test_faulty_rows_are_named(tmp_path, row, fault):
    folder = tmp_path / "site"
    manifest(folder, [("a.png", "first", "ant", "train"), ("b.png", "p", "ant", "train")])
    (tmp_path / "out.png").touch()
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    manifest(folder, [("a.png", "first", "ant", "train"), row], files=False)
    with pytest.raises(ManifestError) as caught:
        read_data(folder, CLASSES, "patient", None, 0)
    assert "1 row does not fit" in str(caught.value)
    assert fault in str(caught.value)


def test_many_faulty_rows_are_counted_and_the_first_ten_named(tmp_path):
    manifest(tmp_path, [(f"{i}.png", f"p{i}", "ant", "train") for i in range(23)], files=False)
    with pytest.raises(ManifestError) as caught:
        read_data(tmp_path, CLASSES, "patient", None, 0)
    text = str(caught.value)
    assert "23 rows do not fit" in text
    assert text.count("no such file") == 10
    assert "and 13 more" in text


def test_strange_labels_of_a_manifest_are_all_named(tmp_path):
    rows = [("a", "1", "bee", "train"), ("b", "2", "Ant", "train"), ("c", "3", "bee", "val")]
    with pytest.raises(LabelError, match=r"'Ant' \(1 rows\), 'bee' \(2 rows\)"):
        read_data(manifest(tmp_path, rows), CLASSES, "patient", None, 0)


def by_definition(total, shares):
    """Largest remainder with exact fractions."""
    exact = [total * Fraction(str(share)) for share in shares]
    counts = [value.__floor__() for value in exact]
    while sum(counts) < total:
        counts[max(range(len(counts)), key=lambda i: (exact[i] - counts[i], -i))] += 1
    return counts


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 300), st.lists(st.integers(0, 100), min_size=3, max_size=3).filter(lambda s: sum(s) <= 100))
def test_largest_remainder(total, percents):
    shares = [percent / 100 for percent in (*percents, 100 - sum(percents))]
    found = _largest_remainder(total, shares)
    assert found == by_definition(total, shares)
    assert sum(found) == total


def test_shares_are_drawn_by_patient_and_by_class(tmp_path):
    rows = []
    for name, patients in {"zebra": 37, "ant": 10, "mole": 1}.items():
        for patient in range(patients):
            rows += [(f"{name}/{patient}-{i}.png", f"{name}{patient}", name) for i in range(1 + patient % 4)]
    # One patient has two images of one class and one of another; another's second image has no label.
    rows += [("x/1", "both", "mole"), ("x/2", "both", "ant"), ("x/3", "both", "mole")]
    rows += [("y/1", "half", "ant"), ("y/2", "half", "")]
    manifest(tmp_path, rows, columns=("path", "patient", "label"))
    images = read_data(tmp_path, CLASSES, "patient", SHARES, 11)
    splits = defaultdict(set)
    for image in images:
        splits[image.patient].add(image.split)
        assert (image.label is None) == (image.split == "unlabelled")
    assert all(len(found) == 1 for found in splits.values())
    assert splits.pop("half") == {"unlabelled"}
    counts = Counter((patient.rstrip("0123456789"), *found) for patient, found in splits.items())
    both = counts.pop(("both", *splits["both"]))
    assert both == 1
    counts[("mole", *splits["both"])] += 1  # what most of its images show
    for name, patients in {"zebra": 37, "ant": 10, "mole": 2}.items():
        found = [counts[(name, split)] for split in ("train", "val", "test", "unlabelled")]
        assert found == by_definition(patients, (0.6, 0.1, 0.1, 0.2))


def test_splits_follow_the_seed_and_not_the_order_of_the_listing(tmp_path, monkeypatch):
    folders(tmp_path, {"mole": 12, "zebra": 30})
    first = read_data(tmp_path, CLASSES, "image", SHARES, 4)
    assert read_data(tmp_path, CLASSES, "image", SHARES, 5) != first
    walk, listdir = os.walk, os.listdir

    def backwards(top, **options):
        for parent, names, files in walk(top, **options):
            yield parent, names, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=True))
    assert read_data(tmp_path, CLASSES, "image", SHARES, 4) == first


def test_splits_do_not_depend_on_the_order_of_the_rows(tmp_path):
    rows = [(f"{i}.png", f"p{i % 17}", "ant") for i in range(40)]
    first = read_data(manifest(tmp_path, rows, ("path", "patient", "label")), CLASSES, "patient", SHARES, 1)
    again = read_data(manifest(tmp_path, rows[::-1], ("path", "patient", "label")), CLASSES, "patient", SHARES, 1)
    assert again == first


def test_free_columns_are_passed_over_and_frames_are_images_of_their_own(tmp_path):
    rows = [
        ("a.dcm", "p1", "ant", "0", "GE", "71"),
        ("a.dcm", "p1", "ant", "12", "GE", "71"),
        ("b.png", "p2", "", "", "", ""),
    ]
    manifest(tmp_path, rows, ("path", "patient", "label", "frame", "scanner", "age"))
    images = read_data(tmp_path, CLASSES, "patient", SHARES, 0)
    assert [(image.path.name, image.frame) for image in images] == [("a.dcm", 0), ("a.dcm", 12), ("b.png", None)]
    as_patients = read_data(tmp_path, CLASSES, "image", SHARES, 0)
    assert [image.patient for image in as_patients] == ["a.dcm#0", "a.dcm#12", "b.png"]


@pytest.mark.parametrize("frame", ["-1", "1.5", "first", "²"])
def test_a_frame_is_a_number(tmp_path, frame):
    manifest(tmp_path, [("a.dcm", "p1", "ant", frame)], ("path", "patient", "label", "frame"))
    with pytest.raises(ManifestError, match="expected a number from 0"):
        read_data(tmp_path, CLASSES, "patient", SHARES, 0)


def test_a_frame_is_listed_once(tmp_path):
    manifest(tmp_path, [("a.dcm", "p1", "ant", "3")] * 2, ("path", "patient", "label", "frame"))
    with pytest.raises(ManifestError, match="is also on line 2"):
        read_data(tmp_path, CLASSES, "patient", SHARES, 0)


def dicom_file(path, patient):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(as_bytes(dicom(RAMP, PatientID=patient)))


def test_dicom_brings_its_own_patients(tmp_path):
    for name, patient in (("x/1", "P1"), ("x/2", "P1"), ("x/3", "P2"), ("x/4", "P3")):
        dicom_file(tmp_path / f"{name}.dcm", patient)
    rows = [("x/1.dcm", "ant", ""), ("x/2.dcm", "ant", ""), ("x/3.dcm", "mole", ""), ("x/4.dcm", "mole", "known")]
    manifest(tmp_path, rows, ("path", "label", "patient"), files=False)
    images = read_data(tmp_path, CLASSES, "patient", SHARES, 0)
    assert [image.patient for image in images] == ["P1", "P1", "P2", "known"]
    assert images[0].split == images[1].split
    (tmp_path / "manifest.csv").unlink()
    (tmp_path / "x").rename(tmp_path / "ant")
    assert [image.patient for image in read_data(tmp_path, CLASSES, "patient", SHARES, 0)] == ["P1", "P1", "P2", "P3"]
    dicom_file(tmp_path / "ant" / "5.dcm", "")
    with pytest.raises(DataError, match=r"1 of 5 files have no patient.*\n  .*5\.dcm"):
        read_data(tmp_path, CLASSES, "patient", SHARES, 0)


def test_unlabelled_images_may_lie_elsewhere(tmp_path):
    data, extra = tmp_path / "data", tmp_path / "target"
    manifest(data, [("a.png", "p1", "ant", "train"), ("b.png", "p2", "ant", "test")])
    dicom_file(extra / "deep" / "c.dcm", "p9")
    images = read_data(data, CLASSES, "patient", None, 0, extra)
    found = [(image.path.name, image.patient, image.label, image.split) for image in images]
    assert found == [("a.png", "p1", 1, "train"), ("b.png", "p2", 1, "test"), ("c.dcm", "p9", None, "unlabelled")]
    # Its own manifest may name patients; one who is tested elsewhere must not be learnt from here.
    (extra / "d.png").touch()
    manifest(extra, [("d.png", "p2")], ("path", "patient"), files=False)
    with pytest.raises(ManifestError, match=r"patient 'p2' is in split 'unlabelled', but on line 3 in 'test'"):
        read_data(data, CLASSES, "patient", None, 0, extra)
    by_image = read_data(data, CLASSES, "image", None, 0, extra)
    assert [image.patient for image in by_image] == ["a.png", "b.png", (extra / "d.png").as_posix()]
    with pytest.raises(DataError, match="no such folder"):
        read_data(data, CLASSES, "patient", None, 0, tmp_path / "absent")


def test_groups_follow_their_first_patient_and_nobody_else_moves(tmp_path):
    folders(tmp_path, {"mole": 20, "zebra": 30, "unlabelled": 2})
    before = {image.patient: image for image in read_data(tmp_path, CLASSES, "image", SHARES, 4)}
    splits = {patient: image.split for patient, image in before.items()}
    group = {next(name for name, split in splits.items() if split == wanted) for wanted in ("test", "train", "val")}
    lost = {"mole/007.png", "unlabelled/001.png"} - group
    told = []

    def together(images):
        told.extend(images)
        return [group, lost]

    after = read_data(tmp_path, CLASSES, "image", SHARES, 4, together=together)
    assert [image.path for image in told] == [image.path for image in after]
    for image in after:
        if image.patient in group:
            assert image.split == splits[min(group)]
            assert image.label == CLASSES.index(image.path.parent.name)
        elif image.patient in lost:
            assert (image.split, image.label) == ("unlabelled", None)
        else:
            assert image == before[image.patient]
    given = [("a.png", "p1", "ant", "train"), ("b.png", "p2", "ant", "test")]
    read_data(manifest(tmp_path / "m", given), CLASSES, "patient", SHARES, 0, together=lambda images: 1 / 0)


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 199), min_size=2, max_size=60), st.integers(0, 2**31), st.data())
def test_under_a_budget_no_patient_moves_another(tmp_path_factory, patients, seed, data):
    def splits(chosen):
        root = tmp_path_factory.mktemp("data")
        rows = [[f"{i}.png", f"patient {i}", CLASSES[i % 3]] for i in sorted(chosen)]
        manifest(root, rows, ("path", "patient", "label"))
        images = read_data(root, CLASSES, "patient", SHARES, seed, together=None)
        return {image.patient: image.split for image in images}

    gone = data.draw(st.sampled_from(sorted(patients)))
    everybody = splits(patients)
    del everybody[f"patient {gone}"]
    assert splits(patients - {gone}) == everybody


def test_under_a_budget_shares_hold_on_average(tmp_path):
    folders(tmp_path, {"ant": 1000, "mole": 1000})
    counts = Counter(image.split for image in read_data(tmp_path, CLASSES, "image", SHARES, 3, together=None))
    for split, share in SHARES.model_dump().items():
        assert abs(counts[split] - 2000 * share) < 5 * (2000 * share * (1 - share)) ** 0.5
    notes = Notes()
    private = read_data(tmp_path, CLASSES, "image", SHARES, 4, together=None, notes=notes)
    assert Counter(image.split for image in private) != counts
    assert DRAWN_ALONE in notes.told  # for they are other splits than those of a run without a budget
    without = Notes()
    read_data(tmp_path, CLASSES, "image", SHARES, 4, notes=without)
    assert DRAWN_ALONE not in without.told


def test_under_a_budget_a_patient_with_an_unlabelled_image_is_unlabelled_whole(tmp_path):
    rows = [[f"{i}.png", f"patient {i // 2}", "ant" if i % 4 else ""] for i in range(40)]
    manifest(tmp_path, rows, ("path", "patient", "label"))
    for image in read_data(tmp_path, CLASSES, "patient", SHARES, 0, together=None):
        assert int(image.patient.split()[1]) % 2 or image.split == "unlabelled"


ANOMALIES = ("unauffällig", "anomaly")


@pytest.mark.parametrize(
    "label",
    [
        "Unauffällig",
        "UN AUFFÄLLIG",
        unicodedata.normalize("NFD", "UNAUFFÄLLIG"),
        "nan",
        "NA",
        "unknown",
        "?",
        "Unlabelled",
        "mask",
    ],
)
def test_where_every_other_label_is_an_anomaly_none_becomes_one_that_says_nothing_or_is_nearly_another(tmp_path, label):
    manifest(tmp_path, [("a.png", "p1", label), ("b.png", "p2", "glioma")], columns=("path", "patient", "label"))
    with pytest.raises(LabelError, match=r"labels that may be of another class than 'anomaly', or of none: .*1 images"):
        read_data(tmp_path, ANOMALIES, "patient", SHARES, 0, others="anomaly")


@pytest.mark.parametrize(
    "name", ["Unauffällig", "Unlabelled", "unlabeled", "test", "Training", "masks", "Ground_Truth", "tumor_masks"]
)
def test_folders_are_no_anomalies_that_say_nothing_or_are_nearly_another_class(tmp_path, name):
    folders(tmp_path, {name: 1, "glioma": 1})
    with pytest.raises(LabelError, match=f"or of none: '{name}'"):
        read_data(tmp_path, ANOMALIES, "image", SHARES, 0, others="anomaly")


def test_which_labels_are_taken_as_anomalies_is_told(tmp_path):
    normal = unicodedata.normalize("NFD", ANOMALIES[0])
    rows = [("a.png", "p1", normal), ("b.png", "p2", "glioma"), ("c.png", "p3", "Anomaly"), ("d.png", "p4", "anomaly")]
    notes = Notes()
    manifest(tmp_path, [(*row, "train") for row in rows])
    images = read_data(tmp_path, ANOMALIES, "patient", None, 0, notes=notes, others="anomaly")
    assert [image.label for image in images] == [0, 1, 1, 1]
    assert any("taken as 'anomaly': 'Anomaly' (1 images), 'glioma' (1 images)" in told for told in notes.told)


def test_a_file_of_settled_ids_that_is_named_must_be_there(tmp_path):
    manifest(tmp_path, [("a.png", "p1", "ant", "train")])
    with pytest.raises(ManifestError, match="cannot be read"):
        read_data(tmp_path, CLASSES, "patient", None, 0, choice=Choice(patients=tmp_path / "settled.csv"))


def test_ids_are_not_settled_upon_one_that_no_image_has(tmp_path):
    manifest(tmp_path, [("a.png", "7", "ant", "train"), ("b.png", "007", "ant", "train")])
    (tmp_path / "patients.csv").write_text("id,same_as\n007,70\n9,8\n")
    with pytest.raises(
        ManifestError, match=r"1 ids are the same as an id that no image has; (.|\n)*'007', same as '70'"
    ):
        read_data(tmp_path, CLASSES, "patient", None, 0)
    (tmp_path / "patients.csv").write_text("id,same_as\n007,70\n7,70\n70,\n")
    assert {image.patient for image in read_data(tmp_path, CLASSES, "patient", None, 0)} == {"70"}


@pytest.mark.parametrize("name", ["Manifest.csv", "manifest.CSV", "manifest.tsv", "MANIFEST.xlsx"])
def test_a_manifest_under_another_name_is_refused(tmp_path, name):
    folders(tmp_path, {"ant": 1})
    (tmp_path / name).write_text("path,label,split\nant/000.png,ant,test\n")
    with pytest.raises(ManifestError, match=r"not read under this name; expected manifest.csv"):
        read_data(tmp_path, CLASSES, "image", SHARES, 0)


def test_folders_below_a_class_that_are_named_as_splits_are_refused(tmp_path):
    folders(tmp_path, {"ant/train": 2, "ant/x/Test": 1, "unlabelled/train": 1})
    with pytest.raises(
        DataError, match=r"2 folders below a class (.|\n)*ant/train \(2 images\)\n *ant/x/Test \(1 images\)"
    ):
        read_data(tmp_path, CLASSES, "image", SHARES, 0)


def test_one_picture_is_not_listed_twice_in_other_words(tmp_path):
    columns = ("path", "patient", "label", "split", "slice", "axis")
    for other in (("a.nii", "p2", "ant", "test", "03", "axial"), ("b.nii", "p2", "ant", "test", "3", "")):
        manifest(tmp_path, [("a.nii", "p1", "ant", "train", "3", ""), other], columns, files=False)
        (tmp_path / "a.nii").touch()
        (tmp_path / "b.nii").unlink(missing_ok=True)
        os.symlink("a.nii", tmp_path / "b.nii")
        with pytest.raises(ManifestError, match=r"line 3: path '[ab].nii' is also on line 2"):
            read_data(tmp_path, CLASSES, "patient", None, 0)


def test_the_middle_frame_is_not_listed_beside_the_file_itself(tmp_path):
    (tmp_path / "a.dcm").write_bytes(as_bytes(dicom(np.stack([RAMP] * 5))))
    (tmp_path / "b.dcm").write_bytes(as_bytes(dicom(RAMP)))
    columns = ("path", "patient", "label", "frame")
    for rows, middle in (
        ([("a.dcm", "p", "ant", ""), ("a.dcm", "p", "bee", "2")], 2),
        ([("a.dcm", "p", "ant", "02"), ("a.dcm", "p", "bee", "")], 2),
        ([("b.dcm", "p", "ant", "0"), ("b.dcm", "p", "ant", "")], 0),
    ):
        manifest(tmp_path, rows, columns, files=False)
        words = rf"line 3: path '[ab].dcm' \(frame {middle}, the middle one\) is also on line 2"
        with pytest.raises(ManifestError, match=words):
            read_data(tmp_path, ("ant", "bee"), "patient", SHARES, 0)
    manifest(tmp_path, [("a.dcm", "p", "ant", ""), ("a.dcm", "p", "bee", "3")], columns, files=False)
    assert len(read_data(tmp_path, ("ant", "bee"), "patient", SHARES, 0)) == 2


@pytest.mark.parametrize("ending", ["dcm.gz", "heic", "avif", "mha", "nrrd", "mgz"])
def test_pictures_of_formats_that_are_not_read_are_not_missed_in_silence(tmp_path, ending):
    folders(tmp_path, {"ant": 1})
    (tmp_path / "ant" / f"b.{ending}").write_bytes(b"\x1f\x8b something")
    assert len(read_data(tmp_path, CLASSES, "image", SHARES, 0)) == 2
