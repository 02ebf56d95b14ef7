"""A study of one sum among real sites: exact, the same in he and plain, refused where it must be."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from onnx.reference import ReferenceEvaluator
from PIL import Image
from typer.testing import CliRunner

from secure_fed import configs
from secure_fed.cli import app
from secure_fed.clients import one_sum as at_site
from secure_fed.clients.acceptance import terms
from secure_fed.clients.given_sums import GIVEN, GivenSums
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import SiteFile, read_site_file
from secure_fed.clients.training import predict
from secure_fed.core.errors import DataError, OutputError, ProtocolError, RepeatedSumError, StudyError
from secure_fed.core.tomlfile import read_toml, write_toml
from secure_fed.lab.attack import attack
from secure_fed.lab.simulation import prepare, simulate
from secure_fed.model.adapter_file import AdapterFile, load_adapter
from secure_fed.model.adapters import build_adapter
from secure_fed.model.cases import judge, log_distances
from secure_fed.operate.export import _claims_of_cases, export_site
from secure_fed.operate.new_study import check_study, new_study
from secure_fed.operate.sum_figures import one_sum_figures
from secure_fed.protocol import aggregation, codec, one_sum
from secure_fed.protocol.initial_state import InitialState
from secure_fed.protocol.rounds import ReplyCode
from secure_fed.protocol.study import read_template
from secure_fed.protocol.study_differences import unlike
from secure_fed.server.coordinator import Coordinator
from tests.conftest import (
    TRAINING,
    Federation,
    close_round,
    copy_of,
    exchange,
    make_template,
    pass_step,
    prepare_sites,
    run_round,
    send_envelopes,
)
from tests.unit.privacy.test_same_bits import dispatches
from tests.workers import run_on_workers

METHOD: dict[str, Any] = {"adapter": "gaussian_head", "most_patients": 40, "min_patients": 2}


def one_sum_template(**changes: Any) -> Any:
    table: dict[str, Any] = {
        "rounds": 2,
        "method": METHOD,
        "features": {"basis": "random", "dimensions": 16},
        "encoding": {"bits": 18, "precision_bits": 24, "value_bound": 1.0},
    }
    return make_template(**(table | changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    return prepare_sites(one_sum_template(), tmp_path_factory.mktemp("one-sum"), images)


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Federation:
    return copy_of(made, tmp_path)


def finish(federation: Federation) -> tuple[Coordinator, list[Any]]:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    for _ in range(federation.agreed.study.rounds):
        run_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    return coordinator, sites


def test_every_site_and_the_observer_hold_the_closed_form_of_all_patients(study: Federation) -> None:
    coordinator, sites = finish(study)
    assert {site.adapter_digest for site in sites} == {sites[0].adapter_digest}
    assert coordinator.finished
    agreed = study.agreed
    exact = [at_site.sums(agreed, site.features()) for site in sites if site.name in TRAINING]
    together = one_sum.Sums(
        sum(each.patients for each in exact), sum(each.first for each in exact), sum(each.second for each in exact)
    )
    histograms = sum(at_site.histograms(agreed, together, site.features()) for site in sites if site.name in TRAINING)
    place, _ = one_sum.chosen(histograms, 3)
    held = {name.removeprefix(aggregation.MOMENT): value for name, value in sites[0].replica.state.tensors.items()}
    assert np.array_equal(held["patients"], together.patients)
    assert np.allclose(held["first"], together.first.ravel(), atol=1e-3)
    head = one_sum.solve(one_sum.Sums.of(held), one_sum.GRID[one_sum.chosen(held["histograms"], 3)[0]], 2)
    assert head is not None
    expected = one_sum.parameters_of(head, agreed.initial.basis, agreed.initial.logit_scale)  # type: ignore[arg-type]
    assert np.array_equal(sites[0].parameters["weight"], expected["weight"])
    assert one_sum.GRID[place] > 0
    scores = [site.evaluate(site.parameters)["balanced_accuracy"] for site in sites]
    assert np.mean(scores) > np.mean([site.evaluate(None)["balanced_accuracy"] for site in sites])
    validation = sites[0].replica.state.validation
    assert validation is not None
    assert validation.images == 3 * (15 + 6)


def test_he_equals_plain(study: Federation, images: Path, tmp_path: Path) -> None:
    _, sites = finish(study)
    plain = tmp_path / "plain"
    prepare(one_sum_template(mode="plain"), plain, images)
    federation = Federation(plain)
    others = federation.sites()
    coordinator = Coordinator.begin(federation.agreed, plain / "server", federation.signing, "0" * 64)
    for _ in range(2):
        run_round(coordinator, others)
    for site in others:
        exchange(coordinator, site)
    assert others[0].adapter_digest == sites[0].adapter_digest


def test_the_second_rounds_envelopes_are_of_their_own_size(study: Federation) -> None:
    coordinator, _ = finish(study)
    sizes = [entry.header.size for entry in coordinator.rounds]
    assert sizes == [study.agreed.layout(number).lanes.payload_bytes for number in (1, 2)]
    assert sizes[0] != sizes[1]


def test_a_site_that_comes_late_and_one_that_restarts_end_at_the_same_head(study: Federation) -> None:
    sites = study.sites()
    coordinator = study.begin(sites)
    present = [site for site in sites if site.name != "dogwood"]
    run_round(coordinator, present)
    again = [study.site(site.name) for site in present]
    run_round(study.reopen(), again)
    late = study.site("dogwood")
    coordinator = study.reopen()
    for site in (*again, late):
        exchange(coordinator, site)
    assert late.adapter_digest == again[0].adapter_digest == study.site("ash").adapter_digest
    states = list(late.replica.history())
    assert [state.round for state in states] == [1, 2]
    assert states[1].digest == late.replica.state.digest


def test_integers_are_stored_once_and_sent_again(study: Federation) -> None:
    sites = study.sites()
    coordinator = study.begin(sites)
    exchange(coordinator, sites[0])
    path = next(sites[0].replica.files.folder.outbox.glob("*.integers"))
    first = safetensors.numpy.load(path.read_bytes())["integers"]
    assert first.size == study.agreed.layout(1).lanes.values
    site = study.site("ash")
    assert site.respond(study.reopen().request(site.name, site.run, site.position)).envelope
    assert np.array_equal(safetensors.numpy.load(path.read_bytes())["integers"], first)


def test_without_a_second_round_the_declared_shrinkage_holds_and_nothing_is_claimed(
    images: Path, tmp_path: Path
) -> None:
    method = {"adapter": "gaussian_head", "shrinkage": 0.2, "min_patients": 2}
    prepare(one_sum_template(rounds=1, method=method), tmp_path / "out", images)
    _, sites = finish(Federation(tmp_path / "out"))
    parameters = sites[0].parameters
    assert one_sum.Limits.of(parameters) == one_sum.NO_LIMITS
    held = {name.removeprefix(aggregation.MOMENT): value for name, value in sites[0].replica.state.tensors.items()}
    head = one_sum.solve(one_sum.Sums.of(held), 0.2, 2)
    assert head is not None
    assert np.array_equal(parameters["factor"], head.factor)


def test_a_class_with_too_few_patients_is_told_and_never_predicted(
    study: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    sites = study.sites()
    for site in sites:
        features = site.features()
        kept = np.flatnonzero(features.train.y != 2)
        owners = tuple(features.patients["train"][row] for row in kept)
        site._features = type(features)(
            **(
                vars(features)
                | {
                    "train": type(features.train)(features.train.x[kept], features.train.y[kept]),
                    "patients": {**features.patients, "train": owners},
                }
            )
        )
    coordinator = study.begin(sites)
    for _ in range(2):
        run_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    found = predict(study.agreed, sites[0].parameters, sites[0].features().test.x, None)
    assert not np.any(found.argmax(axis=1) == 2)
    assert sites[0].replica.state.tensors["moment.patients"][2] == 0
    name = study.agreed.study.class_names[2]
    told = [record.getMessage() for record in caplog.records if "left out of the head" in record.getMessage()]
    assert len(told) == len(sites)  # the one that only looks on among them
    assert told[0].startswith(f"class {name} has 0 patients in the sum of all sites; expected at least 2")
    file = AdapterFile(
        study.agreed.study.id,
        study.agreed.study.backbone,
        study.agreed.study.class_names,
        study.agreed.study.method,
        replace(study.agreed.initial, adapter=sites[0].parameters),
        None,
    )
    assert _claims_of_cases(file).startswith(f"Never predicted, for too few patients in the sum: {name}. ")


def test_a_sum_that_was_abandoned_is_told_and_nothing_is_claimed(
    study: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    site, agreed = study.site("ash"), study.agreed
    before = aggregation.start(agreed)
    sent = at_site.message(agreed, 2, before, site.features())
    assert not any(values.any() for values in sent.values())
    at_site.tell(agreed, before)
    assert "the round that was to carry it was abandoned" in caplog.text
    after = aggregation.after_round(agreed, before, sent)
    assert codec.adapter_digest(aggregation.adapter_of(after)) == codec.adapter_digest(agreed.initial.adapter)
    assert one_sum_figures(agreed, [site], []) is None


def test_more_patients_than_declared_are_refused_before_anything_leaves(images: Path, tmp_path: Path) -> None:
    method = {"adapter": "gaussian_head", "most_patients": 10, "min_patients": 2}
    prepare(one_sum_template(method=method), tmp_path / "out", images)
    federation = Federation(tmp_path / "out")
    sites = federation.sites()
    coordinator = federation.begin(sites)
    with pytest.raises(DataError, match="15 training patients, but the study declares at most 10"):
        sites[0].respond(coordinator.request(sites[0].name, sites[0].run, sites[0].position))


def test_statistics_beyond_their_bounds_are_told_with_what_would_do(
    study: Federation, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secure_fed.clients.learner.SATURATION_WARNING", 0.1)  # of updates, which have more values
    site, agreed = study.site("ash"), study.agreed
    begun = study.begin(study.sites())
    exchange(begun, site)
    size, wide = 16 * 17 // 2, np.zeros((16, 16))
    wide[3, 3] = 1e4  # a single variance among many that is cut bends the head
    site._encode(one_sum.Sums(np.zeros(3), np.full((3, 16), 1e4), wide).values())
    assert agreed.study.method.one_sum
    assert "round 1, first: 48 of 48 values exceed their bounds" in caplog.text
    assert f"round 1, second: 1 of {size} values exceed their bounds" in caplog.text
    assert "patients: " not in caplog.text
    assert "raise method.most_patients in the next study" in caplog.text


def test_zero_shot_until_there_is_a_sum(study: Federation) -> None:
    site = study.site("ash")
    test = site.features().test.x
    expected = predict(study.agreed, site.parameters, test, None)
    assert np.allclose(expected, site._predict(test, None, study.agreed), atol=1e-6)


def test_local_and_pooled_heads_follow_the_same_rule(study: Federation) -> None:
    site = study.site("ash")
    parameters = site.train_alone(study.agreed)
    assert list(parameters) == sorted(study.agreed.initial.adapter)
    initial = study.agreed.initial
    adapter = build_adapter(study.agreed.study.method, initial.prompt_features, initial.logit_scale, parameters)
    assert adapter.get_parameter("weight").dtype.itemsize == 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rounds": 3}, "rounds = 3; expected 2, or 1 with a declared shrinkage"),
        ({"aggregation": {"rule": "fedadam"}}, "adds sums up; expected no rule"),
        ({"method": {"adapter": "gaussian_head", "private_head": True}}, "solved, not trained"),
        (
            {"method": METHOD | {"shrinkage": 0.0}},
            "shrinkage = 0 in 16 dimensions, of classes that may have as few as 2 patients .* expected .* above 0",
        ),
        (
            {"method": METHOD | {"shrinkage": 0.0}, "features": {}},
            "shrinkage = 0 in all of the backbone's dimensions, .* at most 40 at a site",
        ),
        (
            {"privacy": {"validation_rounds": 2}},
            "privacy.validation_rounds = 2 makes no difference with gaussian_head; expected 0: leave it out",
        ),
        (
            {"encoding": {"bits": 18, "precision_bits": 24, "value_bound": 1.0, "share_validation": False}},
            "encoding.share_validation = false makes no difference with gaussian_head; expected true",
        ),
        ({"sites": [*({"name": name, "weight": 0.5} for name in TRAINING)]}, "each patient weighs 1, but ash, birch"),
        ({"features": {"basis": "random", "dimensions": 300}}, "the backbone has 128"),
        ({"features": {"basis": "public", "dimensions": 16}}, "give it with --public"),
        ({"method": {"adapter": "gaussian_head", "lmmd_weight": 1.0}}, "moves no image feature"),
        (
            {"method": METHOD | {"most_patients": 3, "min_patients": 10}},
            "3 sites of at most 3 patients .* no more than 9",
        ),
        ({"encoding": {"bits": 18, "precision_bits": 60, "value_bound": 1.0}}, "a precision of 60 bits"),
    ],
)
def test_what_does_not_go_together_is_named(change: dict[str, Any], says: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises((StudyError, ValueError), match=says):
        prepare(one_sum_template(**change), tmp_path / "out", images)


def test_a_basis_of_another_backbone_is_refused_by_study_new(secfacmic: Any, tmp_path: Path) -> None:
    template = one_sum_template(features={"basis": "public", "dimensions": 8}, simulation=None)
    write_toml(tmp_path / "t.toml", template)
    other = configs.MODELS / "mini-clip.statistics.safetensors"
    made = secfacmic("study", "new", tmp_path / "t.toml", "--out", tmp_path / "out", "--public", other)
    assert made.returncode == StudyError.exit_code
    assert "statistics of backbone" in made.stderr
    assert "expected those of the same backbone: give a folder of public images instead" in " ".join(
        made.stderr.split()
    )
    assert not (tmp_path / "out/study.toml").exists()


def test_public_images_make_the_basis(secfacmic: Any, images: Path, tmp_path: Path) -> None:
    template = one_sum_template(features={"basis": "public", "dimensions": 8}, simulation=None)
    write_toml(tmp_path / "template.toml", template)
    ran = secfacmic("study", "new", tmp_path / "template.toml", "--public", images, "--out", tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    basis = study_basis(tmp_path / "out")
    assert basis is not None
    assert basis.dimensions == 8
    again = secfacmic(
        *("study", "new", tmp_path / "template.toml", "--out", tmp_path / "again"),
        *("--public", tmp_path / "out" / "public.safetensors"),
    )
    assert again.returncode == 0, again.stderr
    other = study_basis(tmp_path / "again")
    assert other is not None
    assert np.allclose(np.abs(np.sum(basis.axes * other.axes, axis=1)), np.square(basis.axes).sum(axis=1), rtol=1e-2)  # type: ignore[operator]


def test_public_statistics_of_another_digest_than_the_studys_are_refused(images: Path, tmp_path: Path) -> None:
    table = one_sum_template(features={"basis": "public", "dimensions": 8})
    made, _ = new_study(table, (), tmp_path / "out", public=images)
    kept = tmp_path / "out" / "public.safetensors"
    digest = hashlib.sha256(kept.read_bytes()).hexdigest()
    assert (made.features.source, made.features.digest) == ("images", digest)
    assert digest[:16] in made.features.origin
    assert "declared public" in made.features.origin
    again, _ = new_study(table, (), tmp_path / "again", public=kept)
    assert (again.features.source, again.features.digest) == ("file", digest)
    assert not unlike(made, table)
    # The basis is made of what is kept, to the last bit, so that whoever has the file can make it again.
    first, second = study_basis(tmp_path / "out"), study_basis(tmp_path / "again")
    assert np.array_equal(first.axes, second.axes)
    pinned = one_sum_template(features={"basis": "public", "dimensions": 8, "digest": "a" * 64})
    with pytest.raises(StudyError, match=rf"digest {digest}, study .* names {'a' * 64}"):
        new_study(pinned, (), tmp_path / "pinned", public=kept)
    assert not (tmp_path / "pinned").exists()
    right = one_sum_template(features={"basis": "public", "dimensions": 8, "digest": digest})
    new_study(right, (), tmp_path / "right", public=kept)
    check_study(tmp_path / "out" / "study.toml")
    kept.write_bytes(kept.read_bytes() + b" ")
    with pytest.raises(StudyError, match=rf"names {digest}"):
        check_study(tmp_path / "out" / "study.toml")


def test_public_images_are_seen_as_the_sites_will_see_theirs(images: Path, tmp_path: Path) -> None:
    for path in images.glob("*/*/*.png"):
        grey = np.asarray(Image.open(path)).astype(int)
        alpha = 255 - grey // 2
        name = f"{path.parent.parent.name}-{path.parent.name}-{path.name}"
        for folder in ("clear", "white"):
            (tmp_path / folder).mkdir(exist_ok=True)
        clear = Image.merge("LA", [Image.fromarray(one.astype(np.uint8)) for one in (grey, alpha)])
        clear.save(tmp_path / "clear" / name)
        white = Image.new("RGBA", clear.size, "white")
        Image.alpha_composite(white, clear.convert("RGBA")).convert("L").save(tmp_path / "white" / name)
    table = one_sum_template(features={"basis": "public", "dimensions": 8}, background="white")
    for folder in ("clear", "white"):
        new_study(table, (), tmp_path / f"of {folder}", public=tmp_path / folder)
    seen, expected = (study_basis(tmp_path / f"of {folder}") for folder in ("clear", "white"))
    assert np.allclose(seen.centre, expected.centre, atol=1e-3)
    kept = tmp_path / "of white" / "public.safetensors"
    new_study(table, (), tmp_path / "again", public=kept)
    with pytest.raises(StudyError, match="seen by other windows, another background"):
        new_study(table.model_copy(update={"background": "black"}), (), tmp_path / "black", public=kept)


def study_basis(folder: Path) -> Any:
    return InitialState.from_bytes((folder / "study.safetensors").read_bytes()).basis


@pytest.mark.parametrize(
    ("features", "bits", "precision"),
    [({"basis": "random", "dimensions": 16}, 13, 24), ({"basis": "raw"}, 13, 24)],
)
def test_study_new_writes_the_precision_that_a_basis_asks_for_and_the_same_template_goes_on(
    features: dict[str, Any], bits: int, precision: int, images: Path, tmp_path: Path
) -> None:
    template = one_sum_template(features=features, encoding={"bits": 18, "value_bound": 1.0})
    made = prepare(template, tmp_path / "out", images)
    assert (made.study.encoding.bits, made.study.encoding.precision_bits) == (bits, precision)
    assert prepare(template, tmp_path / "out", images).study.id == made.study.id
    assert not unlike(made.study, template)
    other = one_sum_template(features=features, encoding={"bits": 18, "value_bound": 2.0})
    assert unlike(made.study, other) == ["encoding"]
    with pytest.raises(OutputError, match="with other encoding"):
        prepare(other, tmp_path / "out", images)


def test_the_packaged_study_asks_for_one_sum() -> None:
    template = read_template(Path("brain_mri_one_sum"))
    assert template.method.one_sum
    assert (template.rounds, template.features.basis) == (2, "raw")


def of_patients(federation: Federation, *names: str, **data: Any) -> None:
    """Say of sites that their images are patients', and what else of their data."""
    for name in names:
        path = federation.folder / "sites" / name / "site.toml"
        file = read_toml(path, SiteFile, ValueError)  # type: ignore[type-var]
        write_toml(path, file.model_copy(update={"data": file.data.model_copy(update={"kind": "patients", **data})}))


