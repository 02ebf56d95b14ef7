"""Whole studies in one process: results, repetition, interruption; and sites on other kinds of CPU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import tomli_w

from secure_fed.clients.features import pool_features
from secure_fed.clients.training import train_alone
from secure_fed.core.errors import OutputError, StorageError, StudyError
from secure_fed.core.storage import exclusive
from secure_fed.lab.attack import attack
from secure_fed.lab.demo import run_demo
from secure_fed.lab.simulation import Listener, RoundFacts, simulate
from secure_fed.model.scores import SCALARS
from secure_fed.protocol import codec
from secure_fed.protocol.study import load_study
from tests.conftest import CLASSES, OBSERVER, TRAINING, Federation, Run, make_template, template_table
from tests.forked import Forked
from tests.workers import run_on_workers


class Heard(Listener):
    """A listener that remembers."""

    def __init__(self) -> None:
        self.rounds: list[RoundFacts] = []
        self.encoded: dict[str, int] = {}
        super().__init__(
            encoding=lambda site, done, total: self.encoded.update({site: done}),
            round=self.rounds.append,
            stage=lambda text: None,
        )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, images: Path) -> tuple[Path, dict[str, Any], Heard]:
    out = tmp_path_factory.mktemp("finished") / "out"
    heard = Heard()
    return out, simulate(make_template(), out, images, heard), heard


def test_sites_that_share_a_folder_are_refused_before_anything_is_written(tmp_path: Path, images: Path) -> None:
    table = template_table()
    table["simulation"]["sites"][1]["folder"] = table["simulation"]["sites"][0]["folder"]
    template = make_template(simulation=table["simulation"])
    runs = (
        lambda: simulate(template, tmp_path / "out", images),
        lambda: attack(template, tmp_path / "out", images),
        lambda: run_demo(template, tmp_path / "out", images, Heard()),
    )
    for run in runs:
        with pytest.raises(StudyError, match=r"the folders of ash.*birch.*are one"):
            run()
    assert not (tmp_path / "out").exists()
    shared = make_template(simulation=table["simulation"] | {"shared": True}, rounds=1)
    assert simulate(shared, tmp_path / "out", images)["sites"] == list(TRAINING)


def test_the_summary_keeps_its_contract(finished: tuple[Path, dict[str, Any], Heard]) -> None:
    out, summary, heard = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    assert set(summary) == {
        *("study_id", "backbone", "method", "mode", "seed", "sites", "adapter_digest", "seconds_total", "rounds"),
        *("metrics", "observers", "values", "device", "kind", "format"),
    }
    assert (summary["kind"], summary["format"]) == ("study", 2)
    assert summary["sites"] == list(TRAINING)
    assert [entry["round"] for entry in summary["rounds"]] == [1, 2, 3]
    assert set(summary["metrics"]) == {"zero_shot", "local_only", "text_head", "pooled", "federated"}
    names = {*SCALARS, "confusion_matrix", "intervals", "images", "patients"}
    for method, result in summary["metrics"].items():
        assert set(result["per_site"]) == set(TRAINING)
        assert all(set(metrics) == names for metrics in result["per_site"].values())
        assert set(result["held_out"]) == names
        assert ("held_out_per_site" in result) == (method in ("local_only", "text_head"))
    for method in ("local_only", "text_head"):
        result = summary["metrics"][method]
        values = [result["held_out_per_site"][name]["accuracy"] for name in TRAINING]
        assert result["held_out"]["accuracy"] == pytest.approx(np.mean(values))
    assert summary["metrics"]["federated"]["held_out"]["images"] == 27  # 30 but for the unlabelled
    assert summary["metrics"]["federated"]["per_site"]["ash"]["images"] == 6
    assert [facts.sites_in for facts in heard.rounds] == [TRAINING] * 3
    assert {path.name for path in out.iterdir()} >= {
        *("study.toml", "study.safetensors", "summary.json", "adapter.safetensors", "server", "sites")
    }
    assert {path.name for path in (out / "sites").iterdir()} == {*TRAINING, OBSERVER}


def test_learning_curves_are_those_of_each_rounds_adapter(
    finished: tuple[Path, dict[str, Any], Heard], images: Path, tmp_path: Path
) -> None:
    out, summary, _ = finished
    curves = [entry["val_balanced_accuracy"] for entry in summary["rounds"]]
    assert all(set(curve) == set(TRAINING) for curve in curves)
    federation = Federation(out)
    sites = {site.name: site for site in federation.sites()}
    assert curves[-1] == {name: sites[name].validate(sites[name].parameters) for name in TRAINING}
    shorter = simulate(make_template(rounds=1), tmp_path / "out", images, Heard())
    assert shorter["rounds"][0]["val_balanced_accuracy"] == curves[0]
    # The shared counts that come with a round are of the adapter before it: for the first, the initial one.
    correct = images_in_all = 0
    for name in TRAINING:
        val = sites[name].features().val
        probabilities = sites[name]._predict(val.x, federation.agreed.initial.adapter, federation.agreed)
        correct += int((probabilities.argmax(axis=1) == val.y).sum())
        images_in_all += len(val.y)
    assert summary["rounds"][0]["validation"] == pytest.approx(correct / images_in_all)


def test_pooled_is_trained_on_all_sites_images_for_as_many_steps(
    finished: tuple[Path, dict[str, Any], Heard],
) -> None:
    out, summary, _ = finished
    federation = Federation(out)
    sites = [federation.site(name) for name in TRAINING]
    everything = pool_features([site.features() for site in sites])
    assert len(everything.train.y) == sum(len(site.features().train.y) for site in sites) == 45
    pooled = train_alone(federation.agreed, everything, "pooled")
    found = federation.site(OBSERVER).evaluate(pooled)
    assert summary["metrics"]["pooled"]["held_out"] == found


def test_bytes_are_those_that_travelled(finished: tuple[Path, dict[str, Any], Heard]) -> None:
    out, summary, _ = finished
    sent = {name: list((out / "sites" / name).glob("state/runs/*/outbox/*.envelope")) for name in TRAINING}
    assert all(len(files) == 1 for files in sent.values())  # the last round's
    assert summary["rounds"][-1]["bytes_up"] == sum(files[0].stat().st_size for files in sent.values())
    record = next((out / "server").glob("runs/*/journal/00000003.record"))
    assert summary["rounds"][-1]["bytes_down"] == record.stat().st_size * 4


def test_the_adapter_file_needs_nothing_but_the_backbone(finished: tuple[Path, dict[str, Any], Heard]) -> None:
    out, summary, _ = finished
    data = (out / "adapter.safetensors").read_bytes()
    tensors = safetensors.numpy.load(data)
    with safetensors.safe_open(str(out / "adapter.safetensors"), "np") as file:
        metadata = file.metadata()
    adapter = {name.removeprefix("adapter."): value for name, value in tensors.items() if name.startswith("adapter.")}
    assert codec.adapter_digest(adapter) == summary["adapter_digest"] == metadata["adapter_digest"]
    assert tensors["prompt_features"].shape[0] == len(CLASSES)
    assert metadata["study"] == summary["study_id"]
    assert json.loads(metadata["backbone"])["digest"] == summary["backbone"]["digest"]
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert json.loads(metadata["prompts"])[2] == ["a striped image", "a picture that is striped"]
    assert json.loads(metadata["method"])["adapter"] == "facmic"


def test_a_finished_study_starts_a_new_run_with_a_new_key_and_draws_of_its_own(
    finished: tuple[Path, dict[str, Any], Heard], images: Path
) -> None:
    out, summary, _ = finished
    run, key = (out / "server/run").read_text(), sorted(out.glob("sites/*/state/keys/*"))
    heard = Heard()
    again = simulate(make_template(), out, images, heard)
    assert again["adapter_digest"] != summary["adapter_digest"]
    assert again["metrics"]["zero_shot"] == summary["metrics"]["zero_shot"]
    assert again["metrics"]["local_only"] == summary["metrics"]["local_only"]
    assert (out / "server/run").read_text() != run
    assert len(sorted(out.glob("sites/*/state/keys/*"))) == 2 * len(key)
    assert sorted(path.name for path in (out / "sites/ash/state/runs").iterdir()) == sorted(
        path.name for path in (out / "server/runs").iterdir()
    )
    federation = Federation(out)
    assert all(site.features().encoded == 0 for site in federation.sites())


def test_plain_gives_the_same_adapter_bit_for_bit(
    finished: tuple[Path, dict[str, Any], Heard], images: Path, tmp_path: Path
) -> None:
    plain = simulate(make_template(mode="plain"), tmp_path / "out", images, Heard())
    assert plain["mode"] == "plain"
    assert plain["study_id"] != finished[1]["study_id"]
    assert plain["adapter_digest"] == finished[1]["adapter_digest"]
    assert plain["metrics"] == finished[1]["metrics"]
    assert plain["rounds"][0]["bytes_up"] != finished[1]["rounds"][0]["bytes_up"]


def test_another_seed_gives_another_adapter_and_needs_another_folder(
    finished: tuple[Path, dict[str, Any], Heard], images: Path, tmp_path: Path
) -> None:
    out, summary, _ = finished
    with pytest.raises(OutputError, match="with other seed"):
        simulate(make_template(seed=4), out, images, Heard())
    with pytest.raises(OutputError, match="expected the same data"):
        simulate(make_template(), out, images.parent, Heard())
    other = simulate(make_template(seed=4, rounds=1), tmp_path / "out", images, Heard())
    assert other["adapter_digest"] != summary["adapter_digest"]


def test_two_simulations_never_share_a_folder(images: Path, tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(StorageError, match="another process is using it"):
        simulate(make_template(), tmp_path, images, Heard())
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}


def test_local_only_trains_as_long_as_the_federation(
    finished: tuple[Path, dict[str, Any], Heard], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    import secure_fed.clients.training

    true = secure_fed.clients.training.train_round
    monkeypatch.setattr(
        secure_fed.clients.training,
        "train_round",
        lambda *args: calls.append(args[0].study.training.steps) or true(*args),
    )
    federation = Federation(finished[0])
    federation.site("ash").train_alone(federation.agreed)
    assert calls == [4, 4, 4]


@pytest.mark.parametrize(
    "change",
    [
        {"method": {"adapter": "facmic", "norm": "batch", "lmmd_weight": 1.0, "loss": "contrastive"}},
        {"method": {"adapter": "facmic", "norm": "batch", "adaptation": "adversarial", "loss": "contrastive"}},
        {"method": {"adapter": "low_rank", "rank": 4, "lmmd_weight": 0.5}},
        {"method": {"adapter": "text_head"}},
        {"encoding": {"bits": 11, "lanes": 3, "value_bound": 0.1, "share_validation": False}},
    ],
    ids=["paper", "adversarial", "low rank", "text head", "three lanes"],
)
def test_every_method_runs_encrypted(images: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    heard = Heard()
    summary = simulate(make_template(rounds=1, **change), tmp_path / "out", images, heard)
    assert summary["method"] == change.get("method", {"adapter": "facmic"})["adapter"]
    assert (heard.rounds[0].validation is None) == ("encoding" in change)
    shared = safetensors.numpy.load((tmp_path / "out/adapter.safetensors").read_bytes())
    assert not any("running" in name or "mean" in name or "var" in name for name in shared)
    assert {name for name in shared if name.startswith("adapter.")} == {
        f"adapter.{name}" for name in load_study(tmp_path / "out/study.toml").initial.adapter
    }  # no discriminator, for one


def test_a_killed_simulation_goes_on_where_it_was(
    finished: tuple[Path, dict[str, Any], Heard], images: Path, tmp_path: Path, secfacmic: Run
) -> None:
    template = tmp_path / "template.toml"
    template.write_text(tomli_w.dumps(template_table()))
    out = tmp_path / "out"
    command = ["simulate", str(template), "--data", str(images), "--out", str(out), "--json"]
    process = Forked(command, tmp_path / "log")
    deadline = time.monotonic() + 120
    while not list(out.glob("server/runs/*/journal/00000001.record")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    run = (out / "server/run").read_text()
    assert not list(out.glob("server/runs/*/journal/00000003.record"))
    again = secfacmic(*command)
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout)
    assert (out / "server/run").read_text() == run
    assert summary["adapter_digest"] == finished[1]["adapter_digest"]
    assert len(summary["rounds"]) == 3


def test_all_sites_hold_the_same_adapter_on_any_kind_of_cpu_and_thread_count(federation: Federation) -> None:
    for name in ("birch", OBSERVER):
        path = federation.folder / "sites" / name / "site.toml"
        path.write_text(path.read_text().replace("threads = 1", "threads = 2"))
    kinds = dict(zip((*TRAINING, OBSERVER), ("default", "avx2", "avx512", "default"), strict=True))
    found = run_on_workers(federation, {name: {"ATEN_CPU_CAPABILITY": kind} for name, kind in kinds.items()})
    assert found.kinds["ash"] == "DEFAULT"  # the others as far as this CPU goes
    assert all(len(set(digests.values())) == 1 for digests in found.digests)
    assert found.threads == {"ash": 1, "birch": 2, "cedar": 1, OBSERVER: 2}
    assert found.digests[-1]["ash"] != codec.adapter_digest(federation.agreed.initial.adapter)
