"""Pictures show the run's own figures; colours stay apart for every kind of colour vision."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from secure_fed.cli import main
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.errors import AdapterFileError
from secure_fed.model.adapter_file import load_adapter
from secure_fed.model.evaluation import metrics
from secure_fed.operate import plots
from secure_fed.operate.plots import COLOURS, Run, plot_run, plot_site
from tests.conftest import CLASSES, OBSERVER, TRAINING, Federation

torch.set_num_threads(1)

PICTURES = ["learning_curves.png", "confusion.png", "reliability.png", "feature_map.png"]


@pytest.fixture(scope="module")
def run(finished_run: Path) -> Run:
    federation = Federation(finished_run)
    adapter = load_adapter(finished_run / "adapter.safetensors")
    return Run(federation.agreed, federation.sites(), adapter.initial.adapter, adapter.temperature)


@pytest.fixture(scope="module")
def summary(finished_run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished_run / "summary.json").read_text())
    return found


def test_a_run_gets_four_pictures(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["secfacmic", "plot", str(finished_run), "--out", str(tmp_path / "p"), "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert json.loads(capsys.readouterr().out)["files"] == [str(tmp_path / "p" / name) for name in PICTURES]
    for name in PICTURES:
        with Image.open(tmp_path / "p" / name) as picture:
            assert min(picture.size) > 300
            assert np.asarray(picture.convert("L")).std() > 5  # not an empty page


def test_maps_are_the_same_again_and_the_second_is_turned_to_the_first() -> None:
    features = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    first = plots._embed(features, None)
    assert np.array_equal(first, plots._embed(features, None))
    turned = first @ np.array([[0, 1], [-1, 0]], dtype=np.float32)
    found = plots._embed(features, turned)

    def together(rotation: np.ndarray) -> float:
        return float(((found - found.mean(axis=0)) @ rotation * (turned - turned.mean(axis=0))).sum())

    angles = np.linspace(0.2, 6, 30)
    others = [np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in angles]
    assert together(np.eye(2)) >= max(together(rotation) for rotation in others)


def test_curves_are_those_of_the_summary(run: Run, summary: dict[str, Any]) -> None:
    figure = plots.learning_curves(run)
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert set(lines) == {*TRAINING, "guessing"}
    for name in TRAINING:
        expected = [entry["val_balanced_accuracy"][name] for entry in summary["rounds"]]
        x, y = lines[name].get_data()
        assert list(x) == [0, 1, 2, 3]
        np.testing.assert_allclose(np.asarray(y)[1:], expected)
        assert np.asarray(y)[0] == run.training[TRAINING.index(name)].validate(run.agreed.initial.adapter)


def test_confusion_matrices_are_those_of_the_summary(run: Run, summary: dict[str, Any]) -> None:
    figure = plots.confusion(run)
    assert figure is not None
    federated = summary["metrics"]["federated"]
    expected = {name: federated["per_site"][name] for name in TRAINING} | {"held out": federated["held_out"]}
    drawn = [axes for axes in figure.axes if axes.images]
    assert len(drawn) == len(expected)
    for axes, (name, found) in zip(drawn, expected.items(), strict=True):
        assert axes.get_title().startswith(f"{name}: {100 * found['balanced_accuracy']:.0f} %")
        matrix = np.zeros((len(CLASSES), len(CLASSES)), dtype=int)
        for text in axes.texts:
            x, y = text.get_position()
            matrix[round(y), round(x)] = int(text.get_text())
        assert matrix.tolist() == found["confusion_matrix"]


def test_the_diagram_has_the_calibration_error_of_the_metrics(run: Run, summary: dict[str, Any]) -> None:
    figure = plots.reliability(run)
    assert figure is not None
    held_out = figure.axes[1]
    error = summary["metrics"]["federated"]["held_out"]["expected_calibration_error"]
    legend = [text.get_text() for text in held_out.get_legend().get_texts()]
    assert f"as trained: error {100 * error:.1f} %" in legend
    assert any(text.startswith(f"at T = {run.temperature:.2f}: error") for text in legend)
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([0.4, 0.4, 0.4], 300)
    labels = rng.integers(0, 3, 300)
    x, y, size, found = plots._bins(probabilities, labels)
    assert found == pytest.approx(metrics(probabilities, labels)["expected_calibration_error"])
    assert size.sum() == 300
    assert ((y >= 0) & (y <= 1)).all()
    assert (np.diff(x) > 0).all()


def test_the_map_shows_only_images_that_nothing_was_trained_on(run: Run) -> None:
    before, after, labels, owners = plots._features(run)
    trained = {row.tobytes() for site in run.training for row in site.features().train.x}
    shown = {row.tobytes() for row in before}
    assert not trained & shown
    for number, site in enumerate(run.sites):
        features = site.features()
        count = len(features.val.y) + len(features.test.y)
        count += len(features.train.y) if site.name == OBSERVER else 0
        assert (owners == number).sum() == count
    assert set(labels) == {0, 1, 2}
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1, atol=1e-5)
    assert 0.5 < (before * after).sum(axis=1).mean() < 1
    figure = plots.feature_map(run)
    assert figure is not None
    assert [axes.get_legend().get_title().get_text() for axes in figure.axes if axes.get_legend()] == ["class", "site"]


def test_a_site_sees_its_own_images_only(federation: Federation, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "copy")
    for other in (*TRAINING[1:], OBSERVER):
        shutil.rmtree(tmp_path / "copy" / "sites" / other)
    path = tmp_path / "copy/sites/ash/site.toml"
    path.write_text(path.read_text().replace("simulated", "patients"))
    written = plot_site(tmp_path / "copy/sites/ash", tmp_path / "plots")
    assert {path.name for path in written} <= set(PICTURES)
    site = Federation(tmp_path / "copy").site("ash")
    alone = Run(federation.agreed, [site], site.parameters, 1.0)
    curves, matrix = plots.learning_curves(alone), plots.confusion(alone)
    assert curves is not None
    assert matrix is not None
    assert {line.get_label() for line in curves.axes[0].get_lines()} == {"ash", "guessing"}
    assert len([axes for axes in matrix.axes if axes.images]) == 1
    picture = plots.feature_map(alone)
    titles = [] if picture is None else [axes.get_title() for axes in picture.axes]
    assert not any("site silhouette" in title for title in titles)
    assert read_site_file(path).data.kind == "patients"
    with pytest.raises(AdapterFileError, match="no round"):
        plot_site(federation.folder / "sites/ash", tmp_path / "none")


def test_several_sites_of_patients_are_never_drawn_together(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "out")
    path = tmp_path / "out/sites/birch/site.toml"
    path.write_text(path.read_text().replace("simulated", "patients"))
    with pytest.raises(AdapterFileError, match="patients' data"):
        plot_run(tmp_path / "out", tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
VISION = {
    "full": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def _lab(colour: str, matrix: Any) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(np.asarray(matrix) @ linear, 0, 1) / TO_XYZ.sum(axis=1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_colours_stay_apart(vision: str) -> None:
    labs = [_lab(colour, VISION[vision]) for colour in COLOURS]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(labs, 2)) > 10
    styles = list(plots._styles())
    assert len(set(styles)) == len(styles) == 64
