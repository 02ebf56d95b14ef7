"""Hospitals' tables are read as their writers meant them, or refused by line and column: nothing shifts."""

import os
import re
import unicodedata
from collections import Counter

import nibabel
import numpy as np
import pydicom
import pytest

from secure_fed.clients.data import Choice, find_pictures, read_data
from secure_fed.clients.files import Notes, image_files
from secure_fed.clients.manifest import read_table
from secure_fed.clients.patients import doubts, in_one_form, read_settled, similar
from secure_fed.clients.reading import Place, open_file, see
from secure_fed.clients.rules import Rules
from secure_fed.core.errors import DataError, LabelError, ManifestError
from secure_fed.protocol.simulation_table import Shares
from tests.unit.clients.test_dicom import RAMP, as_bytes, dicom, enhanced

CLASSES = ("dark", "light")
ROWS = [("a.png", "dark", "p1"), ("b.png", "light", "p2")]
HALF = Shares(train=0.5, val=0.5, test=0, unlabelled=0)


def found(folder, content, unit="patient", **options):
    for name, *_ in ROWS:
        (folder / name).touch()
    (folder / "manifest.csv").write_bytes(content)
    return [(image.path.name, image.patient) for image in read_data(folder, CLASSES, unit, HALF, 0, **options)]


def text(separator=",", end="\n", header="path,label,patient"):
    return end.join(separator.join(row) for row in [header.split(","), *ROWS]) + end


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (text(";").encode(), "semicolons"),
        (text("\t").encode(), "tabs"),
        (("sep=;\r\n" + text(";", "\r\n")).encode(), "as its first line says"),
        (text().encode("utf-16"), "UTF-16"),
        (text("\t").encode("utf-16"), "tabs"),
        (text().encode("utf-16-le"), "UTF-16, though it has no mark"),
        (text(";").encode("utf-16-be"), "semicolons"),
        (b"\xef\xbb\xbf" + (text(end="\r\n") + ",,\r\n\r\n").encode(), "2 empty rows"),
        (text(header=" path , label,patient ").encode(), ""),
        ("\n".join(line + ",," for line in text().splitlines()).encode(), ""),
    ],
)
def test_other_countries_and_spreadsheets_tables_are_read_and_told(tmp_path, content, told):
    notes = Notes()
    assert found(tmp_path, content, notes=notes) == [("a.png", "p1"), ("b.png", "p2")]
    assert told in " ".join(notes.told)


@pytest.mark.parametrize(
    "name", ["Müller", "MUÑOZ", "José d’Évry", "Nº5", "ÅSA-ØRE", "ÄÖ 3", "5µm", "Šiša", "“q”", "„q“", "Šá"]
)
def test_what_is_not_utf8_is_windows_and_the_line_by_which_it_shows_is_told(tmp_path, name):
    notes = Notes()
    assert found(tmp_path, text().replace("p1", name).encode("cp1252"), notes=notes)[0][1] == name
    assert "read as Windows-1252, on which line 2, column patient, hangs; save it as UTF-8" in notes.told[0]
    assert name not in notes.told[0]  # logs are shown to others


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        *((name, "mac_roman") for name in ("Müller", "José", "Bär", "Größe")),
        *((name, "cp1250") for name in ("Łukasz", "Łódź")),
        *((name, "iso8859_2") for name in ("Šiša", "Łukasz")),
        *(("Иван", name) for name in ("cp1251", "koi8_r", "gb18030")),
        *(("Νίκος", "cp1253"), ("山田", "shift_jis"), ("Größe", "cp437")),
        *((name, "shift_jis") for name in ("田中", "鈴木", "田", "ｱｲ")),
        *(("山田", "euc_jp"), ("王", "gb18030"), ("李", "gb18030"), ("김", "euc_kr"), ("王", "big5"), ("Ли", "cp1251")),
    ],
)
def test_a_table_of_another_encoding_is_refused_by_the_name_that_it_would_have(tmp_path, name, encoding):
    content = text().replace("p2", name).encode(encoding)
    with pytest.raises(ManifestError, match=r"line 3 would say .* in column patient; expected a CSV file in UTF-8"):
        found(tmp_path, content)
    with pytest.raises(ManifestError, match="would say 'MÃ¼ller'"):  # rows of two encodings
        found(tmp_path, text().replace("p2", "Müller").encode() + "c.png,dark,Bär\n".encode("cp1252"))
    noted = "path,label,patient,note\na.png,dark,p1,x\nb.png,light,p2,©M¤\n".encode("cp1252")
    assert len(found(tmp_path, noted)) == 2  # in a free column it means nothing


def test_who_is_settled_in_a_guessed_encoding_or_has_no_image_is_told(tmp_path):
    (tmp_path / "patients.csv").write_bytes("id,same_as\nMüller,p1\np1,\n".encode("cp1250"))
    notes = Notes()
    found(tmp_path, text().encode(), notes=notes)
    assert "patients.csv: not UTF-8, read as Windows-1252, on which line 2, column id, hangs" in notes.told[0]
    assert f"{tmp_path}/patients.csv: 1 ids are of no image here; look whether" in notes.told[1]
    assert "Müller" not in "".join(notes.told)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("path,label,patient,label\na.png,dark,p1,light\n", "line 1: column 4, 'label', has the name of column 2"),
        ("path,label,patient,Label\na.png,dark,p1,light\n", "line 1: column 4, 'Label', has the name of column 2"),
        ("path,label,patient,Split\na.png,dark,p1,test\n", "line 1: column 4 is named 'Split'; expected 'split'"),
        ("path,label,Patient_ID\na.png,dark,p1\n", "column 3 is named 'Patient_ID'; expected 'patient'"),
        ("path,label,patient,s p-l_i t\na.png,dark,p1,test\n", "expected 'split'"),
        ("path,label,patient\na.png,dark,p1\nb.png,no, light,p2\n", "line 3: 4 cells; expected 3"),
        ("path,label,patient\na.png,dark,p1\nb.png,light\n", "line 3: 2 cells; expected 3"),
        ('path,label,patient\n"a.png,dark,p1\nb.png,light,p2\n', "line 2: cannot be read as CSV"),
        ("path,label,patient\na.png,dark,p\0\n", "byte 0 in line 2"),
        (
            "Export\npath,label,patient\na.png,dark,p\n",
            "its header, line 1, has none of path, label: remove what stands",
        ),
        (
            "path,label,patient\na.png,dark," + "p" * 1001 + "\n",
            "line 2: a cell of 1,001 letters; expected at most 1,000",
        ),
    ],
)
def test_what_would_shift_or_hide_a_cell_is_refused_by_line_and_column(tmp_path, content, fault):
    with pytest.raises(ManifestError) as caught:
        found(tmp_path, content.encode())
    assert fault in str(caught.value)


