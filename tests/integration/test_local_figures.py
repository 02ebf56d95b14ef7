"""Patients under a budget: every command that could show a figure of their images, and what of it may leave."""

from __future__ import annotations

import html
import json
import shutil
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import pytest
import safetensors.numpy
import typer
from click.testing import Result
from flwr.app import Context, RecordDict
from typer.testing import CliRunner

from secure_fed.cli import app
from secure_fed.clients import learner
from secure_fed.clients import site as site_module
from secure_fed.clients.acceptance import again_words
from secure_fed.clients.budget import LOCAL, has_budget, ledger_folder, unpaid
from secure_fed.clients.flower_app import SiteApp
from secure_fed.clients.reply_clock import ReplyClock, reply_seconds
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import SiteFile, SitePrivacy, SiteServer, read_site_file
from secure_fed.clients.snapshot import read_snapshot, write_snapshot
from secure_fed.core.errors import (
    BudgetError,
    DataError,
    LedgerError,
    SiteFileError,
    StudyError,
    TwinsError,
)
from secure_fed.core.layout import SiteRun
from secure_fed.core.tomlfile import read_toml, write_toml
from secure_fed.model.public_statistics import PublicStatistics
from secure_fed.operate import taking_part
from secure_fed.operate.backbone_check import NOBODY_PAID
from secure_fed.operate.doctor.site import _data as of_images
from secure_fed.operate.evidence import counted, pack_evidence, verify_evidence
from secure_fed.operate.live_facts import Place
from secure_fed.operate.site_results import write_results
from secure_fed.operate.taking_part import take_part
from secure_fed.privacy.accounting import Mechanism, epsilon_of, mu_squared_of
from secure_fed.privacy.chain_file import ChainFile
from secure_fed.privacy.ledger import Account, Ledger, _derive, opened
from secure_fed.protocol.envelope import RoundPosition
from secure_fed.protocol.records import Chain
from secure_fed.protocol.rounds import ReplyCode, RoundRequest
from secure_fed.protocol.study import AgreedStudy
from secure_fed.transport.flower_messages import contract, read_reply
from tests.conftest import TRAINING, Federation, exchange, run_round
from tests.flower_messages import Shelf, as_message
from tests.integration.test_dp_site import make_private, set_budget
from tests.unit.privacy.test_ledger import older_ledger

LEAVES = {
    "export": "adapter and card",
    "report": "without --local-metrics",
    "evidence pack": "the archive",
    "client": "messages: tests/integration/test_neighbours.py",
    "status": "what the status file says",
}
"""Commands whose output is meant to leave, or is asked for by others."""

NO_FIGURES = {
    "attack": "refuses patients",
    "simulate": "refuses patients",
    "demo": "refuses patients",
    "sweep": "refuses patients",
    "drill": "phantoms",
    "phantoms make": "phantoms",
    "audit": "synthetic patients",
    "server": "has no image",
    "explain": "words",
    "ledger verify": "the ledger alone",
    "ledger export": "the ledger alone, as secret as its key",
    "ledger restore": "the ledger alone",
    "ledger adopt": "the ledger alone",
    "ledger distinct": "the ledger alone",
    "data fetch": "brings images in",
    "data forget": "lists whom to leave out",
    "site init": "keys",
    "site accept": "terms",
    "site sent": "what left already",
    "site void": "a signed word about a round",
    "site retire": "a signed word about itself",
    "site release": "a signed word about an adapter",
    "evidence verify": "an archive",
    "study new": "reads public images alone, with --public",
    "study init": "reads public or simulated images alone",
    "study check": "a study's text",
    "study list": "a study's text",
    "study show": "a study's text",
    "study diff": "a study's text",
    "study ca": "certificates",
    "study add-site": "keys",
    "study amend": "a coordinator's signed word",
    "study pause": "a coordinator's signed word",
    "study resume": "a coordinator's signed word",
    "study extend": "a coordinator's signed word",
    "study end": "a coordinator's signed word",
    "study close": "destroys keys",
    "keys create": "keys",
    "keys rotate": "keys",
    "keys accept": "keys",
    "keys show": "keys",
    "backbone random": "weights",
    "backbone fetch": "weights",
    "backbone add": "weights",
    "backbone list": "weights",
    "journal verify": "records, which every site has",
    "journal show": "records, which every site has",
    "journal compare": "records, which every site has",
    "journal recompute": "records and sums, which every site has",
    "journal audit": "records and sums, which every site has",
    "journal rebuild": "records, which every site has",
}


