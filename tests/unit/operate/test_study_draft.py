"""Folders before there is a study: what they have, what they have in common, and the template drafted of them."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from PIL import Image

from secure_fed.clients.data import DRAWN_ALONE
from secure_fed.core.errors import DataError, DataLeakError, ManifestError, OutputError, StorageError, StudyError
from secure_fed.lab.simulation import Budget, prepare, simulate, tell_overlaps
from secure_fed.operate.folders import compare, look_at, propose_manifest
from secure_fed.operate.new_study import check_study
from secure_fed.operate.study_draft import draft_study
from secure_fed.protocol.study import read_template, with_fields
from tests.conftest import CLASSES, Run, make_template
from tests.unit.clients.test_dicom import RAMP, as_bytes, dicom


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four folders of pictures, none of which is like another."""
    root = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(5)
    for site in ("ash", "birch", "cedar", "dogwood"):
        for label in CLASSES:
            (root / site / label).mkdir(parents=True)
            for number in range(6):
                pixels = rng.integers(0, 256, (32, 32), dtype=np.uint8)
                Image.fromarray(pixels).save(root / site / label / f"{number}.png")
    return root


def folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())


def listed(root: Path, site: str, splits: dict[str, str]) -> None:
    """Write a manifest whose splits hold, a patient an image."""
    rows = [f"{path.relative_to(root / site)},{path.stem}-{path.parent.name},{path.parent.name},"
            f"{splits.get(path.name, 'train')}" for path in sorted((root / site).glob("*/*.png"))]  # fmt: skip
    (root / site / "manifest.csv").write_text("path,patient,label,split\n" + "\n".join(rows) + "\n")