def test_patients_images_are_given_to_one_exact_sum_and_no_other(study: Federation, tmp_path: Path) -> None:
    of_patients(study, "ash")
    _, sites = finish(study)
    given = identity_of(study, "ash") / GIVEN
    assert given.stat().st_mode & 0o777 == 0o600
    assert not (identity_of(study, "birch") / GIVEN).exists()
    again = study.sites()
    coordinator = study.begin(again)
    with pytest.raises(RepeatedSumError, match="15 of 15 training images and patients are in the exact sum"):
        again[0].respond(coordinator.request(again[0].name, again[0].run, again[0].position))
    assert exchange(coordinator, again[1]).code == ReplyCode.READY  # its images are simulated
    given.write_bytes(b"{")
    with pytest.raises(RepeatedSumError, match="cannot be read"):
        again[0].respond(coordinator.request(again[0].name, again[0].run, again[0].position))
    assert sites[0].finished


def test_a_list_that_lacks_what_the_journal_says_was_given_is_refused(study: Federation) -> None:
    of_patients(study, "ash")
    finish(study)
    (identity_of(study, "ash") / GIVEN).unlink()
    again = study.site("ash")
    coordinator = study.begin([again])
    with pytest.raises(RepeatedSumError, match=r"says nothing of run .*by its own journal.*put it back from a backup"):
        again.respond(coordinator.request(again.name, again.run, again.position))