def commands(group: click.Group, before: str = "") -> list[str]:
    found = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group) and command.commands:
            found += commands(command, f"{before}{name} ")
        else:
            found.append(f"{before}{name}")
    return found


def test_every_command_has_its_place_here() -> None:
    """Who adds a command says whether its output may leave; who removes one removes it here."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    placed = [*LEAVES, *(name.partition(" --")[0] for name in MARKED if name not in LEAVES), *NO_FIGURES]
    in_two = {"report"}  # by its option
    assert sorted({*placed}) == sorted(commands(group))
    assert {name for name in placed if placed.count(name) > 1} == in_two


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Federation:
    """A study that is over, with ash's patients under a budget; the observer has one too."""
    folder = tmp_path_factory.mktemp("patients") / "out"
    federation = make_private(folder, images, mode="he", rounds=1)
    for name in ("ash", "dogwood"):
        path = folder / "sites" / name / "site.toml"
        data = read_toml(path, SiteFile, ValueError).data.model_copy(update={"kind": "patients"})  # type: ignore[type-var]
        set_budget(folder, name, 8.0, data=data, allow_plain=False)
    sites = [federation.site(name) for name in (*TRAINING, "dogwood")]
    coordinator = federation.begin(sites)
    run_round(coordinator, sites[:3])
    for site in sites:
        exchange(coordinator, site)
        write_results(folder / "sites" / site.name / "state", federation.agreed, site)
    return federation


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["ash", "dogwood"])
def test_an_export_holds_nothing_that_nobody_paid_for(patients: Federation, tmp_path: Path, name: str) -> None:
    site = patients.folder / "sites" / name / "site.toml"
    assert run("export", "--site", site, "--out", tmp_path / "export").exit_code == 0
    card = (tmp_path / "export/README.md").read_text()
    assert "No metrics of single sites" in card
    assert "did not train under differential privacy" not in card
    assert "privacy budget" in card or "differentially private" in card
    tensors = safetensors.numpy.load((tmp_path / "export/adapter.safetensors").read_bytes())
    assert not [tensor for tensor in tensors if tensor.startswith("calibration")]
    refused = run("export", "--site", site, "--out", tmp_path / "own", "--own-results")
    assert isinstance(refused.exception, BudgetError)
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("name", ["ash", "dogwood"])
def test_a_report_withholds_them_or_says_that_it_must_stay(patients: Federation, tmp_path: Path, name: str) -> None:
    folder = patients.folder / "sites" / name
    # Perfect figures or such as a setting may have tell nothing: each gets one that stands nowhere else.
    summary = folder / "state/summary.json"
    as_it_was = summary.read_text()
    document = json.loads(as_it_was)
    figures = document["metrics"]["federated"]
    for key in [key for key, value in figures.items() if isinstance(value, float)]:
        figures[key] = 0.73519
    summary.write_text(json.dumps(document))
    telling = ["73.5", "0.735"]
    for form in ("csv", "md", "html"):
        assert run("report", folder, "--out", tmp_path / f"leaves.{form}").exit_code == 0
        text = (tmp_path / f"leaves.{form}").read_text()
        assert not [figure for figure in telling if figure in text]
    assert "budget" in text
    shown = run("report", folder, "--out", tmp_path / "stays.html", "--local-metrics")
    assert "must not leave the site" in shown.stderr
    stays = (tmp_path / "stays.html").read_text()
    assert "no privacy budget paid for" in stays
    assert any(figure in stays for figure in telling)
    summary.write_text(as_it_was)