def test_lines_are_counted_as_editors_count_them(tmp_path):
    (tmp_path / "t.csv").write_text('\npath,note\na,"two\nlines"\n\nb,x\n')
    table = read_table(tmp_path / "t.csv", ("path",), ("path",))
    assert [(row.line, row.cells["path"]) for row in table.rows] == [(3, "a"), (6, "b")]
    (tmp_path / "u.csv").write_text("sep=,\npath,note\na,1\nb,2,3\n")
    with pytest.raises(ManifestError, match="line 4: 3 cells"):
        read_table(tmp_path / "u.csv", ("path",), ("path",))


def test_paths_are_taken_for_the_only_files_they_can_mean(tmp_path):
    name = unicodedata.normalize("NFD", "Läsion.png")
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / name).touch()
    notes = Notes()
    rows = "path,label,patient\nscans\\Läsion.png,dark,p1\n"
    assert found(tmp_path, rows.encode(), notes=notes) == [(name, "p1")]
    assert any("1 paths with backslashes" in line for line in notes.told)
    (tmp_path / "scans" / unicodedata.normalize("NFC", name)).touch()  # now it could be either
    assert found(tmp_path, rows.encode())[0][0] == unicodedata.normalize("NFC", name)


def test_ids_are_taken_in_one_form(tmp_path):
    rows = f"path,label,patient\na.png,dark,M\u00fcller\nb.png,light,\u00a0{unicodedata.normalize('NFD', 'Müller')} \n"
    assert {patient for _, patient in found(tmp_path, rows.encode())} == {"Müller"}
    assert in_one_form("\ufeff 007\0") == "007"


@pytest.mark.parametrize(
    ("ids", "kinds"),
    [
        (("007", "7"), ["writings"]),
        (("p1", "P1"), ["writings"]),
        (("12", "12.0"), ["writings"]),
        (("P-01", "p\u20131"), ["writings"]),
        (("1.23457E+11", "b"), ["spreadsheet"]),
        (("12-Mar", "#REF!"), ["spreadsheet", "spreadsheet"]),
        (("nan", "b"), ["placeholder"]),
        (("ANONYMOUS", "N/A", "-"), ["placeholder"] * 3),
        (("0000", "b"), ["placeholder"]),
        (("007", "'007"), ["writings"]),
        (("P1", "\u04201"), ["writings"]),  # the first letter is Cyrillic
        (("1234567890123450000", "1234567890123460000"), ["spreadsheet"] * 2),
        (("1234567890123450000", "1234567890123460017"), []),
        (("Mar-12", "=B2", "#ZAHL!"), ["spreadsheet"] * 3),
        (("Unknown Patient", "TEST^PATIENT", "No Name", "99999", "-9", "TRUE"), ["placeholder"] * 6),
        (("XXXXXXXX", "11111", "123456789", "DE-IDENTIFIED", "no value"), ["placeholder"] * 5),
        (("anonymisiert", "Deid^Subject", "hidden", "Unidentified Person"), ["placeholder"] * 4),
        (("1,234", "1234", "1.234"), ["writings"]),
        (("Doe^John", "DOE^JOHN^^"), ["writings"]),
        (("2024-01-05", "05.01.2024", "1/5/24", "5. Mai"), ["spreadsheet"] * 4),
        (("12:30:00", "1/2/2023 0:00", "2023-02-01T00:00:00", "Feb 1, 2023", "2023/2/1"), ["spreadsheet"] * 5),
        (("+12", "12"), ["writings"]),
        (("PAT-1", "PAT_1", "PAT1", "pat.001"), ["writings"]),
        (("A.1", "A-1"), ["writings"]),
        (("1/2", "1-2"), ["writings"]),
        (("12-34", "1234"), ["writings"]),
        (("1-12", "11-2"), []),
        (("A-1-12", "A-11-2", "B-1"), []),
        (("unknown_1", "MRN-5", "MRN-6"), ["placeholder"]),
        (("Anon2", "anonymized 7", "MRN-5", "MRN-6"), ["placeholder"] * 2),
        (("anon1", "anon2", "MRN-5"), []),  # a site's own pseudonyms
        (("patient_1", "subject-2", "Id3", "12+", "MRN-6"), []),
        (("#NV", "k.A."), ["placeholder", "spreadsheet"]),
        (("Müller", "MÃ¼ller", "Schröder"), ["writings"]),
        (("Àlvarez", "Ã\u20aclvarez"), ["writings"]),
        (("M\ufffdller", "M?ller", "Möller"), ["placeholder"] * 2),
        (("MRN 0012345", "12345", "#12345", "Pat.-Nr. 12345"), ["writings"]),
        (("P7", "patient 7", "C7", "S7"), ["writings"]),
        (("10_left", "10-R", "11_OD", "12 (1)", "12 copy"), ["writings"] * 2),
        (("sub-01_ses-1", "sub-01_ses-02", "sub-1", "sub-02_ses-1"), ["writings"]),
        (("P1_baseline", "P1_follow-up 2", "P2_v1", "P2.visit.2"), ["writings"] * 2),
        (("Smith, John", "John Smith", "Smith^John", "Smith^Jane"), ["writings"]),
        (("Müller", "Mueller", "Möller"), ["writings"]),
        (("p1_1", "p1_2", "12A", "12B", "C-7", "group a", "group b", "2020-1", "2021-1", "T1", "T2", "V1"), []),
        (("12", "120", "1-2", "P1E3", "Patient 3", "P-99", "12-34-5678", "1.2.3", "1-2-33-4"), []),
    ],
)
def test_ids_that_leave_open_who_is_who_are_found(ids, kinds):
    assert [doubt.kind for doubt in doubts(dict.fromkeys(ids, 1))] == kinds