def test_patients_are_given_with_the_word_that_opens_their_sum_and_not_before(study: Federation) -> None:
    of_patients(study, "ash")
    site, given = study.site("ash"), identity_of(study, "ash") / GIVEN
    assert exchange(study.begin(study.sites()), site).code == ReplyCode.READY
    assert not given.exists()
    # That run is over, with nothing said: the next one gets them, up to its reveal.
    sites = study.sites()
    coordinator = study.begin(sites)
    send_envelopes(coordinator, sites)
    assert not given.exists()
    coordinator.advance()
    assert exchange(coordinator, sites[0]).code == ReplyCode.REVEALED
    assert list(json.loads(given.read_bytes())["runs"]) == [sites[0].run]
    # Before that run's record: its own word is enough.
    given.unlink()
    later = study.site("ash")
    coordinator = study.begin([later])
    with pytest.raises(RepeatedSumError, match="says nothing of run"):
        exchange(coordinator, later)


def test_patients_whose_mask_others_can_stand_for_are_given_with_the_word_on_shares(
    images: Path, tmp_path: Path
) -> None:
    """Then others' shares open what a site sent, also if it reveals nothing itself."""
    sites = [{"name": name} for name in FOUR]
    federation = Federation(prepare_sites(one_sum_template(sites=sites, collusion=1, rounds=2), tmp_path, images))
    of_patients(federation, "ash")
    taking = [federation.site(name) for name in FOUR]
    coordinator = federation.begin(taking)
    send_envelopes(coordinator, taking)
    given = identity_of(federation, "ash") / GIVEN
    assert not given.exists()
    coordinator.advance()
    assert exchange(coordinator, taking[0]).code == ReplyCode.CHECKED
    assert given.exists()