def test_what_evidence_packs_has_no_figure_of_any_image(patients: Federation, tmp_path: Path) -> None:
    pack_evidence(patients.folder / "sites/ash", tmp_path / "evidence.zip")
    with zipfile.ZipFile(tmp_path / "evidence.zip") as archive:
        places = {name.split("/")[0] for name in archive.namelist()}
        public = json.loads(archive.read("ledger/public.json"))
    assert places <= {"study", "policy.json", "versions.json", "bom.json", "accepted", "journal", "ledger",
                      "sent.jsonl", "manifest.signed"}  # fmt: skip
    assert not {"blocks", "members", "epsilon_spent", "events", "head"} & set(public)
    # What was released is named by its kind.
    found = verify_evidence(tmp_path / "evidence.zip")["ledger"]
    trained = sum(not release["purpose"].startswith("validation") for release in public["releases"])
    assert trained
    assert f"{counted(len(public['releases']), 'release')}, {trained} of clipped gradients" in found


# --- figures of the site's images that nobody paid for: each command says that they are local ---


@dataclass(frozen=True)
class Here:
    """A site whose patients have a budget, and a folder to write to."""

    federation: Federation
    name: str
    out: Path

    @property
    def folder(self) -> Path:
        return self.federation.folder / "sites" / self.name

    @property
    def file(self) -> SiteFile:
        return read_site_file(self.folder / "site.toml")

    @property
    def model(self) -> tuple[object, ...]:
        return ("--adapter", self.folder / "state/adapter.safetensors", "--checkpoint", self.file.checkpoint)


def _predict(here: Here) -> None:
    arguments = ("predict", *here.model, "--images", here.file.data.folder)
    assert LOCAL in run(*arguments).stderr
    assert json.loads(run(*arguments, "--json").stdout)["local"] == LOCAL


def _explain_case(here: Here) -> None:
    one = next(Path(here.file.data.folder).rglob("*.png"))
    assert LOCAL in run("explain-case", *here.model, "--image", one, "--out", here.out).stderr
    assert LOCAL in html.unescape((here.out / "cases.html").read_text())


def _evaluate(here: Here) -> None:
    assert LOCAL in run("evaluate", *here.model, "--images", here.file.data.folder).stdout


def _plot(here: Here) -> None:
    assert LOCAL in run("plot", here.folder, "--out", here.out).stdout
    assert json.loads(run("plot", here.folder, "--out", here.out, "--json").stdout)["local"] == LOCAL


def _report(here: Here) -> None:
    said = run("report", here.folder, "--out", here.out / "report.html", "--local-metrics")
    assert "must not leave the site" in said.stderr
    assert "no privacy budget paid for" in (here.out / "report.html").read_text()


def _ledger_show(here: Here) -> None:
    shown, facts = run("ledger", "show", here.folder).stdout, run("ledger", "show", here.folder, "--json").stdout
    assert "own eyes" in json.loads(facts)["local"]
    if here.name == "ash":  # the observer has spent nothing
        assert "local, for this site's own eyes" in shown


def _ledger_link(here: Here) -> None:
    with mock.patch("secure_fed.operate.ledger_copies.link_patients", return_value=(7.9, 8.0)):
        said = run("ledger", "link", "a", "b", "--site", here.folder / "site.toml").stdout
    assert said.startswith("local: one patient")


def _data_check(here: Here) -> None:
    checked = run("data", "check", "--site", here.folder / "site.toml", "--json")
    assert json.loads(checked.stdout)["local"] == LOCAL
    assert LOCAL in run("data", "check", "--site", here.folder / "site.toml").stdout


def _doctor(here: Here) -> None:
    examined = json.loads(run("doctor", "--site", here.folder, "--json").stdout)["checks"]
    counted = of_images(here.file, here.federation.agreed)  # which doctor asks for while a study is not over
    assert " images of " in counted
    assert LOCAL in counted
    if here.name == "ash":
        (of_ledger,) = [check["found"] for check in examined if check["found"].startswith("verifies; epsilon")]
        assert LOCAL in of_ledger