def test_one_patient_with_more_than_half_of_all_images_is_doubtful():
    counts = {"a": 11, "b": 5, "c": 5}
    assert [(doubt.kind, doubt.ids) for doubt in doubts(counts)] == [("share", ("a",))]
    assert not doubts(counts, {"a"})
    assert not doubts({"a": 5, "b": 4})


def test_people_settle_who_is_who(tmp_path):
    for name in ("c.png", "d.png"):
        (tmp_path / name).touch()
    content = b"path,label,patient\na.png,dark,007\nb.png,light,7\nc.png,dark,p1\nd.png,light,P1\n"
    (tmp_path / "patients.csv").write_text("id;same_as\n007;7\nP1;\n")
    notes = Notes()
    names = Counter(patient for _, patient in found(tmp_path, content, notes=notes))
    assert names == {"7": 2, "p1": 1, "P1": 1}
    assert not doubts(names, notes.settled)
    assert doubts({"007": 1, "7": 1})[0].ids == ("007", "7")
    for text_, fault in (
        ("id,same_as\na,b\nb,c\n", "itself the same as"),
        ("id,same_as\na,b\na,c\n", "line 3: id 'a'"),
    ):
        (tmp_path / "patients.csv").write_text(text_)
        with pytest.raises(ManifestError, match=fault):
            read_settled(tmp_path / "patients.csv")


def test_similar_ids_are_shown():
    assert similar("7", ["007", "12", "99"]) == ["007"]


def test_columns_that_mean_nothing_are_told(tmp_path):
    notes = Notes()
    rows = b"path,label,patient,splits\na.png,dark,p1,few\nb.png,light,p2,many\n"
    assert len(found(tmp_path, rows, notes=notes)) == 2
    assert "columns that no training looks at: splits" in notes.told[0]


@pytest.mark.parametrize("cells", [("test", "train"), ("Validation", "Training"), ("", "dev")])
def test_a_column_of_splits_by_another_name_is_refused_as_test_images_would_be_trained_on(tmp_path, cells):
    rows = "path,label,patient,set\na.png,dark,p1,{}\nb.png,light,p2,{}\n".format(*cells)
    with pytest.raises(ManifestError, match="column 'set' says of which split a row is, and there is no column split"):
        found(tmp_path, rows.encode())
    with_splits = rows.replace("set", "set,split").replace("p1,", "p1,x,train").replace("p2,", "p2,x,train")
    assert len(found(tmp_path, re.sub("train.*", "train", with_splits).encode())) == 2


@pytest.mark.parametrize("name", ["is_test", "Test", "in training set", "holdout", "validation"])
def test_so_is_a_column_that_says_yes_or_no_to_one_split(tmp_path, name):
    rows = f"path,label,patient,{name}\na.png,dark,p1,0\nb.png,light,p2,1\n"
    with pytest.raises(ManifestError, match=f"column '{name}' says of which split a row is"):
        found(tmp_path, rows.encode())
    for free in (rows.replace(name, "smoker"), rows.replace("p1,0", "p1,CT").replace("p2,1", "p2,MR")):
        assert len(found(tmp_path, free.encode())) == 2


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("group", ["train"] * 5 + ["test"] * 4 + ["exclude"]),
        ("Set", ["Train"] * 5 + ["Test"]),
        ("dataset", ["TRAIN_SET"] * 3 + ["TEST_SET"] * 2),
        ("usage", ["Training"] * 3 + ["PublicTest", "PrivateTest"]),
        ("train/val/test", ["train", "trn", "tst"]),
        ("subset", ["internal", "external test", "holdout"]),
        ("phase", ["Entrenamiento", "Prueba"]),
        ("train_test", ["1", "2"]),
        ("test", ["0", "2"]),
        ("held_out", ["X", "-", "-"]),
        ("Holdout", ["ja", "Nein"]),
        ("test", ["", "\u2713"]),
    ],
)
def test_a_hospitals_own_split_column_is_refused_also_with_foreign_values(tmp_path, name, cells):
    lines = [f"p{place}.png,dark,p{place},{cell}" for place, cell in enumerate(cells)]
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join([f"path,label,patient,{name}", *lines]) + "\n")
    with pytest.raises(ManifestError, match=f"column '{name}' says of which split a row is"):
        read_data(tmp_path, ("dark", "light"), "patient", HALF, 0)


def test_folds_and_columns_that_speak_of_tests_are_none(tmp_path):
    notes = Notes()
    rows = b"path,label,patient,fold,remark\na.png,dark,p1,0,stress test\nb.png,light,p2,1,trained reader\n"
    assert len(found(tmp_path, rows, notes=notes)) == 2
    assert any("column 'fold' looks like folds" in line for line in notes.told)


