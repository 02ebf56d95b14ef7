"""An adapter against labels: what ``evaluate`` finds, and what it and ``report`` write for papers."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from secure_fed.core.errors import DataError, LabelError, ManifestError
from secure_fed.core.layout import ADAPTER
from secure_fed.lab.simulation import simulate
from secure_fed.model.evaluation import metrics
from secure_fed.operate.evaluate import NO_VALUE, Evaluation, _share, evaluate_folder
from secure_fed.operate.new_study import RANDOM_CHECKPOINT
from secure_fed.report.chart import Cell, Table
from secure_fed.report.evaluation import evaluation_sections
from secure_fed.report.papers import as_csv, as_latex
from tests.conftest import CLASSES, OBSERVER, Run, make_template


@pytest.fixture
def labelled(images: Path, tmp_path: Path) -> Path:
    """The observer's images with a manifest: two images a patient, a scanner, one without a label."""
    folder = tmp_path / "labelled"
    shutil.copytree(images / OBSERVER, folder)
    rows = []
    for path in sorted(folder.glob("*/*.png")):
        number = int(path.stem)
        label = "" if (path.parent.name, number) == ("dark", 9) else path.parent.name
        scanner = {0: "", 1: ""}.get(number, f"S{number % 2}")
        rows.append((path.relative_to(folder).as_posix(), f"{path.parent.name}-{number // 2}", label, scanner))
    text = "path,patient,label,scanner\n" + "".join(",".join(row) + "\n" for row in rows)
    (folder / "manifest.csv").write_text(text)
    return folder


def evaluated(run: Path, folder: Path, column: str | None = None) -> Evaluation:
    return evaluate_folder(run / ADAPTER, folder, column, run / RANDOM_CHECKPOINT)


def test_of_class_folders_each_image_counts_as_a_patient(finished_run: Path, images: Path) -> None:
    found = evaluated(finished_run, images / OBSERVER)
    assert not found.by_patient
    counts = np.zeros((3, 3), dtype=int)
    for image, row in zip(found.said.images, found.said.probabilities, strict=True):
        counts[CLASSES.index(image.path.parent.name), int(row.argmax())] += 1
    assert found.overall.confusion_matrix is not None
    assert [list(row) for row in found.overall.confusion_matrix] == counts.tolist()
    assert found.overall.accuracy == pytest.approx(np.trace(counts) / 30)
    assert sum(each.images for each in found.bins) == found.overall.images == found.overall.patients == 30
    assert found.coverage is None


def test_patients_classes_and_groups_of_a_manifest(finished_run: Path, labelled: Path) -> None:
    found = evaluated(finished_run, labelled, "scanner")
    assert (found.by_patient, found.unlabelled, found.overall.images, found.overall.patients) == (True, 1, 29, 15)
    assert [(each.name, each.images, each.patients) for each in found.classes] == [
        *(("dark", 9, 5), ("light", 10, 5), ("striped", 10, 5))
    ]
    assert {value: scores.images for value, scores in found.groups.items()} == {NO_VALUE: 6, "S0": 12, "S1": 11}
    matrix = np.array(found.overall.confusion_matrix)
    for place, each in enumerate(found.classes):
        assert each.sensitivity.value == pytest.approx(matrix[place, place] / matrix[place].sum())
        if matrix[:, place].sum():
            assert each.precision.value == pytest.approx(matrix[place, place] / matrix[:, place].sum())
        assert each.sensitivity.low is not None
        assert each.sensitivity.low <= each.sensitivity.value <= (each.sensitivity.high or 0)


@pytest.fixture
def split(labelled: Path) -> Path:
    """The same with splits: of each class patient 0 in test, patient 1 in val, the others in train."""
    lines = (labelled / "manifest.csv").read_text().splitlines()
    splits = {"0": "test", "1": "val"}
    rows = []
    for line in lines[1:]:
        path, patient, label, scanner = line.split(",")
        own = splits.get(patient[-1], "train") if label else "unlabelled"
        rows.append(f"{path},{patient if label else 'nobody'},{label},{scanner},{own}")
    (labelled / "manifest.csv").write_text("\n".join([f"{lines[0]},split", *rows]) + "\n")
    return labelled


def test_of_a_manifest_with_splits_test_images_count_alone_and_that_is_said(
    finished_run: Path, split: Path, secfacmic: Run
) -> None:
    shutil.copy(split / "dark/0.png", split / "dark/in-no-row.png")
    words = ("evaluate", "--adapter", finished_run / ADAPTER, "--images", split,
             "--checkpoint", finished_run / RANDOM_CHECKPOINT)  # fmt: skip
    shown = secfacmic(*words)
    assert "6 labelled images of 3 patients, of split test by the manifest; 25 images of others" in shown.stdout
    assert "figures are too good" not in shown.stdout
    found = json.loads(secfacmic(*words, "--json").stdout)
    assert (found["split"], found["left_out"], found["overall"]["images"]) == ("test", 25, 6)
    every = secfacmic(*words, "--split", "all").stdout
    assert "29 labelled images of 15 patients." in every
    assert "Images of split train are among these" in every