def test_every_round_that_adds_patients_is_one_of_sums() -> None:
    memory = {"adapter": "memory", "block": "image", "map_block": "image", "centroids": 12}
    anomaly = {"task": "anomaly", "classes": [{"name": "dark", "prompts": ["a dark image"]}], "rounds": 3}
    several = (
        (one_sum_template(), [True, False, False]),
        (make_template(**anomaly, method=memory), [True, True, False]),  # who comes late gives sums as well
        (make_template(), [False, False, False]),
    )
    for template, expected in several:
        assert [template.sums_patients(number) for number in (1, 2, 3)] == expected


def test_two_runs_that_are_open_at_once_do_not_both_open_a_sum(study: Federation) -> None:
    of_patients(study, "ash")
    sites = study.sites()
    coordinator = study.begin(sites)
    send_envelopes(coordinator, sites)
    coordinator.advance()
    marks = sites[0]._marks()
    sites[0]._given_sums.give("1" * 64, [mark.tobytes() for mark in marks])
    with pytest.raises(RepeatedSumError, match="15 of 15"):
        exchange(coordinator, sites[0])
    assert sites[0].revealed_to is None


def test_a_rehearsal_of_a_first_round_gives_nothing(study: Federation) -> None:
    of_patients(study, "ash")
    site = study.site("ash")
    exchange(study.begin([site]), site)
    site.first_integers()
    assert not (identity_of(study, "ash") / GIVEN).exists()