def _page(here: Here) -> None:
    facts = Place(here.folder).facts()
    assert "own eyes" in facts["budget"]["local"]
    page = (files("secure_fed.operate") / "live_page.html").read_text(encoding="utf-8")
    (said,) = [line for line in page.splitlines() if 'put("#whose"' in line]
    assert f'f.role === "{facts["role"]}" ? "This page is for this site\'s own eyes' in said


def _backbone_check(here: Here) -> None:
    model = here.federation.agreed.study.backbone.model
    arguments = ("backbone", "check", here.file.checkpoint, "--model", model, "--images", here.file.data.folder)
    assert NOBODY_PAID in " ".join(run(*arguments).stdout.split())
    assert json.loads(run(*arguments, "--json").stdout)["zero_shot"]["local"] == NOBODY_PAID


MARKED: dict[str, Callable[[Here], None]] = {
    "predict": _predict,
    "evaluate": _evaluate,
    "explain-case": _explain_case,
    "plot": _plot,
    "report --local-metrics": _report,
    "ledger show": _ledger_show,
    "ledger link": _ledger_link,
    "data check": _data_check,
    "doctor": _doctor,
    "page": _page,
    "backbone check": _backbone_check,
}
"""Commands with figures of the site's images that nobody paid for, and what finds the words that they are local."""


@pytest.mark.parametrize("command", MARKED)
@pytest.mark.parametrize("name", ["ash", "dogwood"])
def test_every_local_figure_says_that_it_is_local(
    patients: Federation, tmp_path: Path, name: str, command: str
) -> None:
    here = Here(patients, name, tmp_path)
    assert has_budget(here.file)
    assert unpaid(here.file)
    MARKED[command](here)


@pytest.mark.parametrize("name", ["ash", "dogwood"])
def test_what_a_site_leaves_of_its_own_results_says_that_it_is_local(patients: Federation, name: str) -> None:
    assert json.loads((patients.folder / "sites" / name / "state/summary.json").read_text())["local"] == LOCAL


def test_public_figures_are_not_marked(patients: Federation) -> None:
    said = json.loads((patients.folder / "sites/birch/state/summary.json").read_text())
    assert "local" not in said


def test_what_plays_with_data_refuses_patients(patients: Federation, tmp_path: Path) -> None:
    shown = run("plot", patients.folder, "--out", tmp_path / "plots")
    assert shown.exception is not None
    exported = run("export", "--run", patients.folder, "--out", tmp_path / "export")
    assert exported.exception is not None


# --- a further run ---


def test_accept_again_shows_who_differs_and_what_that_reveals(patients: Federation, tmp_path: Path) -> None:
    shutil.copytree(patients.folder, tmp_path / "out", symlinks=True)
    site, study = tmp_path / "out/sites/birch/site.toml", tmp_path / "out/study.toml"
    shown = run("site", "accept", study, "--site", site, "--again", "--by", "somebody", "--json")
    assert shown.exit_code == 0, shown.exception
    lines = json.loads(shown.stdout)["again"]
    assert any("sums over ash, birch, cedar" in line and "1 rounds" in line for line in lines)
    assert any("new none, gone none" in line for line in lines)
    assert "this site has no privacy budget" in lines[-1]
    text = run("site", "accept", study, "--site", tmp_path / "out/sites/ash/site.toml", "--again", "--by", "she").stdout
    assert "noised under its privacy budget" in text


def test_accept_again_names_the_one_site_whose_update_the_difference_tells(patients: Federation) -> None:
    file = read_site_file(patients.folder / "sites/birch/site.toml")
    study = patients.agreed.study
    without = study.model_copy(update={"sites": tuple(one for one in study.sites if one.name != "cedar")})
    of_the_last_run = Chain(patients.agreed)
    with mock.patch("secure_fed.clients.acceptance.Chain", return_value=of_the_last_run):
        lines = again_words(file, AgreedStudy(without, patients.agreed.initial))
    assert any("new none, gone cedar" in line for line in lines)
    assert any("differ by cedar alone: their sums together tell nearly its update" in line for line in lines)


