"""Who is who: by ids, by the headers of DICOM files and by equal pictures; told, and under a budget a stop."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from secure_fed.cli import main
from secure_fed.clients.data import SiteImage, read_data
from secure_fed.clients.dicom_header import Owner, owner
from secure_fed.clients.doubts import all_doubts, renamed
from secure_fed.clients.duplicates import Fingerprint
from secure_fed.clients.files import Notes
from secure_fed.clients.images import compared_images, refuse_doubts
from secure_fed.clients.sitefile import SitePrivacy, read_site_file
from secure_fed.core.errors import PatientError
from secure_fed.core.tomlfile import write_toml
from secure_fed.protocol.simulation_table import Shares
from tests.unit.clients.test_dicom import RAMP, as_bytes, dicom

CLASSES = ("dark", "light")


def images(*rows):
    """Of patient, PatientID and, if there is one, issuer of each file."""
    return [
        SiteImage(Path(f"{place}.dcm"), row[0], 0, "train", owner=Owner(*row[1:])) for place, row in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([("p1", "p1"), ("p2", "")], []),
        ([("007", "7"), ("p2", "P2 ")], []),  # other writings of the same
        ([("p1", "ANONYMOUS"), ("p2", "ANONYMOUS"), ("p3", "000000")], []),
        ([("p1", "X1"), ("p1", "X1"), ("p2", "X2")], []),  # pseudonyms, one for one
        ([("p1", "X1"), ("p2", "X1")], [("header", ("p1", "p2"))]),
        ([("p1", "X1"), ("p1", "X2")], [("header", ("p1",))]),
        ([("p1", "p2"), ("p2", "p1")], [("header", ("p1", "p2"))] * 2),
        ([("p1", "p2"), ("p2", "")], [("header", ("p1", "p2"))]),
        ([("p1", "p1", "H1"), ("p1", "p1", "H1"), ("p2", "p2", "H2")], []),
        ([("p1", "p1", "H1"), ("p1", "p1", "H2")], [("issuers", ("p1",))]),
    ],
)
def test_a_manifest_and_the_headers_of_its_files_must_tell_the_same_patients_apart(rows, found):
    assert [(doubt.kind, doubt.ids) for doubt in all_doubts(images(*rows), "patient", Notes())] == found
    assert not all_doubts(images(*rows), "image", Notes())
    ids = frozenset(patient for patient, *_ in rows)
    assert not all_doubts(images(*rows), "patient", Notes(settled=ids))


def test_ids_that_are_settled_as_one_are_one_in_headers_too():
    two = images(("p9", "X1"), ("p9", "X2"))
    (doubt,) = all_doubts(two, "patient", Notes())
    assert doubt.text == "'p9' (2 images) has the DICOM files of several PatientIDs: 'X1', 'X2'"
    assert not all_doubts(two, "patient", Notes(same={"X1": "p9", "X2": "p9"}))
    assert renamed(images(("p9", "X1"), ("p8", "ANON"), ("7", "007")), Notes()) == 1
    assert renamed(images(("p9", "X1")), Notes(same={"X1": "p9"})) == 0


M40 = {"PatientName": "M\u00fcller^Anna", "PatientBirthDate": "19400512", "PatientSex": "F"}


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        ({"PatientName": "MUELLER^ANNA^^Dr."}, ""),
        ({"PatientName": "Anna Muller"}, ""),
        ({"PatientName": "Anonymous"}, ""),
        ({"PatientName": "17"}, ""),
        ({"PatientName": "", "PatientBirthDate": "", "PatientSex": "O"}, ""),
        ({"PatientBirthDate": "19400101"}, ""),  # its day hidden
        ({"PatientBirthDate": "19000101"}, ""),
        ({"PatientName": "Meier^Anna"}, "PatientName (0010,0010)"),
        ({"PatientBirthDate": "19400513"}, "PatientBirthDate (0010,0030)"),
        ({"PatientBirthDate": "19800101"}, "PatientBirthDate (0010,0030)"),
        ({"PatientSex": "M"}, "PatientSex (0010,0040)"),
        (
            {"PatientName": "B^B", "PatientSex": "M", "PatientBirthDate": "19800202"},
            "PatientName (0010,0010) and PatientBirthDate (0010,0030) and PatientSex (0010,0040)",
        ),
    ],
)
def test_one_patient_id_of_two_people_is_a_doubt(tmp_path, other, differs):
    for name, about in (("a", M40), ("b", M40 | other)):
        header = about | {"PatientID": "17", "SpecificCharacterSet": "ISO_IR 192"}
        (tmp_path / name).write_bytes(as_bytes(dicom(RAMP, **header)))
    site = [SiteImage(tmp_path / name, "17", 0, "train", owner=owner(tmp_path / name)) for name in "ab"]
    words = f"'17' (2 images) has DICOM files that differ in {differs}: {tmp_path / 'a'}, {tmp_path / 'b'}"
    assert [(one.kind, one.text) for one in all_doubts(site, "patient", Notes())] == [("header", words)] * bool(differs)
    assert not all_doubts(site, "patient", Notes(settled=frozenset({"17"})))


def test_one_series_or_file_of_two_patients_is_a_doubt(tmp_path):
    for name in "ab":
        uid = {"PatientID": name + "1", "SeriesInstanceUID": "1.2.3"}
        (tmp_path / name).write_bytes(as_bytes(dicom(RAMP, **uid)))
    site = [SiteImage(tmp_path / name, name + "1", 0, "train", owner=owner(tmp_path / name)) for name in "ab"]
    (doubt,) = all_doubts(site, "patient", Notes())
    assert (doubt.kind, doubt.ids) == ("header", ("a1", "b1"))
    assert "one series, by SeriesInstanceUID" in doubt.text
    assert not all_doubts(site, "patient", Notes(settled=frozenset({"a1"})))
    frames = [SiteImage(Path("v.nii"), patient, 0, "train", frame) for frame, patient in enumerate(("p1", "p2"))]
    (doubt,) = all_doubts(frames, "patient", Notes())
    assert doubt.text == "'p1', 'p2' (2 images) have pictures in one file, v.nii"
    assert not all_doubts(frames, "image", Notes())


def look(content):
    return Fingerprint(hashlib.sha256(content).digest(), bytes(32), 1, 1)


def test_one_picture_is_of_one_patient_and_of_one_class():
    looks = [look(b"a"), look(b"a"), look(b"b"), look(b"b"), None]
    rows = [("p1", 0), ("p2", 1), ("p3", 0), ("p3", None), ("p4", 1)]
    site = [SiteImage(Path(f"{place}.png"), one, label, "train") for place, (one, label) in enumerate(rows)]
    label, patient = all_doubts(site, "patient", Notes(), CLASSES, looks)
    assert label.text == "'p1', 'p2' (2 images) have one picture in classes 'dark', 'light': 0.png, 1.png"
    assert label.remedy == "give the picture one label, or take it out"
    assert patient.text == "'p1', 'p2' (2 images) have one picture: 0.png, 1.png"
    assert all_doubts(site, "image", Notes(), CLASSES, looks) == [label]
    assert all_doubts(site, "patient", Notes(settled=frozenset({"p1"})), CLASSES, looks) == [label]  # who is p2 not


@pytest.fixture
def hospital(federation, tmp_path):
    """Site ash whose manifest has one picture of two patients in two classes, and a DICOM file of another patient."""
    folder = tmp_path / "hospital"
    folder.mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (48, 48), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    Image.open(folder / "0.png").save(folder / "again.bmp")
    for name, whose in (("a.dcm", "H1"), ("b.dcm", "H1")):
        (folder / name).write_bytes(as_bytes(dicom(RAMP if name[0] == "a" else RAMP.T, PatientID=whose)))
    rows = ["path,patient,label,split", "0.png,p0,dark,train", "1.png,p1,light,train", "2.png,p2,dark,test"]
    rows += ["again.bmp,q0,light,train", "a.dcm,p3,dark,train", "b.dcm,p4,dark,train"]
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    path = federation.folder / "sites" / "ash" / "site.toml"
    file = read_site_file(path)
    data = file.data.model_copy(update={"folder": str(folder), "unit": "patient"})
    return file.model_copy(update={"data": data}), folder


def test_contradictions_within_a_split_stop_a_start_under_a_budget_until_they_are_mended(federation, hospital):
    file, folder = hospital
    file.state_folder.begin()
    found, _ = compared_images(file, federation.agreed)
    assert [doubt.kind for doubt in found.doubts] == ["classes", "header", "picture"]
    assert any("2 patients have another id in the manifest" in line for line in found.notes.told)
    refuse_doubts(file, found)  # without a budget it is told only
    private = file.model_copy(update={"privacy": SitePrivacy(epsilon=8.0)})
    with pytest.raises(PatientError, match=r"one picture in classes 'dark', 'light'") as stop:
        refuse_doubts(private, found)
    assert "'p3', 'p4' (2 images) are one patient by PatientID (0010,0020) of their DICOM files, 'H1'" in str(
        stop.value
    )
    manifest = folder / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("again.bmp,q0,light", "again.bmp,q0,dark"))
    (folder / "patients.csv").write_text("id,same_as\nq0,p0\np3,\np4,\n")
    refuse_doubts(private, compared_images(private, federation.agreed)[0])


def test_who_may_be_one_patient_by_the_headers_is_never_in_two_splits(federation, hospital):
    file, folder = hospital
    manifest = folder / "manifest.csv"
    rows = [row.rsplit(",", 1)[0] for row in manifest.read_text().splitlines()]
    half = Shares(train=0.5, val=0, test=0.5, unlabelled=0)
    for number in range(12):
        for letter, name in (("a", f"u{number}"), ("b", f"v{number}")):
            noise = np.random.default_rng([number, letter == "a"]).integers(0, 256, (48, 48), dtype=np.uint8)
            (folder / f"{name}.dcm").write_bytes(as_bytes(dicom(noise, PatientID=f"X{number}")))
            rows.append(f"{name}.dcm,{name},dark")
    manifest.write_text("\n".join(rows) + "\n")
    file.state_folder.begin()
    data = file.data.model_copy(update={"shares": half})
    found, _ = compared_images(file.model_copy(update={"data": data}), federation.agreed)
    splits = {image.patient: image.split for image in found.images}
    assert set(splits.values()) == {"train", "test"}
    assert all(splits[f"u{number}"] == splits[f"v{number}"] for number in range(12))


def test_where_an_image_is_a_patient_no_header_is_asked(hospital, monkeypatch):
    _, folder = hospital
    monkeypatch.setattr("secure_fed.clients.data.owner", None)
    monkeypatch.setattr("secure_fed.clients.files.owner", None)
    assert len(read_data(folder, CLASSES, "image", None, 0)) == 6


def test_a_start_tells_what_was_sniffed_and_how_much_is_in_doubt(federation, hospital, check_out, caplog):
    file, folder = hospital
    manifest = folder / "manifest.csv"
    manifest.write_text(manifest.read_text().replace(",", ";"))
    path = federation.folder / "sites" / "ash" / "site.toml"
    write_toml(path, file)
    caplog.set_level("INFO")
    federation.site("ash").features()
    assert f"{manifest}: separated by semicolons" in caplog.text
    assert "3 doubts about who is who (classes 1, header 1, picture 1); see them: secfacmic data check" in caplog.text
    assert "p3" not in caplog.text.replace(str(folder), "")  # logs are shown to others
    said = check_out(path)
    for words in ("have one picture in classes 'dark', 'light'", "have one picture: ", "are one patient by PatientID"):
        assert words in said


@pytest.fixture
def check_out(monkeypatch, capsys):
    def run(path):
        monkeypatch.setattr(sys, "argv", ["secfacmic", "data", "check", "--site", str(path)])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        return capsys.readouterr().out

    return run
