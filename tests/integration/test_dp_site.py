"""Private rounds between real sites: plans, refusals, crashes at every step, restarts, copies and restores."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy
from typer.testing import CliRunner

from secure_fed.cli import app
from secure_fed.clients import private_round
from secure_fed.clients.budget import ledger_folder
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import SiteFile, SitePrivacy, read_site_file, with_budget
from secure_fed.core.errors import (
    BackboneError,
    BudgetError,
    EnvelopeError,
    GuardError,
    LedgerError,
    LedgerRollbackError,
    PrivateMethodError,
    RecordError,
    SiteFileError,
    StorageError,
)
from secure_fed.core.tomlfile import read_toml, write_toml
from secure_fed.lab.simulation import Budget, accept_another_run, prepare, simulate
from secure_fed.model.backbone import load_backbone
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.privacy import class_means
from secure_fed.privacy.accounting import Mechanism, epsilon_of, mu_squared_of, uniforms
from secure_fed.privacy.dp_training import Descent
from secure_fed.privacy.guard import check_training
from secure_fed.privacy.ledger import Ledger, opened, restore
from secure_fed.protocol import codec
from secure_fed.protocol.envelope import EnvelopeHeader
from secure_fed.protocol.ledger_heads import LedgerHead
from secure_fed.protocol.records import Chain, RecordHeader
from secure_fed.protocol.rounds import ReplyCode, RoundReply, RoundRequest
from secure_fed.protocol.signing import parse_header, split_frame
from secure_fed.server.coordinator import Coordinator, Step
from tests.conftest import (
    TRAINING,
    Federation,
    close_round,
    copy_of,
    exchange,
    make_template,
    pass_step,
    run_round,
    send_envelopes,
)
from tests.forked import CONTEXT
from tests.integration.test_simulation import Heard
from tests.private_worker import serve

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")

METHOD = {"adapter": "text_head"}


def make_private(folder: Path, images: Path, **changes: Any) -> Federation:
    """A small study in plain mode, in which ash alone has a budget."""
    settings = {"mode": "plain", "rounds": 2, "method": METHOD, "privacy": {"steps": 2}} | changes
    prepare(make_template(**settings), folder, images)
    set_budget(folder, "ash", 8.0)
    return Federation(folder)


def set_budget(folder: Path, site: str, epsilon: float | None, n_ref: int = 20, runs: int = 0, **changes: Any) -> None:
    """A budget, all of which each run may cost unless ``runs`` share it."""
    path = folder / "sites" / site / "site.toml"
    privacy = None
    if epsilon is not None:
        given = {"runs": runs} if runs else {"run_epsilon": epsilon}
        privacy = SitePrivacy(epsilon=epsilon, delta=1e-5, n_ref=n_ref, **given)
    file = read_toml(path, SiteFile, ValueError)  # type: ignore[type-var]
    write_toml(path, file.model_copy(update={"privacy": privacy, **changes}))


@pytest.fixture(scope="module")
def prepared_private(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("private") / "out"
    federation = make_private(folder, images)
    set_budget(folder, "ash", None)
    for name in TRAINING:
        federation.site(name).features()
    set_budget(folder, "ash", 8.0)
    return folder


@pytest.fixture
def private(prepared_private: Path, tmp_path: Path) -> Federation:
    return copy_of(prepared_private, tmp_path)


def begin(federation: Federation) -> Coordinator:
    return federation.open_run()


def ledger_of(federation: Federation, site: str = "ash") -> Ledger:
    return Ledger(ledger_folder(read_site_file(federation.folder / "sites" / site / "site.toml")))


def play(federation: Federation, sites: list[Site], coordinator: Coordinator | None = None) -> Coordinator:
    """All rounds to the end."""
    coordinator = coordinator or begin(federation)
    while not coordinator.finished:
        run_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    return coordinator


def trained_sites(federation: Federation) -> list[Site]:
    return [federation.site(name) for name in TRAINING]


# --- plans and rounds ---


def test_a_private_study_runs_and_its_ledger_tells_what_was_done(
    private: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="secure_fed.clients.private_round")
    sites = trained_sites(private)
    coordinator = play(private, sites)
    assert len({site.adapter_digest for site in sites}) == 1
    facts = ledger_of(private).summary()
    assert [event["state"] for event in facts["events"]] == ["sent", "sent"]
    assert facts["epsilon_spent"] == epsilon_of(sum(event["mu_squared"] for event in facts["events"]), 1e-5)
    # Planned for three rounds of two steps: two, and one in case of a crash.
    assert facts["events"][0]["noise_std"] == pytest.approx(4 * np.sqrt(6 / 2.7757), rel=1e-4)
    assert "noise multiplier 1.47, clipping norm 4; LMMD off" in caplog.text
    assert f"epsilon spent {facts['epsilon_spent']:.4f} of 8, left {8 - facts['epsilon_spent']:.4f}" in caplog.text
    # What travelled is the head that the ledger had when the integers were committed, and it grew.
    heads = []
    for entry in coordinator.rounds:
        record = next(private.folder.glob(f"server/runs/*/journal/{entry.header.seq:08d}.record")).read_bytes()
        header = parse_header(split_frame(b"SFR2", record, 10**6, RecordError).header, RecordHeader, RecordError)
        heads += [parse_header(one.signed[0], EnvelopeHeader, EnvelopeError) for one in header.contributors]
    study = private.agreed.study.id
    assert all(ledger_of(private).holds(study, head.ledger_seq, head.ledger_head) for head in heads[::3])
    assert (heads[0].ledger_seq, heads[3].ledger_seq) == (1, 2)  # updates sent, and nothing of the entries
    assert {head.ledger_seq for head in heads if head.site != "ash"} == {0}


def test_under_a_budget_no_count_leaves_and_no_two_runs_are_alike(private: Federation) -> None:
    seen = []
    for _ in range(2):
        site = private.site("ash")
        coordinator = begin(private)
        reply = site.respond(coordinator.request(site.name, site.run, site.position))
        assert reply.code == ReplyCode.READY
        integers = safetensors.numpy.load(
            next(private.folder.glob(f"sites/ash/state/runs/{coordinator.run}/outbox/*.noised")).read_bytes()
        )["integers"]
        assert not private.agreed.layout(1).decode(integers, [1.0])[codec.COUNTS].any()
        seen.append(integers)
    assert np.mean(seen[0] != seen[1]) > 0.5


# --- validation that is paid for ---


def sent_counts(federation: Federation, coordinator: Coordinator) -> tuple[int, int]:
    """The validation counts among the integers that ash has stored."""
    kept = federation.folder.glob(f"sites/ash/state/runs/{coordinator.run}/outbox/*.noised")
    path = max(kept, key=lambda one: one.stat().st_mtime_ns)
    integers = safetensors.numpy.load(path.read_bytes())["integers"]
    images, correct = federation.agreed.layout(1).decode(integers, [1.0])[codec.COUNTS]
    return int(images), int(correct)


def test_validation_counts_are_paid_for_by_their_own_patients(
    tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="secure_fed.clients.private_round")
    federation = make_private(tmp_path / "out", images, privacy={"steps": 2, "validation_rounds": 1})
    sites = trained_sites(federation)
    for site in sites:
        site.features()
    coordinator = begin(federation)
    assert sites[0]._private is not None
    noise = mock.Mock(side_effect=lambda size, std: np.zeros(size))
    trusted = mock.patch("secure_fed.clients.private_round.check_training")
    with trusted, mock.patch.object(sites[0]._private, "_noise", noise):
        exchange(coordinator, sites[0])
        assert sent_counts(federation, coordinator) == (0, 0)  # round 1 is not paid for
        assert 2 not in [call.args[0] for call in noise.call_args_list]
        for site in sites[1:]:
            exchange(coordinator, site)
        close_round(coordinator, sites)
        exchange(coordinator, sites[0])
        counts = sent_counts(federation, coordinator)
        assert noise.call_args.args == (2, ledger_of(federation).events[-1].mechanism.noise_std)
    before = sites[0].features()
    assert len(set(before.patients["val"])) == len(before.val.y)
    right = sites[0]._predict(before.val.x, sites[0].parameters, federation.agreed).argmax(axis=1) == before.val.y
    assert counts == (len(before.val.y), round(float(np.mean(right)) * len(before.val.y)))
    for site in sites[1:]:
        exchange(coordinator, site)
    close_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    summed = sites[1].replica.state.validation
    assert summed is not None
    assert summed.images >= counts[0]  # the aggregate's share is shown, ash's counts among it
    training, _, validated = ledger_of(federation).events
    facts = ledger_of(federation).summary()
    assert [event["steps"] for event in facts["releases"]] == [2, 2, 1]
    assert validated.purpose.startswith("validation counts of round 2 of run")
    assert validated.mechanism.sensitivity == pytest.approx(np.sqrt(2))
    # One release and one more in case of a crash would use up the validation patients' budget.
    (block,) = validated.blocks
    assert ledger_of(federation).spent(block) == pytest.approx(epsilon_of(2.7757 / 2, 1e-5), rel=1e-3)
    assert not set(training.blocks) & set(validated.blocks)
    assert {event["state"] for event in facts["events"]} == {"sent"}
    assert "validation counts on: after rounds 2 at noise multiplier 0.849, from the" in caplog.text.replace(
        "0.85", "0.849"
    )


def test_validation_noise_comes_also_without_any_validation_patient(tmp_path: Path, images: Path) -> None:
    """Zeros would say that there is none."""
    federation = make_private(tmp_path / "out", images, rounds=1, privacy={"steps": 2, "validation_rounds": 1})
    site = federation.site("ash")
    found = site.features()
    assert site._private is not None
    nobody = found.val._replace(x=found.val.x[:0], y=found.val.y[:0])
    site._features = dataclasses.replace(found, val=nobody, patients={**found.patients, "val": ()})
    coordinator = begin(federation)
    site._private._noise = lambda size, std: np.full(size, 41.0 if size == 2 else 0.0)
    with mock.patch("secure_fed.clients.private_round.check_training"):
        exchange(coordinator, site)
    assert sent_counts(federation, coordinator) == (41, 41)
    assert [event.purpose.split(" ")[0] for event in ledger_of(federation).events] == ["round", "validation"]
    assert ledger_of(federation).events[-1].blocks == ()


def test_rounding_under_a_budget_uses_the_operating_system(private: Federation) -> None:
    site = private.site("ash")
    with (
        mock.patch("secure_fed.clients.learner.rehearse"),
        mock.patch("secure_fed.protocol.codec.rounding_draws", side_effect=AssertionError("seeded")),
        mock.patch("secure_fed.clients.private_round.uniforms", side_effect=uniforms) as draws,
        mock.patch.object(codec, "quantise", side_effect=codec.quantise) as quantise,
    ):
        coordinator = begin(private)
        assert site.respond(coordinator.request(site.name, site.run, site.position)).code == ReplyCode.READY
    update = quantise.call_args_list[0].args[0]
    draws.assert_called_once_with(update.size)


def test_a_site_whose_declared_runs_are_over_observes(private: Federation) -> None:
    """A fact of the plan, whoever its patients are; new ones train when another run is declared."""
    set_budget(private.folder, "ash", 8.0, runs=1)
    sites = trained_sites(private)
    play(private, sites)
    spent = ledger_of(private).epsilon_spent
    coordinator = begin(private)
    reply = exchange(coordinator, private.site("ash"))
    assert reply.code == ReplyCode.RETIRED
    for name in TRAINING[1:]:
        exchange(coordinator, private.site(name))
    entry = coordinator.advance()
    assert entry is not None
    assert entry.header.kind == "retired"
    assert coordinator.journal.chain.members["ash"].role == "observer", "by its own word; nobody waits for it"
    assert ledger_of(private).epsilon_spent == spent


def test_ten_voids_cost_nothing(private: Federation) -> None:
    sites = trained_sites(private)
    coordinator = begin(private)
    sent = set()
    for _ in range(10):
        send_envelopes(coordinator, sites)
        sent.add(next(private.folder.glob("sites/ash/state/runs/*/outbox/*.noised")).read_bytes())
        for site in sites:
            site.void(1)
            exchange(coordinator, site)
        assert coordinator.advance().header.kind == "void"  # type: ignore[union-attr]
        (event,) = ledger_of(private).events
    assert ledger_of(private).epsilon_spent == epsilon_of(event.mechanism.mu_squared, 1e-5)
    assert len(sent) == 1
    play(private, sites, coordinator)
    assert len(ledger_of(private).events) == 2


def test_a_record_that_is_taken_back_costs_nothing(private: Federation) -> None:
    """A void may win against a sum upon which a site has drawn its next update: both are kept, and sent again."""
    sites = trained_sites(private)
    coordinator = begin(private)
    send_envelopes(coordinator, sites)
    start, noised = sites[0].adapter_digest, sites[0].replica.files.folder.outbox.glob
    (first,) = noised("*.noised")
    sent = first.read_bytes()
    close_round(coordinator, sites)
    assert exchange(coordinator, sites[0]).code == ReplyCode.READY
    second = set(noised("*.noised")) - {first}
    assert len(second) == 1
    spent = ledger_of(private).epsilon_spent
    for site in sites:
        site.void(1)
        assert exchange(coordinator, site).code == ReplyCode.VOID
    assert sites[0].adapter_digest == start
    assert coordinator.advance().header.kind == "void"  # type: ignore[union-attr]
    pass_step(coordinator, sites)
    close_round(coordinator, sites)
    assert first.read_bytes() == sent
    for site in sites:
        exchange(coordinator, site)
    assert len({site.adapter_digest for site in sites}) == 1
    assert (len(ledger_of(private).events), ledger_of(private).epsilon_spent) == (2, spent)
    play(private, sites, coordinator)
    assert len(ledger_of(private).events) == 2


def test_a_site_that_retires_has_spent_what_it_sent_and_no_more(private: Federation) -> None:
    sites = trained_sites(private)
    coordinator = begin(private)
    run_round(coordinator, sites)
    sites[0].retire()
    assert exchange(coordinator, sites[0]).code == ReplyCode.RETIRED
    again = private.site("ash")
    assert exchange(coordinator, again).code == ReplyCode.RETIRED
    (event,) = ledger_of(private).events
    assert ledger_of(private).epsilon_spent == epsilon_of(event.mechanism.mu_squared, 1e-5)


def test_ten_voids_by_command_cost_nothing(private: Federation) -> None:
    """As people give a round up: their words by ``site void``, the clients started again after each."""
    sites = trained_sites(private)
    coordinator = begin(private)
    sent, spent = set(), set()
    for _ in range(10):
        send_envelopes(coordinator, sites)
        sent.add(next(private.folder.glob("sites/ash/state/runs/*/outbox/*.noised")).read_bytes())
        for name in TRAINING:
            path = private.folder / "sites" / name / "site.toml"
            command = ["site", "void", "--round", "1", "--site", str(path), "--by", "Dr. Ada"]
            said = CliRunner().invoke(app, command, catch_exceptions=False)
            assert "given up by Dr. Ada" in said.output
        sites = [private.site(name) for name in TRAINING]
        for site in sites:
            exchange(coordinator, site)
        assert coordinator.advance().header.kind == "void"  # type: ignore[union-attr]
        spent.add((ledger_of(private).epsilon_spent, len(ledger_of(private).events)))
    assert len(sent) == 1
    ((epsilon, events),) = spent
    assert events == 1
    assert 0 < epsilon < 8.0
    play(private, sites, coordinator)
    assert len(ledger_of(private).events) == 2


def test_what_happens_to_the_data_during_a_run_shows_in_nothing(
    private: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    sites = trained_sites(private)
    coordinator = begin(private)
    run_round(coordinator, sites)
    set_data_folder(private, "ash", "/nowhere")
    sites[0] = private.site("ash")
    assert exchange(coordinator, sites[0]).code == ReplyCode.READY
    sites[0].tell_changes()
    assert "the data are not what they were when run" in caplog.text


def set_data_folder(federation: Federation, site: str, folder: str) -> None:
    path = federation.folder / "sites" / site / "site.toml"
    file = read_toml(path, SiteFile, ValueError)  # type: ignore[type-var]
    write_toml(path, file.model_copy(update={"data": file.data.model_copy(update={"folder": folder})}))


def test_a_site_whose_budget_is_lowered_in_mid_study_goes_on_with_noise(private: Federation) -> None:
    sites = trained_sites(private)
    coordinator = begin(private)
    run_round(coordinator, sites)
    set_budget(private.folder, "ash", ledger_of(private).epsilon_spent + 0.01)  # lowered between two rounds
    sites[0] = private.site("ash")
    reply = exchange(coordinator, sites[0])
    # Nobody can pay any more: over nobody noise is sent, as planned.
    assert reply.code == ReplyCode.READY
    assert ledger_of(private).events[-1].blocks == ()
    assert sites[0].round == 1


def test_a_new_run_and_a_new_export_spend_the_same_budget(private: Federation, tmp_path: Path) -> None:
    play(private, trained_sites(private))
    first = ledger_of(private).epsilon_spent
    ledger = ledger_of(private)
    # The same images under other names and in another place: no new block, no new budget.
    folder = Path(read_site_file(private.folder / "sites/ash/site.toml").data.folder)
    for path in sorted(folder.rglob("*.png")):
        target = tmp_path / "export" / path.parent.name / f"renamed-{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    set_data_folder(private, "ash", str(tmp_path / "export"))
    site = private.site("ash")
    site.features()
    # An image that counts as a patient is known by its picture: nobody is new.
    assert ledger_of(private).summary()["members"] == ledger.summary()["members"]
    coordinator = begin(private)
    exchange(coordinator, site)
    again = ledger_of(private)
    assert first <= again.epsilon_spent <= 8.0


def test_another_state_folder_of_an_identity_spends_from_the_same_ledger(private: Federation, tmp_path: Path) -> None:
    play(private, trained_sites(private))
    before = ledger_of(private)
    assert before.epsilon_spent > 0
    path = private.folder / "sites/ash/site.toml"
    file = read_toml(path, SiteFile, ValueError)  # type: ignore[type-var]
    # Whatever of a ledger lay in the old state folder is not in the new one.
    skipped = shutil.ignore_patterns("runs", "ledger")
    shutil.copytree(private.folder / "sites/ash/state", tmp_path / "state", ignore=skipped)
    write_toml(path, file.model_copy(update={"state": str(tmp_path / "state")}))
    private.site("ash").features()
    after = ledger_of(private)
    assert (after.epsilon_spent, after.summary()["members"]) == (before.epsilon_spent, before.summary()["members"])


def test_new_patients_train_on_a_budget_of_their_own(private: Federation) -> None:
    play(private, trained_sites(private))
    folder = Path(read_site_file(private.folder / "sites/ash/site.toml").data.folder)
    copy = private.folder / "grown"
    shutil.copytree(folder, copy)
    rng = np.random.default_rng(5)
    from PIL import Image

    for name in ("dark", "light", "striped"):
        for number in range(20):
            Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(copy / name / f"new{number}.png")
    set_data_folder(private, "ash", str(copy))
    old = ledger_of(private)
    site = private.site("ash")
    coordinator = begin(private)
    assert exchange(coordinator, site).code == ReplyCode.READY
    last = ledger_of(private).events[-1]
    # Those who have trained before can pay for one round more, that of the crash which did not happen.
    sites = [site, *map(private.site, TRAINING[1:])]
    pass_step(coordinator, sites[1:])
    close_round(coordinator, sites)
    exchange(coordinator, site)
    (new,) = ledger_of(private).events[-1].blocks
    assert new in last.blocks
    assert new not in old.blocks


# --- refusals before anything is spent ---


def test_the_papers_losses_are_refused_at_once(tmp_path: Path, images: Path) -> None:
    for method, reason in (({"loss": "contrastive"}, "18 times"), ({"norm": "batch"}, "4.4 times")):
        folder = tmp_path / next(iter(method))
        with pytest.raises(PrivateMethodError, match=reason):
            make_private(folder, images, method=method).site("ash")
        assert not (folder / "sites/ash/identity/ledger").exists()


def test_a_failing_guard_spends_nothing(private: Federation) -> None:
    site = private.site("ash")
    coordinator = begin(private)
    with (
        mock.patch("secure_fed.clients.private_round.check_training", side_effect=GuardError("a seeded bug")),
        pytest.raises(GuardError),
    ):
        site.respond(coordinator.request(site.name, site.run, site.position))
    assert ledger_of(private).events == []


@pytest.mark.parametrize("place", ["weights", "one image", "cache"])
def test_a_backbone_with_one_nan_spends_nothing(place: str, private: Federation) -> None:
    (cache,) = (private.folder / "sites/ash").rglob("features.sqlite")
    if place == "weights":
        path = private.folder / "backbone.safetensors"
        tensors = {name: value.copy() for name, value in safetensors.numpy.load_file(path).items()}
        tensors["visual.proj"][3, 4] = np.nan
        safetensors.numpy.save_file(tensors, path)
        cache.unlink()
    elif place == "cache":
        with sqlite3.connect(cache) as database:
            broken = np.full(128, np.nan, dtype="<f4").tobytes()
            changed = database.execute(
                "UPDATE features SET feature = ? WHERE image = (SELECT min(image) FROM features)", (broken,)
            )
            assert changed.rowcount == 1
    else:
        cache.unlink()
    site = private.site("ash")
    coordinator = begin(private)
    whole, calls = LoadedBackbone._unit, []

    def overflowing(self: LoadedBackbone, features: Any, what: str) -> Any:
        calls.append(what)
        return whole(self, features * np.nan if place == "one image" and len(calls) > 2 else features, what)

    with (
        mock.patch("secure_fed.clients.features.load_backbone", load_backbone),  # which tries it, in two calls
        mock.patch.object(LoadedBackbone, "_unit", overflowing),
        pytest.raises(BackboneError, match="not finite"),
    ):
        site.respond(coordinator.request(site.name, site.run, site.position))
    assert ledger_of(private).events == []
    assert ledger_of(private).epsilon_spent == 0


def test_a_budget_cannot_be_raised_forgotten_or_changed(private: Federation) -> None:
    private.site("ash")
    set_budget(private.folder, "ash", 9.0)
    with pytest.raises(BudgetError, match="can only be lowered"):
        private.site("ash")
    set_budget(private.folder, "ash", None)  # the ledger remembers
    site = private.site("ash")
    coordinator = begin(private)
    exchange(coordinator, site)
    assert ledger_of(private).epsilon_spent > 0
    set_budget(private.folder, "ash", 2.0)
    private.site("ash")
    set_budget(private.folder, "ash", 8.0)
    with pytest.raises(BudgetError, match="this site's budget is 2"):
        private.site("ash")


def test_a_lost_ledger_is_missed(private: Federation) -> None:
    sites = trained_sites(private)
    play(private, sites)
    shutil.rmtree(private.folder / "sites/ash/identity/ledger")
    with pytest.raises(LedgerRollbackError, match="no ledger, but the other sites hold"):
        private.site("ash")


def test_data_without_patients_need_unit_image(private: Federation) -> None:
    file = read_site_file(private.folder / "sites/ash/site.toml")
    set_budget(private.folder, "ash", 8.0, data=file.data.model_copy(update={"unit": "patient"}))
    site = private.site("ash")
    with pytest.raises(Exception, match='unit = "image"'):
        site.features()
    assert ledger_of(private).events == []


def test_the_command_line_gives_a_budget(private: Federation) -> None:
    file = read_site_file(private.folder / "sites/birch/site.toml")
    assert with_budget(file, None, None).privacy is None
    given = with_budget(file, 3.0, None).privacy
    assert given is not None
    assert (given.epsilon, given.delta, given.n_ref) == (3.0, 1e-5, None)
    file = read_site_file(private.folder / "sites/ash/site.toml")
    assert with_budget(file, 1.0, 1e-6).privacy == SitePrivacy(epsilon=1.0, delta=1e-6, n_ref=20, run_epsilon=8.0)
    for wrong in ((-1.0, None), (3.0, 0.5)):
        with pytest.raises(SiteFileError, match="the budget of --epsilon and --delta"):
            with_budget(file, *wrong)


# --- older ledgers ---


def envelope_of(coordinator: Coordinator, site: Site, others: list[Site]) -> RoundReply:
    """A site's envelope, once all are ready, from a site that does not look at its own past."""
    with mock.patch.object(type(site._private), "_confirm"), mock.patch.object(Site, "_notice_past"):
        pass_step(coordinator, [site, *others])
        reply: RoundReply = site.respond(coordinator.request(site.name, site.run, site.position))
    return reply