def test_a_draft_of_four_folders_is_a_template_that_runs(own: Path, tmp_path: Path, secfacmic: Run) -> None:
    done = secfacmic("study", "init", *folders(own), "--out", "my own.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last = shlex.split(done.stdout.splitlines()[-1])  # a shell takes it as it stands
    assert last[2:] == ["simulate", "my own.toml", "--data", str(own), "--out", "my own"]
    (tmp_path / "my own.toml").rename(tmp_path / "mine.toml")
    assert "dogwood (held out)" in done.stdout
    found = check_study(tmp_path / "mine.toml")
    assert [(site.name, site.role) for site in found.sites] == [
        *(("ash", "train"), ("birch", "train"), ("cedar", "train"), ("dogwood", "observer"))
    ]
    assert found.class_names == tuple(sorted(CLASSES))
    assert "an image of striped" in found.classes[2].prompts
    text = (tmp_path / "mine.toml").read_text()
    assert "REVIEW" in text
    assert "Advised: FACMIC's gate" in text  # 24 patients a class are few
    quick = with_fields(read_template(tmp_path / "mine.toml"), rounds=1, training={"steps": 1, "learning_rate": 1e-3})
    summary = simulate(quick, tmp_path / "out", own)
    assert len(summary["rounds"]) == 1
    again = secfacmic("study", "init", *folders(own), "--out", "mine.toml", cwd=tmp_path)
    assert again.returncode == OutputError.exit_code
    nowhere = secfacmic("study", "init", "no such folder", "--out", "nowhere/mine.toml", cwd=tmp_path)
    assert nowhere.returncode == StorageError.exit_code  # told before folders are looked at


@pytest.mark.parametrize(
    ("called", "without"),
    [("no_tumour", True), ("Normal", True), ("healthy-controls", True), ("nodule", False), ("normalised", False)],
)
def test_a_class_that_is_called_so_is_drafted_as_the_one_without_a_finding(
    own: Path, tmp_path: Path, called: str, without: bool
) -> None:
    shutil.copytree(own, tmp_path / "own")
    for folder in folders(tmp_path / "own"):
        (folder / CLASSES[0]).rename(folder / called)
    draft = draft_study(folders(tmp_path / "own"), "mine")
    assert [entry.name for entry in draft.template.classes if not entry.finding] == [called] * without
    (tmp_path / "own" / "ash" / CLASSES[1]).rename(tmp_path / "own" / "ash" / "no other")
    two = draft_study(folders(tmp_path / "own"), "mine")
    assert [entry.name for entry in two.template.classes if not entry.finding] == ["no other"] * (not without)


def test_the_method_hangs_on_sizes_and_budget(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    least = "secure_fed.operate.study_draft.LEAST_SUMMED"
    monkeypatch.setattr(least, 19)
    assert draft_study(folders(own), "x").template.method.adapter == "facmic"
    monkeypatch.setattr(least, 18)  # of each class at the sites that train; more with the one that is held out
    assert draft_study(folders(own), "x").template.method.adapter == "gaussian_head"
    private = draft_study(folders(own), "x", epsilon=3.0)
    assert private.template.method.adapter == "text_head"
    assert (private.template.features.basis, private.template.features.dimensions) == ("public", 32)
    assert private.template.aggregation.iterates == "late"
    assert "epsilon 3" in private.text


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.5"])
def test_one_folder_is_split_into_lists_that_are_the_same_everywhere(own: Path, tmp_path: Path, partition: str) -> None:
    folder = own / "ash"
    draft = draft_study([folder], "Mine, all mine!", partition=partition)
    assert draft.text == draft_study([folder], "Mine, all mine!", partition=partition).text
    assert draft.template.name == "mine-all-mine"
    sites = draft.template.plan.sites
    assert [site.name for site in sites] == ["site-1", "site-2", "site-3", "site-4"]
    every = [path for site in sites for path in site.images]
    assert sorted(every) == sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.png"))
    shapes = [Counter(path.split("/")[0] for path in site.images) for site in sites]
    if partition == "iid":
        assert all(max(shape.values()) - min(shape.values()) <= 1 for shape in shapes)
    (tmp_path / "mine.toml").write_text(draft.text)
    agreed = prepare(read_template(tmp_path / "mine.toml"), tmp_path / "out", draft.data)
    assert len(agreed.study.sites) == 4


def test_copies_and_patients_are_not_split_among_sites(own: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ash"
    shutil.copytree(own / "ash", folder)
    for number in range(6):
        shutil.copy(folder / "dark" / f"{number}.png", folder / "dark" / f"copy-{number}.png")
    draft = draft_study([folder], "x", sites=5)
    for site in draft.template.plan.sites:
        names = {Path(path).name for path in site.images if path.startswith("dark/")}
        assert {f"copy-{name}" for name in names if not name.startswith("copy")} == {
            name for name in names if name.startswith("copy")
        }


def test_a_column_of_the_manifest_may_say_the_site(own: Path, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    shutil.copytree(own / "ash", folder)
    paths = sorted(folder.glob("*/*.png"))
    rows = [(path.relative_to(folder).as_posix(), f"p{index // 2}", path.parent.name, f"Ward {index // 2 % 3}")
            for index, path in enumerate(paths)]  # fmt: skip
    (folder / "manifest.csv").write_text("path,patient,label,ward\n" + "".join(",".join(row) + "\n" for row in rows))
    draft = draft_study([folder], "x", partition="column:ward")
    assert [site.name for site in draft.template.sites] == ["ward-0", "ward-1", "ward-2"]
    assert draft.template.plan.unit == "patient"
    assert draft_study([folder], "x", partition="column:ward", sites=3).text == draft.text
    manifest = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text(manifest.replace("/", "\\"))  # which can mean one file only, and is taken
    assert draft_study([folder], "x", partition="column:ward").text == draft.text
    (folder / "manifest.csv").write_text(manifest)
    with pytest.raises(StudyError, match="column ward says 3 sites; expected --sites 3 or none"):
        draft_study([folder], "x", partition="column:ward", sites=4)
    for said, match in (("column:floor", "no column floor"), ("column:path", "several, in column path")):
        with pytest.raises(StudyError, match=match):
            draft_study([folder], "x", partition=said)
    (folder / "manifest.csv").write_text(manifest.replace("Ward 0", "Лор").replace("Ward 1", "Ухо"))
    with pytest.raises(StudyError, match="'Лор' and 'Ухо' of column ward would be one site, site"):
        draft_study([folder], "x", partition="column:ward")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"partition": "by-age"}, "expected iid, dirichlet:0.5"),
        ({"partition": "dirichlet:-1"}, "a number above 0"),
        ({"partition": "column:ward"}, r"has no manifest\.csv"),
        ({"sites": 900}, "would have no patient"),
    ],
)
def test_partitions_that_do_not_work_say_what_would(own: Path, change: dict[str, object], match: str) -> None:
    with pytest.raises(StudyError, match=match):
        draft_study([own / "ash"], "x", **change)  # type: ignore[arg-type]