def test_the_same_pictures_in_other_files_and_of_other_ids_are_no_new_ones(study: Federation, tmp_path: Path) -> None:
    path, folder = study.folder / "sites" / "ash" / "site.toml", tmp_path / "pictures"
    shutil.copytree(read_site_file(path).data.folder, folder)
    of_patients(study, "ash", folder=str(folder))
    finish(study)
    taken = study.site("ash").train_sources()
    for number, image in enumerate(taken):
        with Image.open(image.path) as picture:
            picture.load()
        image.path.unlink()
        picture.save(image.path.with_name(f"renamed {number}.bmp"))
    later = study.site("ash")
    coordinator = study.begin([later])
    assert not {image.path for image in later.train_sources()} & {image.path for image in taken}
    assert {image.path.parent.parent for image in later.train_sources()} == {folder}
    with pytest.raises(RepeatedSumError, match="training images and patients are in the exact sum"):
        exchange(coordinator, later)


def identity_of(federation: Federation, name: str) -> Path:
    return Path(read_site_file(federation.folder / "sites" / name / "site.toml").identity)


def test_a_few_images_more_are_no_other_sum(tmp_path: Path) -> None:
    a, b, c = (hashlib.sha256(name).digest()[:16] for name in (b"a", b"b", b"c"))
    sums = GivenSums(tmp_path, b"secret")
    sums.give("1" * 64, [a, b])
    sums.give("1" * 64, [b, a])
    for call in (sums.refuse, sums.give):
        with pytest.raises(RepeatedSumError, match="2 of 3 training images and patients"):
            call("2" * 64, [a, b, c])
    sums.refuse("2" * 64, [c], ["1" * 64])
    assert list(json.loads((tmp_path / GIVEN).read_bytes())["runs"]) == ["1" * 64]
    with pytest.raises(RepeatedSumError, match="says nothing of run 3333"):
        sums.refuse("2" * 64, [c], ["1" * 64, "3" * 64])
    sums.give("2" * 64, [c])


def test_a_patient_is_the_same_one_with_other_pictures_and_a_picture_with_another_patient(tmp_path: Path) -> None:
    sums = GivenSums(tmp_path, b"secret")
    sums.give("1" * 64, sums.marks([b"p" * 32], ["Ada"]))
    for marks in (sums.marks([b"q" * 32], ["Ada"]), sums.marks([b"p" * 32], ["Bob"]), sums.marks([b"p" * 32], [])):
        with pytest.raises(RepeatedSumError, match="1 of "):
            sums.refuse("2" * 64, marks)
    sums.refuse("2" * 64, sums.marks([b"q" * 32], ["Bob"]))
    held = (tmp_path / GIVEN).read_text()
    assert "Ada" not in held
    assert (b"p" * 32).hex() not in held
    assert sums.marks([b"p" * 32], []) != GivenSums(tmp_path / "other", b"another").marks([b"p" * 32], [])


def test_what_a_run_was_given_once_stays_given_whatever_it_is_given_next(tmp_path: Path) -> None:
    a, b = b"a" * 16, b"b" * 16
    sums = GivenSums(tmp_path, b"secret")
    sums.give("1" * 64, [a, b])
    sums.give("1" * 64, [b])  # its data have changed since
    with pytest.raises(RepeatedSumError, match="1 of 1 training images and patients"):
        sums.give("2" * 64, [a])