def refused_by_the_other_sites(coordinator: Coordinator, reply: RoundReply, sites: list[Site], site: Site) -> None:
    """They see the old head in the record of a server that does not look."""
    with mock.patch.object(type(coordinator._heads), "check"), mock.patch.object(Chain, "check_ledger"):
        coordinator.receive(reply)
        for one in sites[1:]:
            exchange(coordinator, one)
        close_round(coordinator, [site, *sites[1:]])
    with pytest.raises(LedgerRollbackError, match="ash: privacy ledger at entry"):
        sites[1].respond(coordinator.request(sites[1].name, sites[1].run, sites[1].position))


def test_the_server_takes_no_ledger_head_that_the_sites_would_refuse(private: Federation) -> None:
    """One attempt's head is seen by the server alone: a next one that names only it would end every site's journal."""
    sites = trained_sites(private)
    coordinator = begin(private)
    run_round(coordinator, sites)
    ash = sites[0]
    number, head = coordinator.journal.chain.ledgers["ash"]
    true = ash._integers

    def at(head: LedgerHead) -> Callable[[], Any]:
        return lambda: (true()[0], head)

    heads = [LedgerHead(900, "a" * 64, ((number, head[:16]),)), LedgerHead(901, "b" * 64, ((900, "a" * 16),))]
    pass_step(coordinator, sites)
    with mock.patch.object(ash, "_integers", at(heads[0])):
        exchange(coordinator, ash)
    assert coordinator.fail([])
    pass_step(coordinator, sites)
    with (
        mock.patch.object(ash, "_integers", at(heads[1])),
        pytest.raises(EnvelopeError, match="does not name its entry"),
    ):
        exchange(coordinator, ash)
    assert "ash" in coordinator.asked