# --- bad input ---


@pytest.fixture
def site(tmp_path: Path, images: Path) -> Federation:
    return make_private(tmp_path / "out", images)


def privacy(federation: Federation, **changes: Any) -> None:
    path = federation.folder / "sites/ash/site.toml"
    file = read_toml(path, SiteFile, ValueError)  # type: ignore[type-var]
    old = {} if file.privacy is None else file.privacy.model_dump(exclude_none=True)
    write_toml(path, file.model_copy(update={"privacy": SitePrivacy.model_validate(old | changes)}))


def ledger(federation: Federation) -> Path:
    return ledger_folder(read_site_file(federation.folder / "sites/ash/site.toml"))


def test_epsilon_of_a_run_above_the_sites(site: Federation) -> None:
    privacy(site, epsilon=3.0, run_epsilon=4.0)
    with pytest.raises(BudgetError, match=r"run_epsilon = 4, but each patient's budget is epsilon 3"):
        site.site("ash")


def test_a_ledger_of_another_identity(site: Federation) -> None:
    site.site("ash")
    shutil.rmtree(ledger(site))
    Ledger.create(ledger(site), Account("ash", "e" * 64, "image", "public", 8.0, 1e-5))
    with pytest.raises(
        LedgerError, match=r"the ledger of identity e{16}; expected that of this site's identity \w{16}"
    ):
        site.site("ash")


def test_a_known_ledger_that_was_not_adopted(site: Federation) -> None:
    file = read_site_file(site.folder / "sites/ash/site.toml")
    older_ledger(Path(file.state) / "privacy", {"a": 0.1})
    with pytest.raises(
        LedgerError, match=r"has not taken over; expected every known one to be: secfacmic ledger adopt"
    ):
        site.site("ash")


def test_ledgers_of_0_1_are_adopted_by_command_once_each_and_their_histories_add(site: Federation) -> None:
    path = site.folder / "sites/ash/site.toml"
    file = read_site_file(path)
    patient = sorted(site.site("ash").features().digests)[0]
    shutil.rmtree(ledger(site))
    other = site.folder / "another study's state"
    older_ledger(Path(file.state) / "privacy", {patient: 0.1}, unit="image", data="public")
    older_ledger(other / "privacy", {patient: 0.05}, unit="image", data="public")
    taken = run("ledger", "adopt", file.state, other, "--site", path)
    assert taken.exit_code == 0, taken.output
    assert taken.stdout.count("its ledger is adopted; start no older version there") == 2
    site.site("ash").features()
    facts = json.loads(run("ledger", "show", path, "--json").stdout)
    assert facts["epsilon_spent"] == pytest.approx(epsilon_of(0.15, 1e-5), abs=1e-6)
    before = {one.name: one.read_bytes() for one in ledger(site).iterdir() if one.is_file()}
    again = run("ledger", "adopt", other, "--site", path)
    assert isinstance(again.exception, LedgerError)
    assert "was adopted before; expected each once" in str(again.exception)
    assert {one.name: one.read_bytes() for one in ledger(site).iterdir() if one.is_file()} == before
    assert run("ledger", "verify", path).exit_code == 0
    # Version 0.1 goes on with one of them behind the new ledger's back.
    shutil.rmtree(Path(file.state) / "privacy")
    shutil.copytree(other / "privacy", Path(file.state) / "privacy")
    book = Path(file.state) / "privacy"
    secret = bytes.fromhex((book / "ledger.key").read_text())
    chain = ChainFile(book / "ledger.jsonl", _derive(secret, "mac"))
    chain.load(chain.path.read_bytes())
    chain.append({"kind": "budget", "epsilon": 2.0})
    with pytest.raises(LedgerError, match=r"version 0\.1 has spent since"):
        site.site("ash")