def test_where_nothing_says_what_was_trained_on_that_is_said(finished_run: Path, labelled: Path) -> None:
    found = evaluated(finished_run, labelled)
    assert (found.split, found.left_out) == (None, 0)
    assert "Nothing here says which images" in " ".join(evaluation_sections(found)[0].notes)


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (("test", "val"), DataError, "no image of split test, by its manifest.csv; found 17 of train, 12 of val, 1 of"),
        ((",test", ",tests"), ManifestError, "6 rows are of no split"),
        (("split\n", "Set\n"), ManifestError, "column 'Set' says of which split"),
        (("dark-2,dark,S0,train", "dark-2,dark,S0,test"), ManifestError, "'dark-2' is in splits"),
    ],
    ids=["none", "another word", "another name", "one patient in two"],
)
def test_splits_that_do_not_hold_are_refused(
    change: tuple[str, str], kind: type[Exception], says: str, finished_run: Path, split: Path
) -> None:
    text = (split / "manifest.csv").read_text()
    assert change[0] in text
    (split / "manifest.csv").write_text(text.replace(*change))
    with pytest.raises(kind) as refused:
        evaluated(finished_run, split)
    assert says in str(refused.value)


def test_a_split_where_there_are_none_is_refused(finished_run: Path, labelled: Path) -> None:
    with pytest.raises(ManifestError, match=r"no manifest\.csv with a column split, so no split test"):
        evaluate_folder(finished_run / ADAPTER, labelled, None, finished_run / RANDOM_CHECKPOINT, split="test")


def test_each_slice_of_a_volume_has_the_label_of_its_own_row(finished_run: Path, tmp_path: Path) -> None:
    """A hospital labels slices, not files: one row's label for all of a file's would be wrong and nobody would see."""
    folder = tmp_path / "volumes"
    folder.mkdir()
    rng = np.random.default_rng(0)
    volume = nibabel.Nifti1Image(rng.integers(0, 255, (32, 32, 6), dtype=np.uint8), np.diag([1.0, 1.0, 1.0, 1.0]))
    nibabel.save(volume, folder / "head.nii.gz")
    rows = [(0, "dark", "S1"), (2, "light", "S2"), (4, "", "S1"), (5, "dark", "S2")]
    text = "".join(f"head.nii.gz,p1,{label},{scanner},{number}\n" for number, label, scanner in rows)
    (folder / "manifest.csv").write_text(f"path,patient,label,scanner,slice\n{text}")
    found = evaluated(finished_run, folder, "scanner")
    assert [(each.name, each.images) for each in found.classes] == [("dark", 2), ("light", 1), ("striped", 0)]
    assert (found.unlabelled, found.by_patient) == (1, True)
    assert {value: scores.images for value, scores in found.groups.items()} == {"S1": 1, "S2": 2}