def test_an_older_copy_of_the_ledger_is_refused_by_everybody(private: Federation) -> None:
    sites = trained_sites(private)
    folder = private.folder / "sites/ash/identity/ledger"
    old = private.folder / "old"
    shutil.copytree(folder, old)
    play(private, sites)
    shutil.rmtree(folder)
    shutil.copytree(old, folder)
    site = private.site("ash")
    second = begin(private)
    with pytest.raises(LedgerRollbackError, match="an older copy was put back"):
        site.respond(second.request(site.name, site.run, site.position))
    # A site that does not look is refused by the server,
    reply = envelope_of(second, site, sites[1:])
    with pytest.raises(EnvelopeError, match="an older copy"):
        second.receive(reply)
    # and, if the server lets it pass, by the other sites.
    refused_by_the_other_sites(second, reply, sites, site)


def test_a_rolled_back_machine_learns_from_the_journal_that_it_was(private: Federation) -> None:
    """All goes back, as with a machine's snapshot: state, identity and ledger, the site's own heads with it."""
    sites = trained_sites(private)
    coordinator = begin(private)
    run_round(coordinator, sites)
    state = private.folder / "sites/ash"
    shutil.copytree(state, private.folder / "snapshot")
    play(private, sites, coordinator)
    shutil.rmtree(state)
    shutil.copytree(private.folder / "snapshot", state)
    site = private.site("ash")
    exchange(coordinator, site)
    second = begin(private)
    with pytest.raises(LedgerRollbackError, match="an older copy was put back"):
        site.respond(second.request(site.name, site.run, site.position))