def test_folders_that_make_no_study(own: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="2 sites to train"):
        draft_study(folders(own)[:2], "x")
    with pytest.raises(StudyError, match="are one folder; expected a folder of its own for each site"):
        draft_study([own / "ash", own / "ash", own / "birch"], "x")
    with pytest.raises(StudyError, match="split one folder"):
        draft_study(folders(own), "x", partition="iid")
    with pytest.raises(DataError, match="they look like sites, not like classes"):
        draft_study([own], "x")
    with pytest.raises(DataError, match="no class in it, but 6 images"):
        draft_study([own / "ash" / "dark"], "x")
    with pytest.raises(DataError, match="no such folder"):
        draft_study([tmp_path / "none"], "x")


def moved(own: Path, root: Path, **places: str) -> list[Path]:
    """The sites' folders, with folders of classes elsewhere: ``ash__dark="images/dark"``."""
    shutil.copytree(own, root)
    for name, to in places.items():
        site, label = name.split("__")
        (root / site / to).parent.mkdir(parents=True, exist_ok=True)
        (root / site / label).rename(root / site / to)
    return folders(root)


def test_a_folder_one_level_above_the_others_is_refused(own: Path, tmp_path: Path) -> None:
    deeper = {f"cedar__{label}": f"images/{label}" for label in CLASSES}
    with pytest.raises(StudyError, match="its folder images is no class of any other site, and holds dark, light, str"):
        draft_study(moved(own, tmp_path / "a", **deeper), "x")
    shutil.copytree(own, tmp_path / "b")
    shutil.copytree(own / "ash/dark", tmp_path / "b/loose")  # beside the sites
    with pytest.raises(DataError, match="its folders ash, birch, cedar, dogwood have dark, light, striped in each"):
        draft_study([tmp_path / "b"], "x")


def test_classes_that_differ_in_writing_alone_are_refused_and_signs_are_no_writing(own: Path, tmp_path: Path) -> None:
    for number, other in enumerate(("Dark", "dark ", "ｄａｒｋ")):
        with pytest.raises(StudyError, match="classes that differ in writing alone") as refused:
            draft_study(moved(own, tmp_path / str(number), cedar__dark=other), "x")
        assert str(tmp_path / str(number) / "cedar") in str(refused.value)
    signs = moved(own, tmp_path / "signs", cedar__dark="HER2+", birch__dark="HER2-")
    drafted = draft_study(signs, "x").template
    assert {"HER2+", "HER2-"} <= set(drafted.class_names)
    assert {"an image of HER2+", "an image of HER2-"} <= {text for one in drafted.classes for text in one.prompts}


def test_how_levels_were_taken_is_told(own: Path, tmp_path: Path, secfacmic: Run) -> None:
    paths = moved(own, tmp_path / "data", ash__dark="deep", birch__striped="light/p1")
    (tmp_path / "data/ash/deep").rename(tmp_path / "data/ash/dark")
    shutil.copy(own / "ash/dark/0.png", paths[2] / "stray.png")
    told = draft_study(paths, "x").told
    assert any("birch: folders within a class' folder are of that class (in light: p1)" in line for line in told)
    assert any("cedar: 1 files beside the classes' folders are of no class" in line for line in told)
    assert sum("of that class" in line or "of no class" in line for line in told) == 2
    checked = secfacmic("data", "check", paths[2]).stdout
    assert "are of no class, and not used" in checked
    assert "as no images" not in checked