def test_another_study_from_another_state_folder_gets_no_second_sum(
    study: Federation, images: Path, tmp_path: Path
) -> None:
    """Nor one that is named otherwise, has other members, another basis or another method of sums."""
    of_patients(study, "ash")
    finish(study)
    method = {**METHOD, "min_patients": 3}
    prepare(one_sum_template(name="another", seed=5, method=method), tmp_path / "other", images)
    other = Federation(tmp_path / "other")
    of_patients(other, "ash")
    path = other.folder / "sites" / "ash" / "site.toml"
    coordinator = other.begin(other.sites())
    file = read_toml(path, SiteFile, ValueError)  # type: ignore[type-var]
    shutil.copy(identity_of(study, "ash") / GIVEN, identity_of(other, "ash") / GIVEN)  # one identity for both studies
    assert file.state_folder.path != read_site_file(study.folder / "sites" / "ash" / "site.toml").state_folder.path
    with pytest.raises(RepeatedSumError, match=r"in any study, run or cohort.*give this site a budget"):
        exchange(coordinator, other.site("ash"))


# --- a round that is given up ---


@pytest.fixture(scope="module")
def four_made(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """Four training sites, of which a quorum is three."""
    template = one_sum_template(mode="plain", sites=[{"name": name} for name in FOUR], min_sites=3)
    return prepare_sites(template, tmp_path_factory.mktemp("one-sum-of-four"), images)


@pytest.fixture
def four(four_made: Path, tmp_path: Path) -> Federation:
    return copy_of(four_made, tmp_path)


FOUR = (*TRAINING, "dogwood")


def say(federation: Federation, name: str, *words: object) -> str:
    path = federation.folder / "sites" / name / "site.toml"
    return command("site", *words, "--site", path, "--by", "Dr. Ada")


def command(*arguments: object) -> str:
    return " ".join(CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False).output.split())


def given_up(federation: Federation, coordinator: Coordinator, round_number: int) -> list[Site]:
    """A round that three of four have revealed for, and whose fourth never comes back, given up by the three."""
    sites = [federation.site(name) for name in FOUR]
    send_envelopes(coordinator, sites)
    coordinator.advance()
    for site in sites[:3]:
        assert exchange(coordinator, site).code == ReplyCode.REVEALED
    told = [say(federation, name, "void", "--round", round_number) for name in TRAINING]
    what = ("no head, predicts as without any training", "the declared shrinkage, 0.01, holds")[round_number - 1]
    assert all(
        f"its statistics are abandoned: {'the study has ' if round_number == 1 else ''}{what}" in text for text in told
    )
    again = [federation.site(name) for name in TRAINING]
    for site in again:
        assert exchange(coordinator, site).code == ReplyCode.VOID
    entry = coordinator.advance()
    assert entry is not None
    assert entry.header.kind == "void"
    return again


def begun(federation: Federation) -> Coordinator:
    return Coordinator.begin(federation.agreed, federation.folder / "server", federation.signing, "0" * 64)


def test_statistics_that_somebody_may_have_opened_are_summed_anew_only_by_the_word_of_all_people(
    four: Federation,
) -> None:
    coordinator = begun(four)
    again = given_up(four, coordinator, 1)
    assert {site.adapter_digest for site in again} == {codec.adapter_digest(four.agreed.initial.adapter)}
    pass_step(coordinator, again)
    for site in again:
        with pytest.raises(ProtocolError, match=r"revealed to ash, birch, cedar, dogwood; .*secfacmic site release"):
            exchange(coordinator, site)
    for name in TRAINING:
        words = say(four, name, "release")
        assert "exact: this study's sums are statistics of patients without noise." in words
        assert "patients by class, their means and covariance" in words
    assert coordinator.fail([])  # each READY carries its people's word
    again = [four.site(name) for name in TRAINING]
    pass_step(coordinator, again)
    close_round(coordinator, again)
    run_round(coordinator, again)
    for site in again:
        exchange(coordinator, site)
    assert coordinator.finished
    exact = [at_site.sums(four.agreed, site.features()) for site in again]
    held = again[0].replica.state.tensors
    assert np.array_equal(held[f"{aggregation.MOMENT}patients"], sum(each.patients for each in exact))
    assert one_sum.Limits.of(again[0].parameters).patients == 3 * (15 + 6)
    assert len({site.adapter_digest for site in again}) == 1