def test_a_copied_folder_cannot_run_twice(private: Federation) -> None:
    private.site("ash")
    copy = private.folder.parent / "copy"
    shutil.copytree(private.folder, copy, symlinks=True)
    coordinator = begin(private)
    others = [private.site(name) for name in TRAINING[1:]]
    coordinator.receive(envelope_of(coordinator, private.site("ash"), others))
    assert coordinator.fail([])
    twin = Federation(copy).site("ash")
    reply = envelope_of(coordinator, twin, others)
    with pytest.raises(EnvelopeError, match=r"runs twice|older copy"):
        coordinator.receive(reply)


@pytest.mark.parametrize("longer", ["copy", "true one"])
def test_a_copied_folder_that_has_grown_elsewhere_is_noticed_by_server_and_sites(
    private: Federation, longer: str
) -> None:
    """Both copies have spent past the last head that travelled, and neither checks itself; the other's rounds are
    taken by another server, so that its own journal shows it nothing."""
    sites = trained_sites(private)
    coordinator = begin(private)
    run_round(coordinator, sites)
    copy = private.folder.parent / "copy"
    shutil.copytree(private.folder, copy, symlinks=True)
    run_round(coordinator, sites)  # the true one travels on, and all see it
    for site in sites:
        exchange(coordinator, site)
    twin = Federation(copy).site("ash")
    with opened(copy / "sites/ash/identity/ledger") as ledger:
        release, study = Mechanism(1.0, 1000.0, 1), private.agreed.study.id
        for number in range(12 if longer == "copy" else 1):
            event = ledger.reserve(release, f"elsewhere {number}", "7" * 64, ())
            ledger.commit([event.seq], b"%d" % number, study, "7" * 64)
        grown = ledger.sent(study)
    assert (grown > ledger_of(private).sent(study)) == (longer == "copy")
    second = begin(private)
    accept_another_run(private.agreed, copy)
    reply = envelope_of(second, twin, sites[1:])
    assert reply.code == ReplyCode.UPDATE
    with pytest.raises(EnvelopeError, match=r"older copy of the ledger was put back"):
        second.receive(reply)
    # A server that lets it pass does not get it past the other sites.
    refused_by_the_other_sites(second, reply, sites, twin)