def test_held_out_folders_are_named(own: Path) -> None:
    ash, birch, cedar, dogwood = folders(own)
    draft = draft_study([birch, cedar, dogwood], "x", held_out=[ash])
    assert [site.name for site in draft.template.sites if site.role == "observer"] == ["ash"]


# --- overlaps ---


@pytest.fixture
def overlapping(own: Path, tmp_path: Path) -> Path:
    """birch has two of ash's pictures in its test images, and a patient id that cedar has too."""
    root = tmp_path / "data"
    shutil.copytree(own, root)
    for number in (0, 1):
        shutil.copy(root / "ash" / "dark" / f"{number}.png", root / "birch" / "dark" / f"copy-{number}.png")
    listed(root, "ash", {})
    listed(root, "birch", {"copy-0.png": "test", "copy-1.png": "test"})
    listed(root, "cedar", {"0.png": "test"})
    listed(root, "dogwood", {"1.png": "test"})
    return root


def test_folders_are_checked_against_each_other_without_a_study(overlapping: Path, secfacmic: Run) -> None:
    done = secfacmic("data", "check", *folders(overlapping), "--json")
    assert done.returncode == DataLeakError.exit_code
    assert "copy-0.png (test at birch)" in done.stderr
    found = json.loads(done.stdout)
    assert found["folders"][0]["classes"] == {"dark": 6, "light": 6, "striped": 6}
    assert found["in_common"]["copies_count"] == len(found["in_common"]["leaks"]) == 2
    assert found["in_common"]["patients_count"] == 18  # each numbers them alike
    clean = secfacmic("data", "check", *folders(overlapping)[2:])
    assert clean.returncode == 0
    assert "one patient at two sites, or two patients of one number" in clean.stdout


def test_folders_of_one_name_are_compared_and_one_folder_twice_is_refused(own: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(own / "ash", tmp_path / name / "data")
    common, _ = compare([look_at(tmp_path / name / "data") for name in ("a", "b")])
    assert len(common.copies) == 18
    assert {place.name for place in common.copies[0]} == {str(tmp_path / name / "data") for name in ("a", "b")}
    (tmp_path / "c").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match=r"c/data: the same folder as .*a/data; expected each folder once"):
        compare([look_at(tmp_path / name / "data") for name in ("a", "c")])


def test_what_one_folder_has_several_times_is_told_and_a_picture_in_two_splits_refused(
    own: Path, tmp_path: Path, secfacmic: Run
) -> None:
    shutil.copytree(own / "ash", tmp_path / "ash")
    shutil.copytree(own / "birch", tmp_path / "birch")
    again = np.asarray(Image.open(own / "ash" / "dark" / "0.png")) ^ 1  # brighter or darker by 1
    Image.fromarray(again).save(tmp_path / "ash" / "light" / "twin.png")
    shutil.copy(own / "ash" / "dark" / "1.png", tmp_path / "ash" / "dark" / "copy.png")
    done = secfacmic("data", "check", tmp_path / "ash", tmp_path / "birch")
    assert done.returncode == 0
    told = done.stdout
    paths = [tmp_path / "ash" / "dark" / name for name in ("1.png", "copy.png", "0.png")]
    assert f"ash: 1 group of the same picture, 2 images; the first: {paths[0]} (at ash), {paths[1]} (at ash)" in told
    assert f"ash: 1 group of nearly the same picture, 2 images; the first: {paths[2]} (at ash), " in told
    assert "birch: 1 group" not in told
    assert "these folders have no picture in common" in told
    near = np.asarray(Image.open(own / "ash" / "dark" / "1.png")) ^ 1
    Image.fromarray(near).save(tmp_path / "birch" / "dark" / "near.png")
    common, _ = compare([look_at(tmp_path / name) for name in ("ash", "birch")])
    assert [len(common.twins), len(common.twins[0]), len(common.inside["ash"].twins)] == [1, 3, 1]  # two are copies
    listed(tmp_path, "ash", {"copy.png": "test", "twin.png": "test"})
    done = secfacmic("data", "check", tmp_path / "ash", "--json")
    assert done.returncode == DataLeakError.exit_code
    assert "1 pictures lie in more than one split of one folder, so that what is tested was trained on" in done.stderr
    found = json.loads(done.stdout)["folders"][0]
    assert (found["copies_count"], found["near_twins_count"], len(found["leaks"])) == (1, 1, 1)