def test_a_link_that_exceeds_the_budget_is_told_and_the_patient_is_out(site: Federation) -> None:
    ash = site.site("ash")
    first, second = sorted(ash.features().digests)[:2]
    everything = mu_squared_of(8.0, 1e-5) * 0.9
    with opened(ledger(site)) as book:
        for name in (first, second):
            book.reserve(Mechanism(1.0, everything**-0.5, 1), "before", "", {book.person(name)})
    shown = run("ledger", "link", first, second, "--site", site.folder / "sites/ash/site.toml")
    assert "above the budget, so that the patient takes part in nothing any more" in shown.stdout
    with opened(ledger(site)) as book:
        assert book.person(first) == book.person(second)
        assert book.able({book.person(first)}, 1e-6) == set()


def test_equal_pictures_under_two_ids_stop_the_start_until_they_are_settled(site: Federation) -> None:
    ash = site.site("ash")
    assert ash._private is not None
    with pytest.raises(TwinsError, match=r"1 pairs of patient ids have an equal picture[\s\S]*  a  b"):
        ash._private.settle({"a": {b"same"}, "b": {b"same", b"own"}}, {})
    assert run("ledger", "distinct", "a", "b", "--site", site.folder / "sites/ash/site.toml").exit_code == 0
    ash._private.settle({"a": {b"same"}, "b": {b"same", b"own"}}, {})
    # Ids are known in one form, in whichever they are typed.
    composed, typed = "M\u00fcller", "Mu\u0308ller "
    with pytest.raises(TwinsError, match=composed):
        ash._private.settle({"c": {b"third"}, composed: {b"third"}}, {})
    assert run("ledger", "link", "c", typed, "--site", site.folder / "sites/ash/site.toml").exit_code == 0
    ash._private.settle({"c": {b"third"}, composed: {b"third"}}, {})


def test_ids_that_patients_csv_takes_for_another_stop_the_start_until_their_histories_are_one(site: Federation) -> None:
    ash = site.site("ash")
    assert ash._private is not None
    with opened(ledger(site)) as book:
        book.register({"b": {b"old"}})
        book.reserve(Mechanism(1.0, 10.0, 1), "before", "", {book.person("b")})
    new, same = {"a": {b"new"}}, {"b": "a", "elsewhere": "nobody here"}
    with pytest.raises(TwinsError, match=r"1 patient ids are taken for another one \(patients\.csv\)[\s\S]*  b  a$"):
        ash._private.settle(new, {}, same)
    assert run("ledger", "link", "b", "a", "--site", site.folder / "sites/ash/site.toml").exit_code == 0
    ash._private.settle(new, {}, same)
    with opened(ledger(site)) as book:
        assert book.epsilon_spent == pytest.approx(epsilon_of(0.01, 1e-5))


def test_files_are_known_again_whatever_is_shown_of_them(site: Federation) -> None:
    """A newer reader, say, shows their pictures otherwise."""
    ash = site.site("ash")
    assert ash._private is not None
    ash._private.settle({"a": {b"as it was shown"}}, {"a": {b"the file"}})
    with pytest.raises(TwinsError, match=r"  x  #"):
        ash._private.settle({"x": {b"as it is shown"}}, {"x": {b"the file"}})


def test_public_statistics_of_another_backbone_than_the_studys(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(120, 8)).astype(np.float32)
    PublicStatistics.of([rows]).save(tmp_path / "public.safetensors", "a" * 64)
    with pytest.raises(StudyError, match=r"of backbone a{16}, the study's is b{16}"):
        PublicStatistics.load(tmp_path / "public.safetensors", "b" * 64)


def test_too_short_a_reply_time_is_refused_with_what_it_takes(site: Federation) -> None:
    privacy(site, reply_seconds=0.5)
    file = read_site_file(site.folder / "sites/ash/site.toml")
    ticks = iter([0.0, 7.0])
    with pytest.raises(SiteFileError, match=r"reply_seconds = 0.5; expected at least 14"):
        reply_seconds(file, site.agreed, now=lambda: next(ticks))