def test_the_true_site_goes_on_after_lost_updates_and_new_runs(private: Federation) -> None:
    """An update that no record holds, an abandoned run, a budget lowered: nobody takes the site for a copy."""
    sites = trained_sites(private)
    first = begin(private)
    exchange(first, sites[0])  # the server keeps this head; the run ends without a record
    second = begin(private)
    run_round(second, sites)
    set_budget(private.folder, "ash", 7.9)
    sites[0] = private.site("ash")
    assert exchange(second, sites[0]).code == ReplyCode.READY


def test_a_clock_set_back_changes_nothing(private: Federation) -> None:
    sites = trained_sites(private)
    coordinator = begin(private)
    run_round(coordinator, sites)
    with mock.patch("time.time", return_value=0.0), mock.patch("time.time_ns", return_value=0):
        run_round(coordinator, sites)
    assert [event.state for event in ledger_of(private).events] == ["sent", "committed"]


def test_a_ledger_in_use_is_refused(private: Federation) -> None:
    folder = ledger_folder(read_site_file(private.folder / "sites/ash/site.toml"))
    site = private.site("ash")
    coordinator = begin(private)
    with opened(folder), pytest.raises(StorageError, match="another process"):
        site.respond(coordinator.request(site.name, site.run, site.position))
    assert site.respond(coordinator.request(site.name, site.run, site.position)).code == ReplyCode.READY


def give_round_up(coordinator: Coordinator, sites: list[Site]) -> None:
    """The first site has lost its state: it sits the open round out, without which no quorum is left."""
    assert exchange(coordinator, sites[0]).code == ReplyCode.SITS_OUT
    for site in sites:
        exchange(coordinator, site)
        site.void(coordinator.round)
        assert exchange(coordinator, site).code == ReplyCode.VOID
    assert coordinator.advance() is not None


def test_a_restored_ledger_opens_when_the_journal_confirms_its_head(private: Federation) -> None:
    sites = trained_sites(private)
    coordinator = begin(private)
    run_round(coordinator, sites)
    folder = private.folder / "sites/ash/identity/ledger"
    export, identity = ledger_of(private).export(), ledger_of(private).account.identity
    # The ledger and the whole state are lost, and the export is put into its place.
    shutil.rmtree(folder)
    shutil.rmtree(private.folder / "sites/ash/state")
    restore(folder, export, identity)
    site = private.site("ash")
    before = ledger_of(private).epsilon_spent
    give_round_up(coordinator, [site, *sites[1:]])  # brings the journal, and with it the head
    reply = site.respond(coordinator.request(site.name, site.run, site.position))
    assert reply.code == ReplyCode.READY
    coordinator.receive(reply)
    assert ledger_of(private).epsilon_spent > before
    assert not (folder / "closed").exists()


def test_a_restored_ledger_stays_closed_without_a_head_to_compare_or_with_a_newer_one(private: Federation) -> None:
    private.site("ash")
    early, identity = ledger_of(private).export(), ledger_of(private).account.identity
    folder = private.folder / "sites/ash/identity/ledger"
    shutil.rmtree(folder)
    restore(folder, early, identity)
    site = private.site("ash")
    coordinator = begin(private)
    assert site.respond(coordinator.request(site.name, site.run, site.position)).code == ReplyCode.APPLIED
    assert ledger_of(private).events == []
    (folder / "closed").unlink()
    sites = trained_sites(private)
    run_round(coordinator, sites)
    shutil.rmtree(folder)
    shutil.rmtree(private.folder / "sites/ash/state")
    restore(folder, early, identity)
    site = private.site("ash")
    give_round_up(coordinator, [site, *sites[1:]])
    with pytest.raises(LedgerRollbackError, match="older copy"):
        site.respond(coordinator.request(site.name, site.run, site.position))
    assert (folder / "closed").exists()


# --- crashes, in real processes ---


class Worker:
    """The site ash in a process of its own."""

    name = "ash"

    def __init__(self, federation: Federation, **fault: Any) -> None:
        self._pipe, other = CONTEXT.Pipe()
        path = federation.folder / "sites" / "ash" / "site.toml"
        self.process = CONTEXT.Process(target=serve, args=(other, str(path), fault))
        self.process.start()
        other.close()
        self.run, self.position = self._receive()

    def respond(self, request: RoundRequest) -> Any:
        """The reply; None if the process died."""
        self._pipe.send(request)
        try:
            reply, self.adapter_digest = self._receive()
        except EOFError:
            return None
        self.run, self.position = reply.run, reply.position
        return reply

    def _receive(self) -> Any:
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def died(self) -> bool:
        self.process.join(30)
        return self.process.exitcode == -signal.SIGKILL

    def close(self) -> None:
        self._pipe.close()
        self.process.join(30)


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    started: list[Worker] = []
    yield started
    for worker in started:
        worker.close()


