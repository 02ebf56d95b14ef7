"""Which images a site has: the same answer for training, checks and doctor, and the forgotten in none of them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from secure_fed.clients.data import SiteImage
from secure_fed.clients.data_check import check_data
from secure_fed.clients.duplicates import fingerprint, fingerprints
from secure_fed.clients.features import FeatureCache
from secure_fed.clients.forgotten import Forgotten
from secure_fed.clients.images import (
    by_patient,
    compared_images,
    every_image,
    find_images,
    present_images,
    refuse_doubts,
    site_images,
)
from secure_fed.clients.reading import identity
from secure_fed.clients.rules import Rules
from secure_fed.clients.sitefile import SitePrivacy, read_site_file
from secure_fed.core.errors import ForgottenError, PatientError
from secure_fed.protocol.simulation_table import Shares
from secure_fed.protocol.study import AgreedStudy
from secure_fed.protocol.study_tables import Window
from tests.unit.clients.test_dicom import as_bytes, dicom

SHARES = Shares(train=0.5, val=0.2, test=0.2, unlabelled=0.1)


def picture(seed):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 12), dtype=np.uint8))
    return small.resize((64, 64), Image.Resampling.BICUBIC)


def fill(folder, numbers=range(24)):
    """Patients p00, p01... of one picture; each has a near twin of another patient, q00, q01..."""
    folder.mkdir(exist_ok=True)
    rows = ["path,patient,label"]
    for number in numbers:
        picture(number).save(folder / f"{number:02}.png")
        picture(number).save(folder / f"{number:02}-twin.jpg", quality=60)
        label = ("dark", "light")[number % 2]
        rows += [f"{number:02}.png,p{number:02},{label}", f"{number:02}-twin.jpg,q{number:02},{label}"]
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture
def file(federation, tmp_path):
    """The site file of ash, with patients whose splits are drawn, an empty state folder and no cache yet."""
    fill(tmp_path / "hospital")
    (tmp_path / "state").mkdir()
    file = read_site_file(federation.folder / "sites" / "ash" / "site.toml")
    data = file.data.model_copy(update={"folder": str(tmp_path / "hospital"), "unit": "patient", "shares": SHARES})
    return file.model_copy(update={"data": data, "state": str(tmp_path / "state")})


def with_privacy(file):
    return file.model_copy(update={"privacy": SitePrivacy(epsilon=8.0)})


def image_unit(file):
    return file.model_copy(update={"data": file.data.model_copy(update={"unit": "image"})})


def splits(images):
    return {image.patient: image.split for image in images}


def test_a_forgotten_patient_takes_nobody_along_and_moves_nobody(file, federation, tmp_path):
    before = splits(site_images(file, federation.agreed))
    assert {"train", "val", "test"} <= set(before.values())
    assert all(before[f"p{number:02}"] == before[f"q{number:02}"] for number in range(24))
    # Twins follow p, the first by name.
    gone = {min(name for name, split in before.items() if split == wanted) for wanted in ("train", "val", "test")}
    for patient in gone:
        Forgotten(tmp_path / "state").add(patient, [])
    assert splits(site_images(file, federation.agreed)) == {
        name: split for name, split in before.items() if name not in gone
    }
    assert set(splits(every_image(file, federation.agreed))) == set(before)


def test_everybody_gets_the_same_images_and_none_of_the_forgotten_under_any_name(file, federation, tmp_path):
    folder = tmp_path / "hospital"
    Forgotten(tmp_path / "state").add("p00", [identity((folder / "01.png").read_bytes(), None)])
    agreed = federation.agreed
    used = site_images(file, agreed)
    assert len(used) == 46
    assert not {"p00", "p01"} & set(splits(used))
    (compared, _, _), looks = compared_images(file, agreed)
    assert compared == used
    assert [one.pixels for one in looks.found if one] == [fingerprint(Image.open(one.path)).pixels for one in used]
    assert [image.path for image in present_images(file, agreed)] == [image.path for image in used]
    assert check_data(file, agreed)["patients"]["all"] == 46
    assert len(every_image(file, agreed)) == 48


def test_what_cannot_be_read_keeps_its_reason_at_its_place(file, federation, tmp_path):
    broken = tmp_path / "hospital" / "05.png"
    broken.write_bytes(broken.read_bytes()[:60])
    Forgotten(tmp_path / "state").add("p00", [])
    for one in (file, with_privacy(file)):  # fingerprints made for the splits, and for the comparison alone
        (images, _, _), looks = compared_images(one, federation.agreed)
        (place,) = looks.unreadable
        assert images[place].path == broken
        assert [index for index, found in enumerate(looks.found) if found is None] == [place]


def test_under_a_budget_no_picture_is_looked_at_and_nobody_moves_another(file, federation, tmp_path):
    file = with_privacy(file)
    before = splits(site_images(file, federation.agreed))
    assert any(before[f"p{number:02}"] != before[f"q{number:02}"] for number in range(24))
    assert not file.feature_cache.exists()
    Forgotten(tmp_path / "state").add("p03", [])
    fill(tmp_path / "hospital", range(2, 24))
    after = splits(site_images(file, federation.agreed))
    assert after == {name: before[name] for name in before if name[1:] not in ("00", "01") and name != "p03"}


def test_whoever_needs_no_splits_decodes_and_writes_nothing(file, federation, tmp_path):
    Forgotten(tmp_path / "state").add("p00", [])
    before = set(tmp_path.rglob("*"))
    assert len(present_images(file, federation.agreed)) == 47
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("ask", [site_images, compared_images, present_images])
def test_without_the_list_of_the_forgotten_nothing_is_read(file, federation, tmp_path, ask):
    (tmp_path / "state" / "forgotten.json").write_bytes(b"broken")
    (tmp_path / "hospital" / "manifest.csv").unlink()
    with pytest.raises(ForgottenError):
        ask(file, federation.agreed)


def test_doubtful_ids_stop_a_start_under_a_budget_until_they_are_settled(file, federation, tmp_path):
    manifest = tmp_path / "hospital" / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("02.png,p02", "02.png,P01").replace("03.png,p03", "03.png,nan"))
    found = find_images(file, federation.agreed)
    assert [doubt.ids for doubt in found.doubts] == [("nan",), ("P01", "p01")]
    refuse_doubts(file, found)  # without a budget it is told only
    owners = splits(found.images)
    assert owners["p01"] == owners["P01"]  # and they are never in two splits
    private = with_privacy(file)
    with pytest.raises(PatientError, match=r"'P01', 'p01' .2 images. may be one patient in several writings"):
        refuse_doubts(private, find_images(private, federation.agreed))
    (tmp_path / "hospital" / "patients.csv").write_text("id,same_as\nP01,p01\nnan,\n")
    refuse_doubts(private, find_images(private, federation.agreed))
    assert "P01" not in splits(find_images(private, federation.agreed).images)


def test_ids_that_differ_by_a_year_alone_are_asked_for_and_stop_nobody(file, federation, tmp_path):
    names = ("P1_2019", "P1_2021", "P2_2019", "P1_3", "2019_4", "P5-1999", "p05 2001")
    rows = [f"{number:02}.png,{name},dark" for number, name in enumerate(names)]
    (tmp_path / "hospital/manifest.csv").write_text("\n".join(["path,patient,label", *rows]) + "\n")
    asked = with_privacy(file)
    found = find_images(asked, federation.agreed)
    (told,) = (line for line in found.notes.told if "by a year" in line)
    assert "4 ids differ from others by a year at their end alone" in told
    assert "P5" not in told  # no id: it goes into logs
    refuse_doubts(asked, found)
    (tmp_path / "hospital/patients.csv").write_text("id,same_as\nP1_2021,P1_2019\np05 2001,\n")
    assert not any("by a year" in line for line in find_images(asked, federation.agreed).notes.told)
    for year in (2019, 2021):
        picture(year).save(tmp_path / f"hospital/i1_{year}", "PNG")
    (tmp_path / "hospital/manifest.csv").write_text("path,label\ni1_2019,dark\ni1_2021,dark\n")
    (tmp_path / "hospital/patients.csv").unlink()
    assert not any("by a year" in line for line in find_images(image_unit(asked), federation.agreed).notes.told)


@pytest.mark.parametrize("unit", ["patient", "image"])
def test_a_patient_of_two_studies_is_known_again_whatever_each_shows(file, federation, unit):
    """Under a new pseudonym in another study: to the ledger of both it is a picture that it has seen."""
    data = file.data.model_copy(update={"unit": unit})
    file = with_privacy(file.model_copy(update={"data": data}))
    known = []
    for width in (400, 800):
        window = Window(modality="MR", centre=100, width=width, unit="rescaled")
        study = federation.agreed.study.model_copy(update={"windows": (window,)})
        agreed = AgreedStudy(study, federation.agreed.initial)
        path = Path(file.data.folder) / "shot.dcm"
        shot = dicom(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8), PatientID=f"p{width}")
        path.write_bytes(as_bytes(shot))
        image = SiteImage(path, f"p{width}", 0, "train")
        with FeatureCache(file.feature_cache) as cache:
            looks = fingerprints([image], cache, None, Rules.of(study))
        ((named,), pictures) = by_patient(file, agreed, [image], looks)
        known.append((named.patient, looks.found[0].pixels, pictures[named.patient]))
    (first, shown, own), (second, shown_there, own_there) = known
    assert shown != shown_there
    assert shown in own
    assert own & own_there
    assert (first == second) == (unit == "image")