# --- an event belongs to a state of the adapter ---


def test_asked_ten_times_at_one_state_a_site_sends_the_same_and_spends_nothing(tmp_path: Path, images: Path) -> None:
    """As after ten rounds that did not move the adapter, validation counts included."""
    federation = make_private(tmp_path / "out", images, privacy={"steps": 2, "validation_rounds": 2})
    ash = federation.site("ash")
    features, rounds = ash.features(), ash._private
    assert rounds is not None
    run_folder, initial, sent = SiteRun(tmp_path / "run"), federation.agreed.initial.adapter, []

    def quantise(update: Any, draws: Any, counts: tuple[int, int]) -> Any:
        return np.concatenate([np.rint(update * 2.0**20), counts]).astype(np.int64)

    def ask(number: int, state: str, place: int) -> None:
        position = RoundPosition("7" * 64, f"{place:064x}", "0" * 64, 0, number)
        sent.append(rounds.integers(position, state, initial, initial, run_folder, lambda: features, quantise))

    ask(1, "a", 0)
    spent, events = Ledger(ledger(federation)).epsilon_spent, len(Ledger(ledger(federation)).events)
    assert events == 2  # training and validation counts
    for place in range(10):
        ask(1 + place % 2, "a", 1 + place)
    assert all(np.array_equal(one, sent[0]) for one in sent)
    assert (Ledger(ledger(federation)).epsilon_spent, len(Ledger(ledger(federation)).events)) == (spent, events)
    ask(2, "b", 11)
    assert not np.array_equal(sent[-1], sent[0])
    assert Ledger(ledger(federation)).epsilon_spent > spent


# --- what takes work on the data takes a fixed time ---


class _Ticks:
    """Time that passes only when somebody works or sleeps."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def _asked(app: SiteApp, request: RoundRequest, study: str) -> ReplyCode:
    shelf = Shelf()
    context = Context(1, 1, {}, RecordDict(), {})
    answer = app.answer(as_message(request, shelf), context, contract(study), shelf)
    return read_reply(answer.content, app.site.name, shelf.fetch).code


@pytest.mark.parametrize("work", [0.0, 1.0, 4.9])
def test_a_refusal_after_work_on_the_data_leaves_at_the_fixed_time_too(
    site: Federation, monkeypatch: pytest.MonkeyPatch, work: float
) -> None:
    """A server that asks for a round that does not fit, with a run's first record, times how long its data take."""
    ticks, ash, coordinator = _Ticks(), site.site("ash"), site.open_run()

    def write(path: Path, *rest: Any) -> None:
        ticks.pass_by(work)
        write_snapshot(path, *rest)

    monkeypatch.setattr(site_module, "write_snapshot", write)
    app = SiteApp(ash, site.agreed.study.id, lambda _: None, clock=ReplyClock(5.0, ticks, ticks.pass_by))
    request = replace(coordinator.request(ash.name, ash.run, ash.position), round=2)
    assert _asked(app, request, site.agreed.study.id) == ReplyCode.FAILED_PROTOCOL
    assert ticks.now == 5.0
    # What asks for nothing of the data is answered at once.
    request = replace(coordinator.request(ash.name, ash.run, ash.position), round=2)
    assert _asked(app, request, site.agreed.study.id) == ReplyCode.FAILED_PROTOCOL
    assert ticks.now == 5.0


def _with_server(federation: Federation, name: str) -> SiteFile:
    file = read_site_file(federation.folder / "sites" / name / "site.toml")
    return file.model_copy(update={"server": SiteServer(address="127.0.0.1:1", authority="ca.crt")})