WRITES = {
    "blocks": r"/identity/ledger/blocks\.jsonl \w+$",
    "snapshot": r"/snapshot\.safetensors$",
    "plan": r"/identity/ledger/ledger\.jsonl plan$",
    "reserve": r"/identity/ledger/ledger\.jsonl reserve$",
    "integers": r"/outbox/\w+\.noised$",
    "commit": r"/identity/ledger/ledger\.jsonl commit$",
    "envelope": r"/outbox/\d+\.envelope$",
    "sent": r"/identity/ledger/ledger\.jsonl sent$",
}
"""The durable writes of a private round, in order; a test below finds any that is not here."""


def at_write(name: str, phase: str, number: int = 1) -> dict[str, Any]:
    return {"write": WRITES[name], "phase": phase, "number": number}


def at_call(name: str, phase: str) -> dict[str, Any]:
    return {"call": name, "phase": phase}


VERIFY = "secure_fed.clients.private_round:PrivateRounds._confirm"
PAYS = "secure_fed.privacy.ledger:Ledger.able"
COMPUTE = "secure_fed.privacy.dp_training:Descent.run"

CRASHES = [
    (0, at_write("blocks", "during")),
    (0, at_write("blocks", "after")),
    (2, at_write("snapshot", "during")),
    (2, at_write("snapshot", "after")),
    (2, at_call(VERIFY, "before")),
    (3, at_call(VERIFY, "after")),
    (3, at_write("plan", "during")),
    (1, at_write("plan", "after")),
    (4, at_call(PAYS, "after")),
    (4, at_write("reserve", "during")),
    (5, at_write("reserve", "after")),
    (5, at_call(COMPUTE, "before")),
    (6, at_write("integers", "before")),
    (6, at_write("integers", "during")),
    (7, at_write("integers", "after")),
    (7, at_write("commit", "during")),
    (8, at_write("commit", "after")),
    (8, at_write("envelope", "during")),
    (9, at_write("envelope", "after")),
    (9, at_write("sent", "during", 2)),  # the first tells of round 1, in round 2; the second ends the run
    (10, at_write("sent", "after", 2)),
]
"""Where a site is killed, in the order of a round, each with the step that it has just done, by the numbers of
docs/privacy.md, "Ten steps of a round".

Steps that end with a durable write end where that is done: 1 plan, 5 reserve, 7 store, 8 commit, 9 seal, 10 note as
sent. 2 lock ends before the ledger is verified, 3 verify and 4 check where their functions return, and 6 compute
where the integers are about to be stored. A kill during a write has done the step before, and so has one right before
anything is computed: then the reservation must be on the disk.
"""


def test_every_durable_write_of_a_private_round_is_known(
    private: Federation, workers: list[Worker], tmp_path: Path
) -> None:
    """What the kills below cover is all that there is."""
    writes = tmp_path / "writes"
    others = [private.site(name) for name in TRAINING[1:]]
    coordinator = begin(private)
    worker = Worker(private, record=str(writes))
    workers.append(worker)
    while not coordinator.finished:
        coordinator.receive(worker.respond(coordinator.request(worker.name, worker.run, worker.position)))
        for other in others:
            exchange(coordinator, other)
        coordinator.advance()
    assert worker.respond(coordinator.request(worker.name, worker.run, worker.position)).code == ReplyCode.APPLIED
    lines = [
        line for line in writes.read_text().splitlines() if re.search(r"/identity/ledger/|/outbox/|snapshot", line)
    ]
    found = [name for line in lines for name, pattern in WRITES.items() if re.search(pattern, line)]
    assert len(found) == len(lines)
    assert list(dict.fromkeys(found)) == list(WRITES)
    assert {name for name in WRITES for _, kill in CRASHES if kill.get("write") == WRITES[name]} == set(WRITES)
    assert set(map(crash_id, CRASHES)) >= ONE_EACH
    assert {step for step, _ in CRASHES} == {int(name.partition("-")[0]) for name in ONE_EACH} == set(range(11))


def crash_id(crash: tuple[int, dict[str, Any]]) -> str:
    step, kill = crash
    named = next((name for name, pattern in WRITES.items() if pattern == kill.get("write")), None)
    return f"{step}-{kill['phase']} {named or kill['call'].rpartition('.')[2]}"


ONE_EACH = {
    *("0-after blocks", "1-after plan", "2-before _confirm", "3-after _confirm", "4-after able", "5-after reserve"),
    *("6-during integers", "7-after integers", "8-after commit", "9-after envelope", "10-after sent"),
}
"""One for each step of a round; the others are slow."""


def marked(crash: tuple[int, dict[str, Any]]) -> Any:
    name = crash_id(crash)
    return pytest.param(*crash, id=name, marks=() if name in ONE_EACH else pytest.mark.slow)


@pytest.mark.parametrize(("step", "kill"), map(marked, CRASHES))
def test_a_site_killed_after_any_step_never_forgets_and_never_draws_twice(
    private: Federation, workers: list[Worker], step: int, kill: dict[str, Any]
) -> None:
    others = [private.site(name) for name in TRAINING[1:]]
    coordinator = begin(private)
    worker = Worker(private, kill=kill)
    workers.append(worker)
    last = kill.get("number", 1) > 1  # in the run's last message, after both rounds
    sealing = kill.get("write") == WRITES["envelope"]
    while coordinator.step != Step.ENVELOPE if sealing else last and not coordinator.finished:
        coordinator.receive(worker.respond(coordinator.request(worker.name, worker.run, worker.position)))
        for other in others:
            exchange(coordinator, other)
        coordinator.advance()
    assert worker.respond(coordinator.request(worker.name, worker.run, worker.position)) is None
    assert worker.died()
    outbox = private.folder / "sites/ash/state/runs" / coordinator.run / "outbox"
    kept = {path: path.read_bytes() for path in outbox.glob("[0-9a-f]*")}
    left = ledger_of(private)
    reserved, spent = len(left.events), left.epsilon_spent
    assert reserved == (2 if last else int(step >= 5))
    assert {path.suffix for path in kept} == (
        {".noised", ".envelope"} if step >= 9 else {".noised"} if step >= 7 else set()
    )
    state = "sent" if step >= 10 else "committed" if step >= 8 else "reserved"
    assert all(event.state == state for event in left.events[-1:])
    again = Worker(private)
    workers.append(again)
    reply = again.respond(coordinator.request(again.name, again.run, again.position))
    assert reply is not None
    if not last:
        coordinator.receive(reply)
    # What had been drawn is sent, byte for byte; nothing is drawn for its event again.
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert last or all(data == reply.envelope for path, data in kept.items() if path.suffix == ".envelope")
    while not coordinator.finished:
        for other in others:
            exchange(coordinator, other)
        coordinator.advance()
        coordinator.receive(again.respond(coordinator.request(again.name, again.run, again.position)))
    for other in others:
        exchange(coordinator, other)
    assert {other.adapter_digest for other in others} == {again.adapter_digest}
    ledger = ledger_of(private)
    states = [event.state for event in ledger.events]
    # A reservation whose output was never stored stays spent; everything else left once.
    expected = ["reserved", "sent", "sent"] if step in (5, 6) else ["sent", "sent"]
    assert states == expected
    assert spent <= ledger.epsilon_spent <= 8.0
    assert ledger.epsilon_spent == epsilon_of(len(states) * ledger.events[0].mechanism.mu_squared, 1e-5)
    commits = [
        seq for line in ledger._entries.lines if line.fields["kind"] == "commit" for seq in line.fields["events"]
    ]
    assert len(commits) == len(set(commits)) == 2
    assert len({line.fields["output"] for line in ledger._entries.lines if line.fields["kind"] == "commit"}) == 2


