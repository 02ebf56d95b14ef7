"""What is there for a method is there for the head of one sum: pictures, evidence, sweeps, a demo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from PIL import Image

from secure_fed.clients.given_sums import GIVEN
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.errors import RepeatedSumError
from secure_fed.core.tomlfile import write_toml
from secure_fed.lab.simulation import Listener, simulate
from secure_fed.lab.sweep import SweepListener, run_sweep
from secure_fed.operate.evidence import pack_evidence, verify_evidence
from secure_fed.operate.plots import plot_run
from tests.conftest import TRAINING, template_table
from tests.integration.test_one_sum import METHOD, one_sum_template
from tests.network import Network

TABLE = {
    "rounds": 2,
    "method": METHOD,
    "features": {"basis": "random", "dimensions": 16},
    "encoding": {"bits": 18, "precision_bits": 24, "value_bound": 1.0},
}
QUIET = Listener(encoding=lambda *_: None, round=lambda _: None, stage=lambda _: None)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    out = tmp_path_factory.mktemp("one-sum-commands") / "out"
    simulate(one_sum_template(), out, images, QUIET)
    return out


def test_a_head_of_one_sum_is_drawn(simulated: Path, tmp_path: Path) -> None:
    written = plot_run(simulated, tmp_path / "plots")
    # Logits are linear in features that nothing moves, so that there is no map of moved ones.
    assert {path.name for path in written} >= {"learning_curves.png", "confusion.png", "reliability.png"}
    for path in written:
        with Image.open(path) as picture:
            assert min(picture.size) > 300
            assert np.asarray(picture.convert("L")).std() > 5  # not an empty page


def test_a_reviewer_checks_a_site_of_one_sum(simulated: Path, tmp_path: Path) -> None:
    pack_evidence(simulated / "sites" / "ash", tmp_path / "evidence.zip")
    found = verify_evidence(tmp_path / "evidence.zip")
    assert (found["site"], found["rounds"], found["updates_in_sums"]) == ("ash", 2, 2)
    assert found["records"] == 3


@pytest.mark.usefixtures("forked_workers")
def test_a_sweep_tries_basis_and_dimensions_of_one_sum(images: Path, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(tomli_w.dumps(template_table(**TABLE, mode="plain")))
    sweep = {"format": 1, "name": "sums", "study": "study.toml", "data": str(images)}
    dimensions = {"features.dimensions": [4, 16]}
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(sweep | {"grid": dimensions}))
    found = run_sweep(tmp_path / "sweep.toml", tmp_path / "out", SweepListener(), jobs=1)
    assert [trial.error for trial in found.trials] == [None, None]
    small, large = (trial.summary for trial in found.trials)
    assert small is not None
    assert large is not None
    assert small.one_sum is not None
    assert small.adapter_digest != large.adapter_digest
    assert sum(row.bytes_up for row in small.rounds) < sum(row.bytes_up for row in large.rounds)


@pytest.mark.slow
def test_a_demo_of_one_sum_gives_what_a_simulation_gives(simulated: Path, tmp_path: Path, images: Path) -> None:
    template = tmp_path / "small.toml"
    template.write_text(tomli_w.dumps(template_table(**TABLE)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "secure_fed.cli", "demo", str(template), "--data", str(images), "--out", str(out)]
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    summary, expected = json.loads(result.stdout), json.loads((simulated / "summary.json").read_text())
    for key in ("method", "sites", "adapter_digest", "metrics", "one_sum"):
        assert summary[key] == expected[key], key
    assert [row["sites_in"] for row in summary["rounds"]] == [len(TRAINING)] * 2
    assert [row["bytes_up"] for row in summary["rounds"]] == [row["bytes_up"] for row in expected["rounds"]]


@pytest.mark.slow
def test_another_run_of_a_study_of_one_sum_is_refused_by_every_sites_client(tmp_path: Path, images: Path) -> None:
    """By the commands that begin one, with new keys and everybody's word: no patient is in a second exact sum."""
    network = Network(tmp_path / "out", one_sum_template(), images)
    sites = {name: network.site_folder(name) / "site.toml" for name in network.names}
    for path in sites.values():
        file = read_site_file(path)
        write_toml(path, file.model_copy(update={"data": file.data.model_copy(update={"kind": "patients"})}))
    study, maker = network.folder / "study.toml", network.agreed.study.key_maker
    try:
        network.start("server", *network.names)
        assert set(network.wait(240).values()) == {0}
        given = {name: (sites[name].parent / "identity" / GIVEN).read_bytes() for name in TRAINING}
        key = tmp_path / "key"
        secfacmic("keys", "create", study, "--site", sites[maker], "--out", key)
        for path in sites.values():
            if path != sites[maker]:
                secfacmic("keys", "accept", key, "--site", path)
            secfacmic("site", "accept", study, "--site", path, "--by", "Dr. Ada", "--again")
        network.options["server"] = ["--key", str(key)]
        network.start("server", *network.names)
        assert set(network.wait(240, *TRAINING).values()) == {RepeatedSumError.exit_code}
    finally:
        network.close()
    for name in TRAINING:
        assert "are in the exact sum that this site gave to run" in network.log(name)
        assert (sites[name].parent / "identity" / GIVEN).read_bytes() == given[name]
    assert network.records == 1  # the beginning of the run, and no sum


def secfacmic(*words: str | Path) -> None:
    command = [sys.executable, "-P", "-m", "secure_fed.cli", *map(str, words)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