def test_a_member_that_is_lost_is_removed_by_an_amendment_and_the_sum_begins_anew(
    four: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Removing it does not let the others reveal anew: their people's words do. Whoever removes it is warned."""
    coordinator = begun(four)
    again = given_up(four, coordinator, 1)
    chain = coordinator.journal.chain
    sealed = four.folder / "epoch-2.key"
    sealed.write_bytes(four.seal_key(2, chain.key, members=chain.members, removed=("dogwood",)))
    accepted = command("keys", "accept", sealed, "--site", four.folder / "sites/birch/site.toml")
    amended = command("study", "amend", four.folder / "study.toml", sealed, "--state", four.folder / "server")
    for text in (accepted, amended):
        assert "exact: this study's sums are statistics of patients without noise." in text
        assert "dogwood leaves: where one may have been opened before, the people of all sites must agree" in text
    for _ in range(2):  # the amendment, then its checkpoint
        for site in again:
            exchange(coordinator, site)
        coordinator.advance()
    told = [record.getMessage() for record in caplog.records if "exact: " in record.getMessage()]
    assert [text.partition(":")[0] for text in told] == list(TRAINING)
    assert set(coordinator.journal.chain.members) == set(TRAINING)
    pass_step(coordinator, again)
    with pytest.raises(ProtocolError, match="secfacmic site release"):
        exchange(coordinator, again[0])
    for name in TRAINING:
        assert "exact: " in say(four, name, "release")
    assert coordinator.fail([])  # each READY carries its people's word
    again = [four.site(name) for name in TRAINING]
    pass_step(coordinator, again)
    close_round(coordinator, again)
    run_round(coordinator, again)
    for site in again:
        exchange(coordinator, site)
    assert coordinator.finished
    assert one_sum.Limits.of(again[0].parameters).patients == 3 * (15 + 6)


@pytest.fixture(scope="module")
def sealed_four_made(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    template = one_sum_template(sites=[{"name": name} for name in FOUR], min_sites=3, collusion=0)
    return prepare_sites(template, tmp_path_factory.mktemp("sealed-one-sum-of-four"), images)


@pytest.mark.parametrize("given", [True, False])
def test_whom_another_runs_sum_holds_are_not_counted_in_a_later_round_either(
    given: bool, sealed_four_made: Path, tmp_path: Path
) -> None:
    four = copy_of(sealed_four_made, tmp_path)
    of_patients(four, "ash")
    coordinator = four.begin(sites := four.sites())
    for taking in (sites if given else sites[1:], sites):
        run_round(coordinator, taking)
    for site in sites:
        exchange(coordinator, site)
    assert (identity_of(four, "ash") / GIVEN).exists() == given  # to be counted alone is not to be in a sum
    coordinator = four.begin(again := four.sites())
    if not given:
        assert exchange(coordinator, again[0]).code == ReplyCode.READY
        return
    with pytest.raises(RepeatedSumError):
        exchange(coordinator, again[0])
    run_round(coordinator, again[1:])
    with pytest.raises(RepeatedSumError, match="15 of 15 training images and patients"):
        exchange(coordinator, again[0])
    assert again[0].round == 1


def test_without_its_second_round_a_study_ends_at_the_declared_shrinkage_and_claims_nothing(
    four: Federation, tmp_path: Path
) -> None:
    coordinator = begun(four)
    sites = [four.site(name) for name in FOUR]
    run_round(coordinator, sites)
    again = given_up(four, coordinator, 2)
    study = four.agreed.study
    held = {name.removeprefix(aggregation.MOMENT): value for name, value in again[0].replica.state.tensors.items()}
    head = one_sum.solve(one_sum.Sums.of(held), study.method.shrinkage, study.method.min_patients)
    assert head is not None
    assert np.array_equal(again[0].parameters["factor"], head.factor)
    export_site(four.folder / "sites" / "ash" / "site.toml", tmp_path / "export", onnx=False, own_results=False)
    exported = load_adapter(tmp_path / "export" / "adapter.safetensors")
    assert judge(exported.initial, exported.initial.adapter, again[0].features().test.x) is None


# --- sets and strangers ---


def test_predict_gives_a_set_and_a_flag_for_each_image_and_says_what_they_rest_on(
    secfacmic: Any, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    summary = simulate(one_sum_template(method={**METHOD, "coverage": 0.7}), out, images)
    figures = summary["one_sum"]
    assert figures["promised"] == 0.7
    assert figures["patients"] == dict.fromkeys(("dark", "light", "striped"), 15.0)
    assert figures["left_out"] == []
    assert figures["validation"]["patients"] == 63
    assert figures["shrinkage"] in one_sum.GRID
    assert set(figures["per_site"]) == set(TRAINING)
    for found in (*figures["per_site"].values(), figures["held_out"]):
        assert 1 <= found["set_size"] <= 3
        assert set(found["coverage_by_class"]) == {"dark", "light", "striped"}
    assert figures["held_out"]["images"] == 27
    assert list(figures["spectrum"].values()) == sorted(figures["spectrum"].values(), reverse=True)
    ran = secfacmic(
        *("predict", "--adapter", out / "adapter.safetensors", "--images", images / "dogwood", "--json"),
        *("--checkpoint", out / "backbone.safetensors"),
    )
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert document["coverage"] == {"promised": 0.7, "calibration_patients": 63}
    assert "the 63 calibration patients of the study" in " ".join(ran.stderr.split())
    for image in document["images"]:
        assert image["prediction"] in image["set"]
        assert image["stranger"] in (True, False)
    table = secfacmic(
        *("predict", "--adapter", out / "adapter.safetensors", "--images", images / "dogwood"),
        *("--checkpoint", out / "backbone.safetensors"),
    ).stdout
    assert table.splitlines()[0].endswith(",set,stranger")


def test_an_image_like_none_is_told(study: Federation) -> None:
    _, sites = finish(study)
    site = sites[0]
    limits = one_sum.Limits.of(site.parameters)
    known = judge(study.agreed.initial, site.parameters, site.features().train.x)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((50, 128)).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    odd = judge(study.agreed.initial, site.parameters, noise)
    assert known is not None
    assert odd is not None
    assert limits.patients == 63
    far = log_distances(study.agreed.initial, site.parameters, noise)
    near = log_distances(study.agreed.initial, site.parameters, site.features().train.x)
    assert np.median(far) > np.median(near) + 2
    assert odd.strangers.mean() > 0.9
    assert known.strangers.mean() < 0.1
    everything = site.parameters | {"limits": np.array([-one_sum.NO_LIMIT, one_sum.NO_LIMIT, 18.0])}
    whole = judge(study.agreed.initial, everything, noise)
    assert whole is not None
    assert whole.sets.all()
    assert whole.strangers is None
    assert whole.strange(0) is None
    assert judge(study.agreed.initial, site.parameters | {"limits": one_sum.NO_LIMITS.values()}, noise) is None


def test_distances_are_mahalanobis_distances_in_the_basis(study: Federation) -> None:
    _, sites = finish(study)
    parameters, basis = sites[0].parameters, study.agreed.initial.basis
    x = sites[0].features().test.x
    assert basis is not None
    inverse = np.linalg.inv(parameters["factor"] @ parameters["factor"].T)
    apart = basis.linear(x)[:, None, :] - parameters["means"][None]
    squared = np.einsum("nci,ij,ncj->nc", apart, inverse, apart).min(axis=1) / 16
    assert np.allclose(log_distances(study.agreed.initial, parameters, x), np.log2(squared))


def test_onnx_gives_the_same_logits(secfacmic: Any, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    simulate(one_sum_template(), out, images)
    ran = secfacmic("export", "--run", out, "--out", tmp_path / "export", "--onnx")
    assert ran.returncode == 0, ran.stderr
    session = ReferenceEvaluator(str(tmp_path / "export" / "adapter.onnx"))
    file = load_adapter(tmp_path / "export" / "adapter.safetensors")
    assert file.initial.basis is not None
    x = Federation(out).site("ash").features().test.x
    logits, probabilities = session.run(None, {"features": x})
    own = file.initial.adapter
    expected = file.initial.logit_scale * (x @ own["weight"].T + own["bias"])
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(probabilities - file.predict(x)).max() < 1e-5
    assert "one sum" in (tmp_path / "export" / "README.md").read_text(encoding="utf-8")


def test_the_report_tells_of_the_head_and_of_what_a_byte_buys(secfacmic: Any, images: Path, tmp_path: Path) -> None:
    simulate(one_sum_template(), tmp_path / "out", images)
    ran = secfacmic("report", tmp_path / "out", "--out", tmp_path / "report.md")
    assert ran.returncode == 0, ran.stderr
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for words in ("## One sum", "The pooled histograms chose a shrinkage", "least covered class", "What a byte buys"):
        assert words in text
    head = json.loads((tmp_path / "out" / "summary.json").read_text())["one_sum"]
    ranks = list(head["spectrum"])
    assert f"| setting | least that noise leaves | {' | '.join(ranks)} |" in text
    assert " | ".join(f"{head['spectrum'][rank]:.3g}" for rank in ranks) in text
    assert secfacmic("report", tmp_path / "out", "--out", tmp_path / "report.csv").returncode == 0
    whole, *_ = csv.DictReader((tmp_path / "report.csv").read_text().splitlines())
    assert [float(whole[f"one_sum.spectrum.{rank}"]) for rank in ranks] == list(head["spectrum"].values())
    assert float(whole["one_sum.shrinkage"]) == head["shrinkage"]
    assert float(whole["one_sum.held_out.coverage"]) == head["held_out"]["coverage"]
    # Without histograms: one round, or budgets at all sites.
    path = tmp_path / "out" / "summary.json"
    summary = json.loads(path.read_text())
    nothing = {"validation": None, "promised": None, "per_site": {}, "held_out": None, "shrinkage": 0.02}
    path.write_text(json.dumps(summary | {"one_sum": summary["one_sum"] | nothing}))
    assert secfacmic("report", tmp_path / "out", "--out", tmp_path / "report.md").returncode == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "The shrinkage, 0.02, is the one that the study declares: no histograms chose it." in text
    assert "nothing is claimed of single cases" in text
    assert "The promise holds" not in text


def test_attacks_read_sums_and_not_the_encrypted_ones(images: Path, tmp_path: Path) -> None:
    report = attack(one_sum_template(), tmp_path / "out", images, epsilons=(1.0,), shadows=8)
    views = {view["view"]: view for view in report["views"]}
    assert set(views) == {"plain_update", "server_he", "released", "released_dp"}
    encrypted = views["server_he"]["membership"]
    assert abs(encrypted["auc"] - 0.5) < 0.26  # four standard deviations of guessing with 81 shadow members
    # So few shadows find no member in the plain statistics either: only that they are read is tested.
    assert views["plain_update"]["inversion"]["n"] > 0


def test_a_study_whose_sites_have_other_processors_ends_at_the_same_head_everywhere(study: Federation) -> None:
    plain, baseline, middle = dispatches().values()
    environments = dict(zip((*TRAINING, "dogwood"), (plain, baseline, middle, baseline), strict=True))
    found = run_on_workers(study, environments)
    assert found.kinds["birch"] == "DEFAULT"  # the others as far as this CPU goes
    assert all(len(set(digests.values())) == 1 for digests in found.digests)
    heads = [digests["ash"] for digests in found.digests]
    assert len(set(heads)) == 3  # zero-shot, the sum's, and that of the shrinkage and limits that the histograms chose


def test_what_a_class_of_one_site_discloses_is_shown_before_anybody_accepts(study: Federation) -> None:
    site = study.site("ash")
    shown = terms(read_site_file(study.folder / "sites" / "ash" / "site.toml"), study.agreed)
    assert site.name == "ash"
    assert any("one site alone" in line for line in shown["leaves"]["statistics"])
    assert shown["leaves"]["update_bytes"] == study.agreed.lanes.payload_bytes