@pytest.mark.parametrize("name", ["ash", "dogwood", "birch"])
def test_under_a_budget_no_message_waits_for_figures_of_the_sites_images(
    site: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """How long these take is of its test images, one patient's 500 among them. They are there when it has left."""
    if name == "dogwood":  # which only looks on
        set_budget(site.folder, name, 8.0)
    left, seen = threading.Event(), []

    def figures(state: Path, agreed: AgreedStudy, of: Site) -> None:
        seen.append((of.round, left.wait(30.0 if name != "birch" else 0.0)))
        write_results(state, agreed, of)

    def both_rounds(app: SiteApp, way: Any) -> None:
        coordinator = site.open_run()
        others = [site.site(other) for other in TRAINING if other != name]
        sites = [*others, app.site] if name in TRAINING else others
        for _ in range(2):
            run_round(coordinator, sites)
            exchange(coordinator, app.site)
            app.after_reply(taken=True)
        left.set()

    monkeypatch.setattr(taking_part, "write_results", figures)
    monkeypatch.setattr(taking_part, "run_site", both_rounds)
    monkeypatch.setattr(taking_part, "reply_seconds", lambda *rest: 0.01)
    with caplog.at_level("INFO"):
        take_part(_with_server(site, name))
    assert seen == [(1, name != "birch"), (2, name != "birch")]
    assert "round 1 of 2 applied" in caplog.text
    assert (site.folder / "sites" / name / "state/summary.json").is_file()


@pytest.mark.parametrize("work", [0.0, 1.0, 6.9])
def test_a_site_that_starts_again_in_a_run_comes_back_at_the_fixed_time(
    site: Federation, monkeypatch: pytest.MonkeyPatch, work: float
) -> None:
    """Whoever makes it stop, by a message that it cannot take, would else time how long it reads its data."""
    ash, coordinator = site.site("ash"), site.open_run()
    ash.respond(coordinator.request(ash.name, ash.run, ash.position))
    ticks, came, compared = _Ticks(), [], threading.Event()

    def read(*arguments: Any) -> Any:
        ticks.pass_by(work)
        return read_snapshot(*arguments)

    def connect(app: SiteApp, way: Any) -> None:
        came.append(ticks.now)
        compared.set()

    monkeypatch.setattr(learner, "read_snapshot", read)
    monkeypatch.setattr(learner, "data_changed", lambda *rest: compared.wait(30.0) and False)  # as long as it takes
    monkeypatch.setattr(taking_part, "monotonic", ticks)
    monkeypatch.setattr(taking_part, "ReplyClock", lambda seconds: ReplyClock(seconds, ticks, ticks.pass_by))
    monkeypatch.setattr(taking_part, "reply_seconds", lambda *rest: 7.0)
    monkeypatch.setattr(taking_part, "run_site", connect)
    take_part(_with_server(site, "ash"))
    assert came == [pytest.approx(7.0)]


def test_with_a_budget_and_only_looking_on_a_site_comes_back_whatever_has_become_of_its_data(
    site: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_budget(site.folder, "dogwood", 8.0)
    came: list[str] = []
    monkeypatch.setattr(taking_part, "run_site", lambda app, way: came.append(app.site.name))
    file = _with_server(site, "dogwood")
    broken = file.model_copy(update={"data": file.data.model_copy(update={"folder": "/nowhere"})})
    with pytest.raises(DataError):
        take_part(broken)  # before a run: settled here, in silence
    dogwood, coordinator = site.site("dogwood"), site.open_run()
    dogwood.respond(coordinator.request("dogwood", dogwood.run, dogwood.position))
    take_part(broken)
    assert came == ["dogwood"]


def test_a_run_is_frozen_in_a_reply_that_leaves_at_the_fixed_time(site: Federation) -> None:
    """Also where nobody asks for an update yet: a snapshot takes the longer the more images there are."""
    ash, coordinator = site.site("ash"), site.open_run()
    request = replace(coordinator.request(ash.name, ash.run, ash.position), attempt=0)
    assert ash.respond(request).code == ReplyCode.APPLIED
    assert ash.read_data
    request = replace(coordinator.request(ash.name, ash.run, ash.position), attempt=0)
    assert ash.respond(request).code == ReplyCode.APPLIED
    assert not ash.read_data