def test_a_row_of_a_folder_labels_all_images_below_it(finished_run: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "series"
    shutil.copytree(images / OBSERVER / "dark", folder / "a")
    shutil.copytree(images / OBSERVER / "light", folder / "b")
    (folder / "manifest.csv").write_text("path,patient,label\na,p1,dark\nb,p2,light\n")
    found = evaluated(finished_run, folder)
    assert [(each.name, each.images, each.patients) for each in found.classes] == [
        *(("dark", 10, 1), ("light", 10, 1), ("striped", 0, 0))
    ]
    assert found.unlabelled == 0


def test_intervals_are_by_patient() -> None:
    """Ten images of two patients are as sure as two, not as ten."""
    hit = np.array([True] * 5 + [False] * 5)
    drawn = np.random.default_rng(0).multinomial(2, [0.5, 0.5], size=1000)[:, [0] * 5 + [1] * 5].astype(float)
    share = _share(drawn, hit, np.ones(10, dtype=bool))
    assert (share.value, share.low, share.high) == (0.5, 0.0, 1.0)
    p = np.where(hit[:, None], [0.9, 0.1], [0.1, 0.9])
    whole = metrics(p, np.zeros(10, dtype=np.int64), ["a"] * 5 + ["b"] * 5)
    assert whole["intervals"]["accuracy"] == [share.low, share.high]


def test_of_a_head_of_one_sum_coverage_is_told(one_sum: Path, images: Path) -> None:
    found = evaluated(one_sum, images / OBSERVER)
    assert found.coverage is not None
    said = found.said
    assert said.cases is not None
    place = {name: number for number, name in enumerate(CLASSES)}
    held = [said.cases.sets[index, place[image.path.parent.name]] for index, image in enumerate(said.images)]
    assert found.coverage.found.value == pytest.approx(np.mean(held))
    assert found.coverage.size == pytest.approx(said.cases.sets.sum(axis=1).mean())
    assert [each.covered is not None for each in found.classes] == [True] * 3


@pytest.fixture(scope="module")
def one_sum(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    out = tmp_path_factory.mktemp("sum") / "out"
    method = {"adapter": "gaussian_head", "most_patients": 50, "shrinkage": 0.1}
    encoding = {"bits": 20, "lanes": 2, "value_bound": 1.0}
    simulate(make_template(rounds=2, method=method, encoding=encoding), out, images)
    return out


def test_what_cannot_be_evaluated_says_what_is_missing(finished_run: Path, labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no column centre; found path, patient, label, scanner"):
        evaluated(finished_run, labelled, "centre")
    text = (labelled / "manifest.csv").read_text()
    (labelled / "manifest.csv").write_text(text.replace(",striped,", ",Striped,"))
    with pytest.raises(LabelError, match="does not know: 'Striped'"):
        evaluated(finished_run, labelled)
    (labelled / "manifest.csv").unlink()
    with pytest.raises(ManifestError, match="so no column scanner"):
        evaluated(finished_run, labelled, "scanner")
    shutil.copytree(labelled / "dark", tmp_path / "loose")
    with pytest.raises(DataError, match="none of 10 images has a label"):
        evaluated(finished_run, tmp_path / "loose")


def test_a_folder_of_sites_is_told_from_one_of_classes(finished_run: Path, images: Path) -> None:
    with pytest.raises(DataError, match="they look like sites, not like classes; expected the folders of the sites"):
        evaluated(finished_run, images)


def test_the_command_tells_it_and_writes_it_for_a_paper(
    finished_run: Path, labelled: Path, tmp_path: Path, secfacmic: Run
) -> None:
    arguments = ("evaluate", "--adapter", finished_run / ADAPTER, "--images", labelled, "--by", "scanner",
                 "--checkpoint", finished_run / RANDOM_CHECKPOINT)  # fmt: skip
    done = secfacmic(*arguments, "--figures", tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    assert "29 labelled images of 15 patients" in done.stdout
    assert "1 images without a label count in nothing" in done.stderr
    by_class, _, by_scanner = done.stdout.partition("By class, %")[2].partition("By scanner, %")
    assert all(word in by_class for word in ("patients", "sensitivity", "precision")), "cut to fit into 80 columns"
    assert all(word in by_scanner for word in ("patients", "balanced", "calibration")), "cut to fit into 80 columns"
    assert "…" not in done.stdout
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {
        *(f"{stem}.{form}" for stem in ("classes-1", "classes-2", "calibration") for form in ("svg", "pdf")),
        *(f"{stem}.{form}" for stem in ("overall", "classes", "calibration", "groups") for form in ("tex", "csv")),
    }
    assert (tmp_path / "figures" / "calibration.pdf").read_bytes().startswith(b"%PDF")
    assert "<svg" in (tmp_path / "figures" / "calibration.svg").read_text()
    with (tmp_path / "figures" / "overall.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    document = json.loads(secfacmic(*arguments, "--json").stdout)
    assert float(rows[0]["value"]) == pytest.approx(100 * document["overall"]["balanced_accuracy"])
    again = secfacmic(*arguments, "--figures", tmp_path / "again")
    assert again.returncode == 0
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "figures" / name).read_bytes(), name


def test_a_report_writes_its_figures_too(finished_run: Path, tmp_path: Path, secfacmic: Run) -> None:
    done = secfacmic("report", finished_run, "--out", tmp_path / "r.html", "--figures", tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    forms = {path.suffix for path in (tmp_path / "figures").iterdir()}
    assert forms == {".svg", ".pdf", ".tex", ".csv"}


def test_a_calibration_error_outside_its_interval_is_told(finished_run: Path, images: Path) -> None:
    found = evaluated(finished_run, images / "ash")
    notes = {}
    for value in (0.1, 0.3):
        scores = found.overall.model_copy(
            update={
                "expected_calibration_error": value,
                "intervals": {"expected_calibration_error": (0.2, 0.4)},
            }
        )
        each = replace(found, column="scanner", overall=scores, groups={"S0": scores})
        notes[value] = [" ".join(section.notes) for section in evaluation_sections(each)]
    told = "A calibration error may lie below its interval"
    assert sum(told in text for text in notes[0.1]) == 2
    assert not any(told in text for text in notes[0.3])


def test_latex_means_what_the_table_says() -> None:
    table = Table("50 % of A_B & C", ("class_1", "share, %"), ((Cell("a\\b ± {x}"), Cell("12.5", 12.5)),))
    text = as_latex(table)
    assert text.splitlines()[0] == "% 50 % of A_B & C"
    assert r"class\_1 & share, \% \\" in text
    assert r"a\textbackslash{}b $\pm$ \{x\} & 12.5 \\" in text
    assert "{lr}" in text
    assert as_csv(table) == 'class_1,"share, %"\na\\b ± {x},12.5\n'