def series_with_copies(folder):
    (folder / "s").mkdir()
    for number in range(5):
        place = {"ImagePositionPatient": [0, 0, float(number)], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        one = dicom(RAMP + number, PatientID="p1", SeriesInstanceUID="1.2.9", InstanceNumber=number, **place)
        (folder / "s" / f"{number}.dcm").write_bytes(as_bytes(one))
    for number in (0, 1):
        (folder / "s" / f"{number} (1).dcm").write_bytes((folder / "s" / f"{number}.dcm").read_bytes())


def test_a_copy_in_the_folder_moves_no_slice(tmp_path):
    series_with_copies(tmp_path)
    notes = Notes()
    assert [name for name, _ in found(tmp_path, b"path,label,slice\ns,dark,2\n", notes=notes)] == ["2.dcm"]
    assert notes.left_out["copy of a slice"] == 2
    assert not any("none of its rows" in line and f"{tmp_path}/s/" in line for line in notes.told)
    for rows in ("s,dark", "\n".join(f"s/{path.name},dark" for path in (tmp_path / "s").iterdir())):
        notes = Notes()
        images = found(tmp_path, f"path,label\n{rows}\n".encode(), notes=notes, choice=Choice(slices="middle"))
        assert [name for name, _ in images] == ["2.dcm"]
        assert notes.left_out == {"copy of a slice": 2, "other slice": 4}


def test_the_pictures_of_one_file_are_in_one_split(tmp_path):
    for name in ("v", "w", "x", "y"):
        nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 6), np.int16), np.eye(4)), tmp_path / f"{name}.nii.gz")
    rows = b"path,label,patient,slice,split\nv.nii.gz,dark,p1,3,train\nv.nii.gz,light,p2,4,test\n"
    with pytest.raises(ManifestError, match=r"line 3: a picture of 'v.nii.gz' is in split 'test', but on line 2"):
        found(tmp_path, rows)
    (tmp_path / "manifest.csv").write_text("path,label\nv.nii.gz,dark\nw.nii.gz,light\nx.nii.gz,dark\ny.nii.gz,light\n")
    for together in (None, lambda images: ()):
        images = read_data(tmp_path, CLASSES, "image", HALF, 0, together=together, choice=Choice(slices="all"))
        assert len(images) == 24
        assert len({image.patient for image in images}) == 24
        assert len({(image.path, image.split) for image in images}) == 4


@pytest.mark.parametrize(
    ("names", "masks"),
    [
        (["a.png", "a_mask.png", "a_mask_1.png"], ["a_mask.png", "a_mask_1.png"]),
        (["benign (1).png", "benign (1)_mask.png"], ["benign (1)_mask.png"]),
        (["p1_t1.nii.gz", "p1_flair.nii.gz", "p1_seg.nii.gz"], ["p1_seg.nii.gz"]),
        (["A.JPG", "a_Segmentation.png"], ["a_Segmentation.png"]),
        (["a_mask.png", "b.png"], []),  # of no image here
        (["p1.png", "p10_mask.png"], []),
        (["p1_gt.png", "p10.png"], []),
        (["MS_seg_01.png", "MS_x.png"], []),
        (["unmask.png", "un.png", "a_masked.png", "a.png"], []),
        (["case/imaging.nii.gz", "case/segmentation.nii.gz"], ["case/segmentation.nii.gz"]),
        (["case/IM0001", "case/IM0002", "case/mask.png"], ["case/mask.png"]),
        (["case/seg.png", "other/a.png"], []),  # alone in its folder, it is the image
        (["label_001.png", "label_002.png", "a.png"], []),
        (["images/a.png", "images/b.png", "masks/a.png"], ["masks/a.png"]),
        (["images/p1/a.jpg", "Masks/p1/a.png", "Masks/p1/a_mask.png"], ["Masks/p1/a.png", "Masks/p1/a_mask.png"]),
        (["p1/IM01", "p1/IM02", "p1/seg/IM01.png", "p1/seg/seg.nii.gz"], ["p1/seg/IM01.png", "p1/seg/seg.nii.gz"]),
        (["imagesTr/b_0000.nii.gz", "imagesTr/b_0001.nii.gz", "labelsTr/b.nii.gz"], ["labelsTr/b.nii.gz"]),
        (
            ["Training_Input/ISIC_1.jpg", "Training_GroundTruth/ISIC_1_segmentation.png"],
            ["Training_GroundTruth/ISIC_1_segmentation.png"],
        ),
        (["masks/a.png", "masks/b.png"], []),  # of no image
        (["masked/a.png", "images/a.png", "labelled/a.png", "gta/a.png"], []),
    ],
)
def test_masks_beside_their_images_are_left_out_and_counted(tmp_path, names, masks):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" if "." in name else as_bytes(dicom(RAMP)))
    notes = Notes()
    found = {path.relative_to(tmp_path).as_posix() for path in image_files(tmp_path, notes)}
    assert found == {*names} - {*masks}
    assert notes.left_out["mask"] == len(masks)
    assert len(notes.passed_over) == len(masks)
    assert not notes.told


def test_patients_that_a_manifest_names_and_a_site_does_not_count_are_told(tmp_path):
    rows = "path,label,patient\na.png,dark,p1\nb.png,light,p1\n"
    for content, unit, count in (
        (rows, "image", 1),
        (rows, "patient", 0),
        (rows.replace("b.png,light,p1", "b.png,light,p2"), "image", 0),
        (rows.replace("p1", ""), "image", 0),
    ):
        notes = Notes()
        found(tmp_path, content.encode(), unit, notes=notes)
        told = [
            line for line in notes.told if 'patient is passed over, as unit is "image": 1 patients have sev' in line
        ]
        assert len(told) == count, (content, unit)