def test_a_site_killed_again_while_it_recovers_draws_nothing_anew(private: Federation, workers: list[Worker]) -> None:
    others = [private.site(name) for name in TRAINING[1:]]
    coordinator = begin(private)
    kept: list[bytes] = []
    for name, phase in (
        ("integers", "after"),
        ("commit", "during"),
        ("commit", "after"),
        ("envelope", "during"),
        ("envelope", "after"),
    ):
        worker = Worker(private, kill=at_write(name, phase))
        workers.append(worker)
        if name == "envelope" and coordinator.step == Step.READY:
            coordinator.receive(worker.respond(coordinator.request(worker.name, worker.run, worker.position)))
            pass_step(coordinator, others)
        assert worker.respond(coordinator.request(worker.name, worker.run, worker.position)) is None
        assert worker.died()
        kept.append(next(private.folder.glob("sites/ash/state/runs/*/outbox/*.noised")).read_bytes())
    assert len(set(kept)) == 1
    sealed = next(private.folder.glob("sites/ash/state/runs/*/outbox/*.envelope")).read_bytes()
    worker = Worker(private)
    workers.append(worker)
    assert worker.respond(coordinator.request(worker.name, worker.run, worker.position)).envelope == sealed
    assert [event.state for event in ledger_of(private).events] == ["committed"]


def test_too_many_crashes_end_in_an_observer_and_not_in_a_deficit(private: Federation, workers: list[Worker]) -> None:
    coordinator = begin(private)
    for _ in range(3):  # two rounds were planned, and one more
        worker = Worker(private, kill=at_write("integers", "before"))
        workers.append(worker)
        assert worker.respond(coordinator.request(worker.name, worker.run, worker.position)) is None
        assert worker.died()
    worker = Worker(private)
    workers.append(worker)
    reply = worker.respond(coordinator.request(worker.name, worker.run, worker.position))
    assert reply.code == ReplyCode.RETIRED, "by its own signed word it trains no more in this run"
    assert [event.state for event in ledger_of(private).events] == ["reserved"] * 3
    assert 7.99 < ledger_of(private).epsilon_spent <= 8.0
    again = private.site("ash")  # the word stands also after a restart, and nothing more is reserved
    assert exchange(coordinator, again).code == ReplyCode.RETIRED
    assert len(ledger_of(private).events) == 3


def test_a_full_disk_at_the_reservation_draws_nothing(private: Federation) -> None:
    site = private.site("ash")
    coordinator = begin(private)
    real = Ledger.reserve

    def full(self: Ledger, *arguments: Any) -> Any:
        with mock.patch("secure_fed.core.storage.os.fsync", side_effect=OSError(28, "No space left on device")):
            return real(self, *arguments)

    with mock.patch.object(Ledger, "reserve", full), pytest.raises(StorageError, match="No space left"):
        site.respond(coordinator.request(site.name, site.run, site.position))
    assert ledger_of(private).events == []
    assert not list(private.folder.glob("sites/ash/state/runs/*/outbox/*.noised"))
    assert site.respond(coordinator.request(site.name, site.run, site.position)).code == ReplyCode.READY


def test_integers_of_an_event_that_the_ledger_does_not_know_are_refused(private: Federation) -> None:
    sites = trained_sites(private)
    coordinator = begin(private)
    exchange(coordinator, sites[0])
    outbox = next(private.folder.glob("sites/ash/state/runs/*/outbox"))
    path = next(outbox.glob("*.noised"))
    tensors = safetensors.numpy.load(path.read_bytes())
    for wrong in (tensors | {"events": np.array([77])}, {"integers": tensors["integers"]}):
        path.write_bytes(safetensors.numpy.save(wrong))
        site = private.site("ash")  # started again: what it gave itself it has in memory
        with pytest.raises(LedgerError):
            site.respond(private.reopen().request(site.name, site.run, site.position))


# --- with encryption, means and the whole of simulate ---


@pytest.mark.parametrize(
    ("use", "adapter", "once", "each"),
    [
        ("synthesis", "facmic", ["labelled", "unlabelled"], 0),
        ("attraction", "facmic", ["unlabelled"], 0),
        ("witness", "low_rank", ["labelled", "unlabelled"], 0),
        ("witness", "facmic", ["unlabelled"], 1),
    ],
)
def test_each_use_releases_the_means_it_needs_and_no_more(
    tmp_path: Path, images: Path, use: str, adapter: str, once: list[str], each: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="secure_fed.clients.private_round")
    federation = make_private(
        tmp_path / "out",
        images,
        method={"adapter": adapter, "lmmd_weight": 1.0},
        privacy={"steps": 2, "lmmd_use": use},
    )
    set_budget(tmp_path / "out", "ash", 8.0, n_ref=100_000)  # so many that means are worth their cost
    sites = [federation.site(name) for name in TRAINING]
    play(federation, sites)
    events = ledger_of(federation).events
    assert f"LMMD on ({use}): {len(once)} release" in caplog.text
    assert [event.purpose.split(" images")[0] for event in events if "images for run" in event.purpose] == [
        f"class means of the {side}" for side in once
    ]
    assert sum("of the adapted images of round" in event.purpose for event in events) == 2 * each
    assert sum(event.purpose.startswith("round") for event in events) == 2
    assert len(events) == len(once) + 2 * each + 2
    assert all(event.state == "sent" for event in events)
    assert all(event.mechanism.sensitivity == pytest.approx(np.sqrt(2)) for event in events if "means" in event.purpose)
    # Everything planned but the round in reserve: the training's and, if each round has one, the means'.
    spent = sum(event.mechanism.mu_squared for event in events)
    assert spent == pytest.approx(2.7757 * (0.12 * len(once) + (1 - 0.12 * len(once)) * 2 / 3), rel=1e-3)
    # A new run of the same study uses what was released once.
    assert len(list((tmp_path / "out/sites/ash/identity/ledger").glob("means-*"))) == 1