def test_one_patient_in_two_writings_is_told_within_a_folder_and_across_them(own: Path, tmp_path: Path) -> None:
    for name, ids in (("a", ("007", "x", "")), ("b", ("7", "p1", "P1"))):
        shutil.copytree(own / ("ash" if name == "a" else "birch") / "dark", tmp_path / name)
        rows = [f"{number}.png,dark,{patient}" for number, patient in enumerate(ids)]
        (tmp_path / name / "manifest.csv").write_text("\n".join(["path,label,patient", *rows]))
    one, other = (look_at(tmp_path / name) for name in ("a", "b"))
    assert "'P1', 'p1' (2 images) may be one patient in several writings" in "\n".join(other.notes.told)
    rows = [f"{number}.png,dark,{patient}" for number, patient in enumerate(("007", "7", ""))]
    (tmp_path / "a" / "manifest.csv").write_text("\n".join(["path,label,patient", *rows]))
    partly = look_at(tmp_path / "a")
    assert partly.unit == "image"
    assert "'007', '7' (2 images) may be one patient in several writings" in "\n".join(partly.notes.told)
    (tmp_path / "a" / "manifest.csv").write_text("path,label,patient\n0.png,dark,007\n1.png,dark,x\n")
    common, _ = compare([look_at(tmp_path / "a"), other])
    assert common.writings == [{"007": ["a"], "7": ["b"]}]
    assert "'007' at a, '7' at b" in "\n".join(common.words)
    assert one.unit == "image"
    (tmp_path / "a" / "manifest.csv").write_text("path,label,patient\n0.png,dark,PAT-1\n1.png,dark,x\n")
    (tmp_path / "b" / "manifest.csv").write_text("path,label,patient\n0.png,dark,pat1\n1.png,dark,PAT-11\n")
    common, _ = compare([look_at(tmp_path / "a"), look_at(tmp_path / "b")])
    assert common.writings == [{"PAT-1": ["a"], "pat1": ["b"]}]


def test_a_folders_ids_that_may_be_one_patient_and_its_scouts_are_told(tmp_path: Path) -> None:
    (tmp_path / "dark").mkdir()
    for name, patient in (("a", "007"), ("b", "7")):
        (tmp_path / "dark" / f"{name}.dcm").write_bytes(
            as_bytes(dicom(RAMP if name == "a" else RAMP[::-1], PatientID=patient, ProtocolName="Scout"))
        )
    folder = look_at(tmp_path)
    compare([folder])
    assert folder.notes.told == [
        f"{tmp_path}: doubt: '007', '7' (2 images) may be one patient in several writings: mend it, or settle it in "
        "patients.csv",
        f"{tmp_path}: among its images: 2 of kind scout; leave_out in [data] of site.toml leaves them out",
    ]


def test_a_manifest_that_says_whose_images_are_and_does_not_fit_is_refused_and_not_taken_without_patients(
    tmp_path: Path,
) -> None:
    for name in ("a.dcm", "b.dcm"):
        (tmp_path / name).write_bytes(as_bytes(dicom(RAMP)))
    rows = ["path,label,patient,split", "a.dcm,dark,p1,train", "b.dcm,dark,p1,test"]
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    with pytest.raises(ManifestError, match="patient 'p1' is in split 'test', but on line 2 in 'train'"):
        look_at(tmp_path)