def test_what_lies_in_a_folder_of_masks_and_is_of_no_image_is_told(tmp_path):
    for name in ("images/a.png", "images/IM1.dcm", "masks/a.png", "masks/b.png", "masks/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "t1_fl2d_seg").mkdir()  # as scanners name what they took in segments
    (tmp_path / "t1_fl2d_seg" / "IM1.dcm").write_bytes(as_bytes(dicom(RAMP)))
    (tmp_path / "images" / "round").symlink_to(tmp_path)
    notes = Notes()
    found = sorted(path.relative_to(tmp_path).as_posix() for path in image_files(tmp_path, notes))
    assert found == ["images/IM1.dcm", "images/a.png", "masks/b.png", "t1_fl2d_seg/IM1.dcm"]
    assert notes.left_out == {"mask": 1}
    assert notes.told == [
        f"{tmp_path}/{name}: 1 images in a folder that is named as one of masks, of no image beside it, and are taken "
        "for images of their own"
        for name in ("masks", "t1_fl2d_seg")
    ]


def test_a_class_folder_in_a_class_folder_is_told(tmp_path):
    for name in ("dark/a.png", "dark/p1/Light/b.png", "light/c.png", "dark/dark/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    notes = Notes()
    assert len(read_data(tmp_path, CLASSES, "image", HALF, 0, notes=notes)) == 4
    (line,) = notes.told
    assert line.endswith("taken for the class of the upper folder: 'dark/p1/Light' (1 images)")


def test_images_that_are_in_no_row_are_told_with_their_number(tmp_path):
    for name in ("c.png", "more/d.png", "a_mask.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    notes = Notes()
    found(tmp_path, text().encode(), notes=notes)
    assert any("2 images beside it are in none of its rows" in line and "d.png" in line for line in notes.told)
    notes = Notes()
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    found(tmp_path, (text() + "c.png,dark,p3\nmore/d.png,dark,p4\n").encode(), notes=notes)
    assert not notes.told


def test_an_id_with_a_line_break_is_refused_by_line(tmp_path):
    with pytest.raises(ManifestError, match=r"line 2: 'a.png' has patient 'p\\n1', with a line break"):
        found(tmp_path, b'path,label,patient\na.png,dark,"p\n1"\nb.png,light,p2\n')


def test_labels_are_taken_in_one_form(tmp_path):
    classes = ("Schädel", "light")
    (tmp_path / "a.png").touch()
    content = unicodedata.normalize("NFD", "path,label,patient\na.png,Schädel,p1\n")
    (tmp_path / "manifest.csv").write_text(content, encoding="utf-8")
    assert [
        image.label
        for image in read_data(tmp_path, classes, "patient", Shares(train=1, val=0, test=0, unlabelled=0), 0)
    ] == [0]


def test_a_row_may_name_a_folder_a_series_and_a_slice_of_it(tmp_path):
    series(tmp_path / "ct", 5, SeriesInstanceUID="1.2.1")
    series(tmp_path / "more" / "deep", 3, SeriesInstanceUID="1.2.2")
    for old in (tmp_path / "more" / "deep").iterdir():
        old.rename(tmp_path / "ct" / f"b{old.name}")

    def of(row, **choice):
        (tmp_path / "manifest.csv").write_text(f"path;label;patient;series;slice\n{row}\n")
        images = read_data(tmp_path, CLASSES, "patient", HALF, 0, choice=Choice(**choice))
        assert {(image.patient, image.label) for image in images} == {("P1", 0)}
        return [image.path.name for image in images]

    assert len(of("ct;dark;;;")) == 8
    assert of("ct/;dark;;1.2.2;") == ["b00.dcm", "b01.dcm", "b02.dcm"]
    assert of(";dark;;1.2.2;") == ["b00.dcm", "b01.dcm", "b02.dcm"]
    # Names run the other way than the positions.
    assert of("ct;dark;;1.2.1;0") == ["04.dcm"]
    assert of("ct;dark;;1.2.1;0", slices="middle") == ["04.dcm"]
    assert of("ct;dark;;1.2.1;", slices="middle") == ["02.dcm"]
    for row, fault in (
        ("ct;dark;;1.2.3;", "line 2: folder 'ct' holds no image of series 1.2.3"),
        ("more;dark;;;", "folder 'more' holds no image"),
        ("ct;dark;;1.2.1;5", "slice '5' of folder 'ct', which holds 5; expected a number from 0 to 4"),
        ("ct;dark;;;1", r"which holds several series (1.2.1, 1.2.2); expected the UID of one in column series"),
        ("..;dark;;1.2.1;", "leads out of the data folder"),
        ("ct;dark;;;\nct/00.dcm;dark;;;", "line 3: path 'ct/00.dcm' is also on line 2"),
    ):
        with pytest.raises(ManifestError) as caught:
            of(row)
        assert fault in str(caught.value)


def test_a_row_that_names_another_series_than_its_file_is_refused(tmp_path):
    series(tmp_path / "ct", 2, SeriesInstanceUID="1.2.1")
    (tmp_path / "a.png").touch()

    def of(*rows):
        (tmp_path / "manifest.csv").write_text("\n".join(["path,label,patient,series", *rows]))
        return read_data(tmp_path, CLASSES, "patient", HALF, 0)

    assert len(of("ct/00.dcm,dark,,1.2.1", "ct/01.dcm,dark,,before surgery", "a.png,dark,P1,1.2.7")) == 3
    with pytest.raises(ManifestError) as caught:
        of("ct/00.dcm,dark,,1.2.1", "ct/01.dcm,dark,,1.2.2")
    assert "line 3: 'ct/01.dcm' is of series 1.2.1 (0020,000E), and column series says 1.2.2" in str(caught.value)


def test_slices_without_a_position_are_in_the_order_that_people_count_in(tmp_path):
    (tmp_path / "s").mkdir()
    for number in range(1, 12):
        (tmp_path / "s" / f"{number}.png").touch()
    (tmp_path / "manifest.csv").write_text("path,label,patient,series,slice\ns,dark,p,,9\n")
    assert [image.path.name for image in read_data(tmp_path, CLASSES, "patient", HALF, 0)] == ["10.png"]


def test_what_lies_in_no_class_is_told_and_a_link_to_nothing_stops(tmp_path):
    (tmp_path / "dark").mkdir()
    (tmp_path / "dark" / "a.png").touch()
    (tmp_path / "dark" / ".b.png").touch()
    (tmp_path / "dark" / ".c").mkdir()
    (tmp_path / "lost.png").touch()
    notes = Notes()
    read_data(tmp_path, CLASSES, "image", HALF, 0, notes=notes)
    told = "\n".join(notes.passed_over)
    assert "lost.png: in no folder of a class" in told
    assert ".b.png: hidden" in told
    assert ".c: hidden, or a system's" in told
    (tmp_path / "light").symlink_to(tmp_path / "unmounted")
    with pytest.raises(DataError, match="light: a link to nothing"):
        read_data(tmp_path, CLASSES, "image", HALF, 0)


def test_what_cannot_be_opened_or_named_stops_or_is_passed_over(tmp_path):
    (tmp_path / "dark").mkdir()
    (tmp_path / "dark" / "a.png").touch()
    os.mkfifo(tmp_path / "dark" / "b.dcm")  # whoever opened it would wait for ever
    notes = Notes()
    assert [path.name for path in image_files(tmp_path, notes)] == ["a.png"]
    assert notes.passed_over == [f"{tmp_path}/dark/b.dcm: a pipe or device, no file"]
    (tmp_path / "dark" / "c.dcm").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"dark/c.dcm: a link to nothing; mount or restore"):
        list(image_files(tmp_path))
    (tmp_path / "dark" / "c.dcm").unlink()
    os.rename(tmp_path / "dark" / "a.png", os.fsencode(tmp_path) + b"/dark/M\xfcller.png")
    with pytest.raises(DataError, match=r"dark/M\\udcfcller.png: a name that is no UTF-8 and cannot be written down"):
        list(image_files(tmp_path))
    os.rename(os.fsencode(tmp_path) + b"/dark/M\xfcller.png", os.fsencode(tmp_path) + b"/dark/M\xfcller.pdf")
    assert not list(image_files(tmp_path, notes := Notes()))
    assert [line.encode() for line in notes.passed_over] == [
        f"{tmp_path}/dark/M\\udcfcller.pdf: no image, by its content and its name".encode(),
        f"{tmp_path}/dark/b.dcm: a pipe or device, no file".encode(),
    ]


def test_a_file_that_links_put_into_two_classes_is_refused(tmp_path):
    for name in CLASSES:
        (tmp_path / name).mkdir()
    (tmp_path / "dark" / "a.png").touch()
    (tmp_path / "light" / "b.png").symlink_to(tmp_path / "dark" / "a.png")
    with pytest.raises(LabelError, match=r"light/b.png: the same file as dark/a.png, by a link"):
        read_data(tmp_path, CLASSES, "image", HALF, 0)


def test_links_are_followed_once_and_what_is_no_image_is_passed_over_and_told(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "dark" / "p1").mkdir(parents=True)
    (elsewhere / "p2").mkdir(parents=True)
    (data / "dark" / "p1" / "a.png").touch()
    (elsewhere / "p2" / "b.png").touch()
    (data / "dark" / "p2").symlink_to(elsewhere / "p2")
    (data / "dark" / "p1" / "round").symlink_to(data / "dark")
    (data / "dark" / "__MACOSX").mkdir()
    (data / "dark" / "__MACOSX" / "a.png").touch()
    (data / "dark" / "AUTORUN.INF").touch()
    (data / "dark" / "report.pdf").write_bytes(b"%PDF-1.7")
    notes = Notes()
    images = read_data(data, CLASSES, "image", HALF, 0, notes=notes)
    assert [image.path.name for image in images] == ["a.png", "b.png"]
    told = "\n".join(notes.passed_over)
    assert "report.pdf: no image" in told
    assert "AUTORUN.INF: no image" in told
    assert "round: a link to a folder that was read already" in told


def test_a_folder_that_cannot_be_read_stops(tmp_path, monkeypatch):
    import os

    (tmp_path / "dark" / "p1").mkdir(parents=True)
    (tmp_path / "dark" / "a.png").touch()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("p1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=r"p1: cannot be read .Permission denied"):
        read_data(tmp_path, CLASSES, "image", HALF, 0)


def series(folder, count, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        # Names and instance numbers run the other way than the positions.
        position = {"ImagePositionPatient": [0, 0, -number], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        content = as_bytes(dicom(RAMP, PatientID="P1", InstanceNumber=number, **(position | fields)))
        (folder / f"{number:02}.dcm").write_bytes(content)


def names(folder, unit="patient", **choice):
    notes = Notes()
    images = read_data(folder, CLASSES, unit, HALF, 0, choice=Choice(**choice), notes=notes)
    return [image.path.name for image in images], notes.left_out


def test_of_a_series_the_rule_takes_slices_by_their_position(tmp_path):
    series(tmp_path / "dark" / "s1", 7, SeriesInstanceUID="1.2.1")
    assert len(names(tmp_path)[0]) == 7
    assert names(tmp_path, slices="middle") == (["03.dcm"], {"other slice": 6})
    assert names(tmp_path, slices="every:3")[0] == ["02.dcm", "05.dcm"]
    assert len(names(tmp_path, slices="all")[0]) == 7


def test_slices_that_do_not_say_of_which_series_they_are_are_told(tmp_path):
    series(tmp_path / "dark", 3)
    for slices, count in (("middle", 1), ("all", 0)):
        notes = Notes()
        assert len(read_data(tmp_path, CLASSES, "patient", HALF, 0, choice=Choice(slices), notes=notes)) == 3
        assert sum("02.dcm: slices that do not say of which series they are" in line for line in notes.told) == count


def test_slices_that_lie_across_one_another_are_in_order_of_their_numbers_and_that_is_told(tmp_path):
    series(tmp_path / "dark", 5, SeriesInstanceUID="1.2.1")
    for number in range(5):  # numbers run from 0; three planes are axial, two sagittal
        path = tmp_path / "dark" / f"{number:02}.dcm"
        dataset = pydicom.dcmread(path)
        dataset.InstanceNumber = (number + 3) % 5
        if number > 2:
            dataset.ImagePositionPatient = [1000 * number, 0, 0]
            dataset.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        path.write_bytes(as_bytes(dataset))
    notes = Notes()
    images = read_data(tmp_path, CLASSES, "patient", HALF, 0, choice=Choice("middle"), notes=notes)
    assert [image.path.name for image in images] == ["04.dcm"]
    assert "02.dcm: of series whose slices lie across one another" in notes.told[0]
    assert names(tmp_path, slices="all")[1] == {"other slice": 0}
    (tmp_path / "manifest.csv").write_text("path,label,slice\ndark,dark,2\n")
    with pytest.raises(ManifestError, match=r"slice 2 of folder 'dark', whose 5 images lie across one another"):
        names(tmp_path)


@pytest.mark.parametrize("without", ["ImagePositionPatient", "InstanceNumber"])
def test_a_slice_that_does_not_say_where_it_lies_has_no_place_among_others_that_do(tmp_path, without):
    series(tmp_path / "dark", 5, SeriesInstanceUID="1.2.1")
    for number in range(5):
        path = tmp_path / "dark" / f"{number:02}.dcm"
        dataset = pydicom.dcmread(path)
        if without == "InstanceNumber":  # then by numbers alone
            del dataset.ImagePositionPatient
        if number == 3:
            del dataset[without]
        path.write_bytes(as_bytes(dataset))
    notes = Notes()
    images = read_data(tmp_path, CLASSES, "patient", HALF, 0, choice=Choice("middle"), notes=notes)
    # Of 0, 1, 2, 4: positions run from 4 to 0, numbers from 0 to 4.
    assert [image.path.name for image in images] == ["01.dcm" if without == "ImagePositionPatient" else "02.dcm"]
    assert notes.left_out == {"other slice": 3, "slice without a position": 1}
    assert notes.passed_over == [
        f"{tmp_path / 'dark' / '03.dcm'}: a slice that does not say where in its series it lies, as others do"
    ]
    assert len(names(tmp_path, slices="all")[0]) == 5  # for nothing hangs on their order
    (tmp_path / "manifest.csv").write_text("path,label,slice\ndark,dark,2\n")
    with pytest.raises(ManifestError, match=r"slice 2 of folder 'dark', of which 1 images do not say .*'dark/03.dcm'"):
        names(tmp_path)
    (tmp_path / "manifest.csv").write_text("path,label\ndark,dark\n")
    assert len(names(tmp_path)[0]) == 5


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("count", [4, 5])
@pytest.mark.parametrize("echoes", [2, 3])
def test_how_many_slices_a_series_has_does_not_decide_which_of_its_echoes_is_seen(tmp_path, count, echoes, together):
    series(tmp_path / "dark", count * echoes, SeriesInstanceUID="1.2.1")
    seen = {}
    for number, path in enumerate(sorted((tmp_path / "dark").glob("*.dcm"))):
        place, echo = divmod(number, echoes) if together else divmod(number, count)[::-1]
        dataset = pydicom.dcmread(path)
        dataset.ImagePositionPatient = [0, 0, 3 * place - 1e-4 * echo]  # as if computed anew for each
        dataset.EchoNumbers = echo + 1
        seen[path.name] = (place, echo)
        path.write_bytes(as_bytes(dataset))
    for slices, places in (("middle", [count // 2]), ("every:2", list(range(1, count, 2))), ("every:1", range(count))):
        notes = Notes()
        images = read_data(tmp_path, CLASSES, "patient", HALF, 0, choice=Choice(slices), notes=notes)
        assert sorted(seen[image.path.name] for image in images) == [(place, 0) for place in places], slices
        assert notes.left_out["other slice"] == count * echoes - len(places)
        assert (
            sum("00.dcm: of series, or files, with several pictures at one place" in line for line in notes.told) == 1
        )
    assert len(names(tmp_path, slices="all")[0]) == count * echoes
    (tmp_path / "manifest.csv").write_text("path,label,slice\ndark,dark,2\n")
    with pytest.raises(ManifestError, match=rf"slice 2 of folder 'dark', of which {echoes} images lie at one place"):
        names(tmp_path)


def test_pictures_that_all_lie_at_one_place_are_in_order_of_time(tmp_path):
    series(tmp_path / "dark", 5, SeriesInstanceUID="1.2.1", ImagePositionPatient=[0, 0, 7])
    assert names(tmp_path, slices="middle") == (["02.dcm"], {"other slice": 4})
    (tmp_path / "dark" / "m.dcm").write_bytes(as_bytes(enhanced([7] * 4)))
    notes = Notes()
    images = read_data(tmp_path, CLASSES, "patient", HALF, 0, choice=Choice("middle"), notes=notes)
    assert [(image.path.name, image.frame) for image in images] == [("02.dcm", None), ("m.dcm", 2)]
    assert not any("at one place" in line for line in notes.told)


@pytest.mark.parametrize("count", [4, 5])
@pytest.mark.parametrize("together", [True, False])
def test_of_frames_at_one_place_the_first_that_is_stored_is_taken(tmp_path, count, together):
    (tmp_path / "dark").mkdir()
    path = tmp_path / "dark" / "m.dcm"
    alongs = [3 * place for place in range(count) for _ in range(2)] if together else [*range(count), *range(count)]
    path.write_bytes(as_bytes(enhanced(alongs)))
    middle = count // 2 * (2 if together else 1)
    notes = Notes()
    images = read_data(tmp_path, CLASSES, "patient", HALF, 0, choice=Choice("middle"), notes=notes)
    assert [image.frame for image in images] == [middle]
    assert notes.left_out == {"other slice": 2 * count - 1}
    assert sum("m.dcm: of series, or files, with several pictures at one place" in line for line in notes.told) == 1
    opened = open_file(path.read_bytes())
    whole, chosen = see(opened, Place(None), Rules()), see(opened, Place(middle), Rules())
    assert whole.image.tobytes() == chosen.image.tobytes()
    assert whole.facts.notes == ("2 frames at the middle place, of which the first that is stored is taken",)
    assert chosen.facts.notes == ()
    (tmp_path / "manifest.csv").write_text(
        f"path,label,patient,frame\ndark/m.dcm,dark,p,\ndark/m.dcm,dark,p,{middle}\n"
    )
    with pytest.raises(ManifestError, match=rf"frame {middle}, the middle one"):
        names(tmp_path)


def test_of_a_file_with_many_frames_the_rule_takes_slices_too(tmp_path):
    import numpy as np

    (tmp_path / "dark").mkdir()
    (tmp_path / "dark" / "m.dcm").write_bytes(as_bytes(dicom(np.stack([RAMP] * 5), PatientID="P1")))
    for slices, frames in ((None, [None]), ("middle", [2]), ("every:2", [1, 3]), ("all", [0, 1, 2, 3, 4])):
        images = read_data(tmp_path, CLASSES, "patient", HALF, 0, choice=Choice(slices=slices))
        assert [image.frame for image in images] == frames
    rows = "path,label,patient,slice\ndark/m.dcm,dark,p1,4\n"
    (tmp_path / "manifest.csv").write_text(rows)
    images = read_data(tmp_path, CLASSES, "patient", HALF, 0, choice=Choice(slices="all"))
    assert [image.frame for image in images] == [4]


def test_frames_of_one_file_are_taken_by_their_position_or_as_they_are_stored_and_that_is_told(tmp_path):
    (tmp_path / "dark").mkdir()
    path = tmp_path / "dark" / "m.dcm"
    for alongs, expected, told in (
        ([30, 0, 10, 40, 20], {"middle": [4], "every:2": [2, 0], "all": [1, 2, 4, 0, 3]}, 0),
        ([30, 0, None, 40, 20], {"middle": [2], "every:2": [1, 3], "all": [0, 1, 2, 3, 4]}, 1),
    ):
        path.write_bytes(as_bytes(enhanced(alongs)))
        for slices, frames in expected.items():
            notes = Notes()
            images = read_data(tmp_path, CLASSES, "patient", HALF, 0, choice=Choice(slices), notes=notes)
            assert [image.frame for image in images] == sorted(frames)
            lines = [line for line in notes.told if f"{path}: not every frame says where it lies" in line]
            assert len(lines) == (told if slices != "all" else 0)
    path.write_bytes(as_bytes(enhanced([30, 0, 10, 40, 20])))
    (tmp_path / "manifest.csv").write_text("path,label,patient,frame\ndark/m.dcm,dark,p,\ndark/m.dcm,dark,p,4\n")
    with pytest.raises(ManifestError, match=r"frame 4, the middle one"):
        names(tmp_path)


def test_a_header_that_counts_more_frames_than_the_file_has_bytes_makes_no_rows_for_them(tmp_path):
    (tmp_path / "dark").mkdir()
    dataset = dicom(RAMP, PatientID="P1", NumberOfFrames=9_000)
    (tmp_path / "dark" / "m.dcm").write_bytes(as_bytes(dataset))
    assert names(tmp_path, slices="all")[0] == ["m.dcm"]


def test_scouts_screenshots_and_segmentations_are_left_out_by_rule_and_counted(tmp_path):
    series(tmp_path / "dark" / "scout", 2, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    series(tmp_path / "dark" / "seg", 1, Modality="SEG")
    series(tmp_path / "dark" / "ct", 3)
    assert len(names(tmp_path)[0]) == 6
    kept, left_out = names(tmp_path, leave_out=("scout", "no picture"))
    assert len(kept) == 3
    assert left_out == {"scout": 2, "no picture": 1}


def test_a_nifti_of_labels_is_no_picture_either(tmp_path):
    (tmp_path / "dark").mkdir()
    for number, intent in enumerate((0, 1001, 1002, 22)):
        for kind, ending in ((nibabel.Nifti1Image, "nii.gz"), (nibabel.Nifti2Image, "nii")):
            image = kind(np.zeros((3, 3, 3), np.int16), np.eye(4))
            image.header["intent_code"] = intent
            image.to_filename(tmp_path / "dark" / f"{number}.{ending}")
    kept, left_out = names(tmp_path, "image", leave_out=("no picture",))
    assert kept == ["0.nii", "0.nii.gz", "1.nii", "1.nii.gz"]
    assert left_out == {"no picture": 4}
    notes = Notes()
    assert len(find_pictures(tmp_path, Choice(), notes)) == 4
    assert sum("a segmentation" in line for line in notes.passed_over) == 2