@pytest.mark.parametrize("use", ["synthesis", "attraction"])
def test_means_that_were_paid_for_and_lost_in_a_crash_are_not_paid_for_again(
    tmp_path: Path, images: Path, use: str
) -> None:
    """A run would else cost more than was declared for it; it goes on without them."""
    federation = make_private(
        tmp_path / "out",
        images,
        method={"adapter": "facmic", "lmmd_weight": 1.0},
        privacy={"steps": 2, "lmmd_use": use},
    )
    set_budget(tmp_path / "out", "ash", 8.0, n_ref=100_000)
    coordinator, true = begin(federation), private_round.write_durable

    def cut(path: Path, *rest: Any) -> None:
        if path.name.startswith("means-") and path.is_relative_to(tmp_path):  # not those of the rehearsal
            raise StorageError("as if it was killed here")
        true(path, *rest)

    with mock.patch.object(private_round, "write_durable", cut), pytest.raises(StorageError):
        exchange(coordinator, federation.site("ash"))
    paid = [event.purpose for event in ledger_of(federation).events]
    assert len(paid) == (2 if use == "synthesis" else 1)
    assert all(purpose.startswith("class means") for purpose in paid)
    assert exchange(coordinator, federation.site("ash")).code == ReplyCode.READY
    events = ledger_of(federation).events
    assert [event.purpose for event in events[: len(paid)]] == paid
    assert [event.purpose[:7] for event in events[len(paid) :]] == ["round 1"]


@pytest.mark.parametrize("noise", [0.61, 0.78], ids=["for nothing", "for training but not for the round's means"])
def test_who_cannot_pay_is_in_no_sum_and_the_noise_is_what_the_ledger_was_told(
    tmp_path: Path, images: Path, noise: float
) -> None:
    """A round with means of both kinds, of patients with three images each, every other one of whom is spent."""
    federation = make_private(
        tmp_path / "out",
        images,
        rounds=1,
        method={"adapter": "facmic", "lmmd_weight": 1.0},
        privacy={"steps": 2, "lmmd_use": "witness", "images_per_patient": 2},
    )
    set_budget(tmp_path / "out", "ash", 8.0, n_ref=100_000)
    site = federation.site("ash")
    private = site._private
    assert private is not None
    found = site.features()
    patients = dict(found.patients)
    for split in ("train", "unlabelled"):
        places = range(len(found.train.x))
        patients[split] = tuple(f"{('able', 'spent')[place // 3 % 2]} {split} {place // 3}" for place in places)
    digests = {name: frozenset({name.encode()}) for row in patients.values() for name in row}
    site._features = dataclasses.replace(found, unlabelled=found.train.x, patients=patients, digests=digests)
    private.settle(digests, digests)
    with opened(ledger_folder(read_site_file(federation.folder / "sites/ash/site.toml"))) as ledger:
        for split, std in (("train", noise), ("unlabelled", 0.61)):
            spent = {ledger.person(name) for name in patients[split] if name.startswith("spent")}
            ledger.reserve(Mechanism(1.0, std, 1), "before", "", spent)
        costs = {round(cost, 3) for cost in ledger.costs().values()}
    assert costs == {0.0, *(round(std**-2, 3) for std in (noise, 0.61))}
    with (
        mock.patch("secure_fed.clients.learner.rehearse"),
        mock.patch("secure_fed.clients.private_round.check_training", side_effect=check_training) as guard,
        mock.patch.object(class_means, "noisy_sum", side_effect=class_means.noisy_sum) as means,
        mock.patch.object(Descent, "run", autospec=True, side_effect=Descent.run) as run,
    ):
        assert exchange(begin(federation), site).code == ReplyCode.READY
    _, _, once, training, current = ledger_of(federation).events
    left = mu_squared_of(8.0, 1e-5) - noise**-2
    assert (left >= training.mechanism.mu_squared) == (noise > 0.61)
    assert left < training.mechanism.mu_squared + current.mechanism.mu_squared
    assert training.blocks == current.blocks
    assert not set(once.blocks) & set(training.blocks)  # the unlabelled, and those who train
    descent, _, trained = run.call_args.args[:3]
    assert (descent.noise_std, descent.n_ref) == (training.mechanism.noise_std, 100_000)
    checked, _, checked_descent = guard.call_args.args
    assert (checked.shows_adapted, checked_descent) == (True, descent)
    sums = [trained]
    for call, event in zip(means.call_args_list, (once, current), strict=True):
        batch, _, _, settings, noise_multiplier = call.args[:5]
        assert class_means.mechanism(settings, noise_multiplier) == event.mechanism
        sums.append(batch)
    able = {name for name in patients["train"] if name.startswith("able")}
    assert 2 <= len(able) < len(set(patients["train"]))
    for batches in sums:
        assert sum(len(batch.mask) for batch in batches) == len(able)
        assert max(batch.mask.shape[1] for batch in batches) == 2


def test_means_that_only_waste_budget_are_off_for_each_use(
    tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="secure_fed.clients.private_round")
    for use in ("synthesis", "attraction", "witness"):
        caplog.clear()
        folder = tmp_path / use
        federation = make_private(
            folder, images, method={"adapter": "facmic", "lmmd_weight": 1.0}, privacy={"steps": 2, "lmmd_use": use}
        )
        site = federation.site("ash")
        exchange(begin(federation), site)
        assert "LMMD off: with 20 patients declared the class means would be" in caplog.text
        assert [event.purpose[:7] for event in ledger_of(federation).events] == ["round 1"]


def test_simulate_with_a_budget_labels_every_figure_simulated(tmp_path: Path, images: Path) -> None:
    out = tmp_path / "out"
    template = make_template(rounds=1, method={"adapter": "low_rank", "lmmd_weight": 1.0}, privacy={"steps": 2})
    summary = simulate(template, out, images, Heard(), budget=Budget(3.0, 1e-5))
    assert set(summary["privacy"]) == set(TRAINING)
    assert all(spent["simulated"] and 0 < spent["epsilon_spent"] <= 3 for spent in summary["privacy"].values())
    shown = CliRunner().invoke(app, ["ledger", "show", str(out / "sites/ash"), "--json"])
    facts = json.loads(shown.stdout)
    assert facts["epsilon_spent"] == summary["privacy"]["ash"]["epsilon_spent"]
    assert facts["simulated"]
    observer = json.loads(CliRunner().invoke(app, ["ledger", "show", str(out / "sites/dogwood"), "--json"]).stdout)
    assert observer["events"] == []
    assert observer["epsilon_spent"] == 0
    table = CliRunner().invoke(app, ["ledger", "show", str(out / "sites/ash")])
    assert "simulated epsilon" in table.stdout
    assert CliRunner().invoke(app, ["ledger", "verify", str(out / "sites/ash")]).exit_code == 0
    export = tmp_path / "export"
    CliRunner().invoke(app, ["ledger", "export", str(out / "sites/ash"), "--out", str(export)])
    assert export.stat().st_mode & 0o077 == 0
    (out / "sites/ash/identity/ledger/ledger.jsonl").unlink()
    failed = CliRunner().invoke(app, ["ledger", "show", str(out / "sites/ash")])
    assert isinstance(failed.exception, LedgerError)
    assert CliRunner().invoke(app, ["ledger", "restore", str(out / "sites/ash"), str(export)]).exit_code == 0
    assert CliRunner().invoke(app, ["ledger", "verify", str(out / "sites/ash"), "--json"]).exit_code == 0