def test_a_start_says_that_a_budget_draws_the_splits_anew(
    own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = draft_study(folders(own), "x", epsilon=8.0).template
    for budget in (None, Budget(8.0, 1e-5)):
        out = tmp_path / f"{budget is None}"
        tell_overlaps(prepare(template, out, own, budget=budget), template.plan, out, own)
        assert (f"ash, birch, cedar, dogwood: {DRAWN_ALONE}" in caplog.text) == (budget is not None)


def test_splits_that_are_still_to_be_drawn_leak_nothing(own: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(own / "ash", tmp_path / name)
    common, unreadable = compare([look_at(tmp_path / name) for name in ("a", "b")])
    assert (len(common.copies), common.leaks, unreadable) == (18, [], [])


def test_a_simulation_whose_sites_overlap_is_refused(
    overlapping: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_template().plan.model_dump(mode="json", exclude_none=True) | {"unit": "patient"}
    template = make_template(rounds=1, simulation=plan)
    with pytest.raises(DataLeakError, match="2 pictures are in the test images of one site and in the training"):
        simulate(template, tmp_path / "out", overlapping)
    assert not (tmp_path / "out" / "server" / "run").exists()
    assert "patient ids at more than one site" in caplog.text
    simulate(make_template(rounds=1, simulation=plan | {"shared": True}), tmp_path / "meant", overlapping)


def test_an_observer_is_tested_on_all_its_images(own: Path, tmp_path: Path) -> None:
    shutil.copytree(own, tmp_path / "data")
    root = tmp_path / "data"
    shutil.copy(root / "ash" / "dark" / "0.png", root / "dogwood" / "dark" / "mine.png")
    for site in ("ash", "birch", "cedar", "dogwood"):
        listed(root, site, {"5.png": "test"})
    with pytest.raises(DataLeakError, match=r"dark/mine.png \(test at dogwood\)"):
        simulate(make_template(rounds=1), tmp_path / "out", root)


# --- a manifest ---


def test_a_manifest_is_proposed_and_never_overwrites_one(own: Path, tmp_path: Path, secfacmic: Run) -> None:
    out = tmp_path / "manifest.csv"
    done = secfacmic("data", "check", own / "ash", "--propose", out)
    assert done.returncode == 0
    assert "18 images, 18 without a patient, 0 without a label" in done.stdout
    with out.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows[0] == {"path": "dark/0.png", "patient": "", "label": "dark"}
    with pytest.raises(OutputError, match="exists"):
        propose_manifest(own / "ash", out)
    for wrong in ((), (own / "ash", own / "birch", "--propose", tmp_path / "x.csv"), (own / "ash", "--html", "x")):
        assert secfacmic("data", "check", *wrong).returncode == 2


def test_lists_of_images_hold(own: Path, tmp_path: Path) -> None:
    draft = draft_study([own / "ash"], "x")
    table = tomllib.loads(draft.text)
    table["simulation"]["sites"][0]["images"].append("dark/99.png")
    (tmp_path / "x.toml").write_text(tomli_w.dumps(table))
    with pytest.raises(DataError, match=r"1 of \d+ images that are listed for this site are not there"):
        simulate(tmp_path / "x.toml", tmp_path / "out", draft.data)
    table["simulation"]["sites"][0]["images"] = table["simulation"]["sites"][1]["images"]
    (tmp_path / "x.toml").write_text(tomli_w.dumps(table))
    with pytest.raises(StudyError, match="in the lists of two sites"):
        simulate(tmp_path / "x.toml", tmp_path / "other", draft.data)
    del table["simulation"]["sites"][0]["images"]
    (tmp_path / "x.toml").write_text(tomli_w.dumps(table))
    with pytest.raises(StudyError, match="a list for each site that shares a folder"):
        simulate(tmp_path / "x.toml", tmp_path / "third", draft.data)
