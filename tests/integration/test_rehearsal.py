"""The real private round against what its ledger says was paid: a seeded bug is refused before a budget is spent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from secure_fed.cli import app
from secure_fed.clients import private_round
from secure_fed.clients.canaries import audit_site
from secure_fed.clients.private_round import PrivateRounds
from secure_fed.clients.rehearsal import rehearse
from secure_fed.clients.sitefile import SiteFile, read_site_file
from secure_fed.core.errors import GuardError, LedgerError
from secure_fed.lab.simulation import prepare
from secure_fed.privacy import class_statistics, dp_training, ledger, memory_sums
from secure_fed.privacy.dp_training import Descent
from secure_fed.privacy.ledger import Ledger
from secure_fed.protocol.study import AgreedStudy
from tests.conftest import Federation
from tests.integration.test_anomaly import template as anomaly_template
from tests.integration.test_dp_site import make_private, set_budget
from tests.integration.test_one_sum import one_sum_template

pytestmark = pytest.mark.filterwarnings("error:Full backward hook")

Made = tuple[SiteFile, AgreedStudy]

TWO_BLOCKS = {"block": "transformer.resblocks.1", "map_block": "transformer.resblocks.0"}


def opened(federation: Federation) -> Made:
    return read_site_file(federation.folder / "sites/ash/site.toml"), federation.agreed


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Made:
    """A study of rounds, with validation counts that are paid for."""
    folder = tmp_path_factory.mktemp("rounds") / "out"
    return opened(make_private(folder, images, privacy={"steps": 3, "validation_rounds": 1}))


@pytest.fixture(scope="module")
def one_sum(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Made:
    folder = tmp_path_factory.mktemp("sum") / "out"
    prepare(one_sum_template(mode="plain"), folder, images)
    set_budget(folder, "ash", 3.0)
    return opened(Federation(folder))


@pytest.fixture(scope="module")
def centroids(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Made:
    """A study of anomalies: three sums around the centroids of two memories, and the round of the histogram."""
    folder = tmp_path_factory.mktemp("centroids") / "out"
    prepare(anomaly_template(mode="plain", rounds=4, method=TWO_BLOCKS), folder, images)
    set_budget(folder, "ash", 3.0)
    return opened(Federation(folder))


def test_the_real_rounds_pass(rounds: Made, one_sum: Made, centroids: Made, caplog: pytest.LogCaptureFixture) -> None:
    """And tell nothing: "epsilon spent 8 of 8", of a ledger that is thrown away, reads as if it were the site's own."""
    caplog.set_level("INFO", private_round.__name__)
    rehearse(*rounds)
    rehearse(*one_sum)
    rehearse(*centroids)
    assert not [entry for entry in caplog.records if entry.name.startswith("secure_fed")]


def test_without_a_domain_term_a_round_is_tried_once_whatever_the_weights_are(
    rounds: Made,
) -> None:
    file, agreed = rounds
    for adaptation, tried in (("none", [True]), ("lmmd", [True, False])):
        method = agreed.study.method.model_copy(update={"lmmd_weight": 1.0, "adaptation": adaptation})
        study = agreed.study.model_copy(update={"method": method})
        with mock.patch("secure_fed.clients.rehearsal._Rehearsal") as rehearsal:
            rehearse(file, AgreedStudy(study, agreed.initial))
        assert rehearsal.return_value.check.call_args_list == [mock.call(exactly=each) for each in tried]


@contextmanager
def run_of_descent(change: Callable[..., None]) -> Iterator[None]:
    """Another ``Descent.run``, which is given the real one as well."""
    real = Descent.run
    with mock.patch.object(Descent, "run", lambda self, *rest: change(real, self, *rest)):
        yield


@contextmanager
def an_image_is_clipped_and_not_a_patient() -> Iterator[None]:
    real = dp_training.gather_patients

    def by_image(x: Any, y: Any, owners: list[str], most: int) -> Any:
        return real(x, y, [f"{owner} {row}" for row, owner in enumerate(owners)], most)

    with mock.patch.object(private_round, "gather_patients", by_image):
        yield


@contextmanager
def noise_without_the_clipping_norm() -> Iterator[None]:
    def without(real: Any, self: Descent, *rest: Any) -> None:
        real(Descent(self.settings, self.noise_std / self.settings.clip, self.n_ref, self.noise), *rest)

    with run_of_descent(without):
        yield


@contextmanager
def noise_in_the_first_step_alone() -> Iterator[None]:
    def first(real: Any, self: Descent, *rest: Any) -> None:
        steps: list[int] = []

        def noise(size: int, std: float) -> NDArray[np.float64]:
            steps.append(size)
            return self.noise(size, std) if len(steps) == 1 else np.zeros(size)

        real(Descent(self.settings, self.noise_std, self.n_ref, noise), *rest)

    with run_of_descent(first):
        yield


@contextmanager
def an_extra_step_without_noise() -> Iterator[None]:
    def one_more(real: Any, self: Descent, *rest: Any) -> None:
        real(self, *rest)
        quiet = Descent(
            self.settings.model_copy(update={"steps": 1}), 1.0, self.n_ref, lambda size, std: np.zeros(size)
        )
        real(quiet, *rest)

    with run_of_descent(one_more):
        yield


@contextmanager
def another_divisor() -> Iterator[None]:
    """The true number of patients instead of the declared one."""

    def counted(real: Any, self: Descent, adapter: Any, patients: Any, *rest: Any) -> None:
        true = sum(len(batch.mask) for batch in patients)
        real(Descent(self.settings, self.noise_std, true, self.noise), adapter, patients, *rest)

    with run_of_descent(counted):
        yield


@contextmanager
def nobody_is_left_out() -> Iterator[None]:
    """Who cannot pay is charged, and takes part."""
    with mock.patch.object(Ledger, "able", lambda self, persons, cost: set(persons)):
        yield


@contextmanager
def nobody_is_charged() -> Iterator[None]:
    """Who takes part has paid nothing, and can pay again for ever."""
    with patched(
        Ledger,
        "reserve",
        lambda real, self, mechanism, purpose, run, persons: real(
            self, mechanism, purpose, run, () if run else persons
        ),
    ):
        yield


@contextmanager
def patched(owner: Any, name: str, change: Callable[..., Any]) -> Iterator[None]:
    """One function changed, which is given the real one as well."""
    real = getattr(owner, name)
    with mock.patch.object(owner, name, lambda *args, **named: change(real, *args, **named)):
        yield


SEEDED: dict[str, Callable[[], Any]] = {
    "an image is clipped, not a patient": an_image_is_clipped_and_not_a_patient,
    "noise without the factor C": noise_without_the_clipping_norm,
    "noise in the first step only": noise_in_the_first_step_alone,
    "an extra step without noise": an_extra_step_without_noise,
    "divided by the true number": another_divisor,
    "who cannot pay takes part": nobody_is_left_out,
    "nobody is charged": nobody_is_charged,
    "the plan forgets the round in reserve": lambda: patched(
        ledger, "_noise", lambda real, mu_squared, steps: real(mu_squared, steps * 2 // 3)
    ),
    "more images of a patient than the study takes": lambda: patched(
        private_round, "gather_patients", lambda real, x, y, owners, most: real(x, y, owners, most + 1)
    ),
    "a patient's norm is taken too small": lambda: patched(
        dp_training, "_factors", lambda real, squares, clip: real(squares / 2, clip)
    ),
    "an event is not committed": lambda: patched(Ledger, "commit", lambda real, *rest, **named: None),
    "drawn anew when asked again": lambda: patched(
        PrivateRounds, "_stored", lambda real, self, ledger, position, path: self._read(path)[1] + 1
    ),
    "the counts are not noised": lambda: patched(
        private_round.validation,
        "noisy_counts",
        lambda real, right, owners, *rest: (len(set(owners)), int(right.sum())),
    ),
    "who trains is counted too": lambda: patched(
        PrivateRounds,
        "_reserve_validation",
        lambda real, self, ledger, plan, number, purpose, people, events: real(
            self, ledger, plan, number, purpose, {**people, "train": ()}, events
        ),
    ),
    "who cannot pay is counted": lambda: patched(
        PrivateRounds,
        "_noisy_counts",
        lambda real, self, plan, used, features, people, counted: real(
            self, plan, used, features, people, set(people["val"])
        ),
    ),
    "the ledger is told a smaller sensitivity": lambda: patched(
        Ledger,
        "reserve",
        lambda real, self, mechanism, *rest: real(
            self,
            type(mechanism)(mechanism.sensitivity / 2, mechanism.noise_std, mechanism.steps),
            *rest,
        ),
    ),
    "paid for a step less": lambda: patched(
        Ledger,
        "reserve",
        lambda real, self, mechanism, *rest: real(
            self, type(mechanism)(mechanism.sensitivity, mechanism.noise_std, max(1, mechanism.steps - 1)), *rest
        ),
    ),
}


@pytest.mark.parametrize("bug", SEEDED)
def test_a_seeded_bug_is_refused_before_anything_is_spent(rounds: Made, bug: str) -> None:
    with SEEDED[bug](), pytest.raises((GuardError, LedgerError)):
        rehearse(*rounds)


ONE_SUM: dict[str, Callable[[], Any]] = {
    "no noise on the second moment": lambda: patched(
        class_statistics,
        "noisy_values",
        lambda real, sums, multiplier, noise: real(sums, multiplier, noise) | {"second": sums.values()["second"]},
    ),
    "noise of another size": lambda: patched(
        class_statistics, "noisy_values", lambda real, sums, multiplier, noise: real(sums, multiplier / 2, noise)
    ),
    "an image counts as a patient": lambda: patched(
        class_statistics, "shares", lambda real, owners: np.ones(len(owners))
    ),
    "no cap on images": lambda: patched(
        class_statistics, "capped", lambda real, owners, paying, most: real(owners, paying, most + 1)
    ),
    "who cannot pay takes part": nobody_is_left_out,
    "nobody is charged": nobody_is_charged,
    "histograms in the second round": lambda: patched(
        private_round,
        "nothing",
        lambda real, *rest: {name: value + 1 for name, value in real(*rest).items()},
    ),
}


@pytest.mark.parametrize("bug", ONE_SUM)
def test_a_seeded_bug_of_one_sum_is_refused(one_sum: Made, bug: str) -> None:
    with ONE_SUM[bug](), pytest.raises(GuardError):
        rehearse(*one_sum)


CENTROIDS: dict[str, Callable[[], Any]] = {
    "no noise on the weights": lambda: patched(
        memory_sums,
        "noisy_values",
        lambda real, sums, *rest: real(sums, *rest) | {"map_weights": sums["map_weights"]},
    ),
    "noise of another size": lambda: patched(
        memory_sums, "noisy_values", lambda real, sums, std, noise: real(sums, std / 2, noise)
    ),
    "numbers of patients leave": lambda: patched(
        memory_sums,
        "noisy_values",
        lambda real, sums, *rest: real(sums, *rest) | {"score_patients": sums["score_patients"]},
    ),
    "two memories paid as one": lambda: patched(
        memory_sums, "sensitivity", lambda real, adapter: real(adapter) / 2**0.5
    ),
    "an image counts as a patient": lambda: patched(memory_sums, "shares", lambda real, owners: np.ones(len(owners))),
    "no cap on images": lambda: patched(
        class_statistics, "capped", lambda real, owners, paying, most: real(owners, paying, most + 1)
    ),
    "the plan is of one sum": lambda: patched(
        Ledger,
        "make_plan",
        lambda real, self, study, run, declared, rounds, *rest: real(self, study, run, declared, 0, *rest),
    ),
    "who cannot pay takes part": nobody_is_left_out,
    "nobody is charged": nobody_is_charged,
    "a histogram in the last round": lambda: patched(
        private_round, "nothing", lambda real, *rest: {name: value + 1 for name, value in real(*rest).items()}
    ),
}


@pytest.mark.parametrize("bug", CENTROIDS)
def test_a_seeded_bug_of_sums_around_centroids_is_refused(centroids: Made, bug: str) -> None:
    with CENTROIDS[bug](), pytest.raises(GuardError):
        rehearse(*centroids)


def test_a_site_rehearses_before_its_first_reservation_and_spends_nothing_if_it_fails(
    tmp_path: Path, images: Path
) -> None:
    federation = make_private(tmp_path / "out", images, privacy={"steps": 2})
    site, coordinator = federation.site("ash"), federation.open_run()
    with an_extra_step_without_noise(), pytest.raises(GuardError, match="something else of the patients is in it"):
        site.respond(coordinator.request(site.name, site.run, site.position))
    file = read_site_file(federation.folder / "sites/ash/site.toml")
    assert Ledger(private_round.ledger_folder(file)).events == []


def test_a_site_of_one_sum_rehearses_too(tmp_path: Path, images: Path) -> None:
    prepare(one_sum_template(mode="plain"), tmp_path / "out", images)
    set_budget(tmp_path / "out", "ash", 3.0)
    federation = Federation(tmp_path / "out")
    site, coordinator = federation.site("ash"), federation.open_run()
    with ONE_SUM["noise of another size"](), pytest.raises(GuardError):
        site.respond(coordinator.request(site.name, site.run, site.position))
    file = read_site_file(federation.folder / "sites/ash/site.toml")
    assert Ledger(private_round.ledger_folder(file)).events == []


# --- the audit of a site ---


def test_the_audit_holds_a_run_against_what_its_ledger_says_was_paid(
    rounds: Made, one_sum: Made, centroids: Made
) -> None:
    # Of four releases that the memory's noise is planned for three are made.
    for made, claimed in ((rounds, 6.2), (one_sum, 3.0), (centroids, 2.55)):
        result = audit_site(*made, canaries=100, guesses=20)
        assert result.passed, result.report
        assert result.claimed_epsilon == pytest.approx(claimed, abs=0.1)


def test_the_audit_sees_canaries_at_all_and_refutes_too_little_noise(rounds: Made, one_sum: Made) -> None:
    """The exact check set aside: from what leaves alone the auditor tells who took part."""
    file, agreed = rounds
    small = file.model_copy(update={"privacy": file.privacy.model_copy(update={"epsilon": 0.5, "run_epsilon": 0.5})})  # type: ignore[union-attr]

    def quiet(real: Any, self: Descent, *rest: Any) -> None:
        real(Descent(self.settings, self.noise_std / 100, self.n_ref, self.noise), *rest)

    with mock.patch("secure_fed.clients.canaries.rehearse"):
        with run_of_descent(quiet):
            result = audit_site(small, agreed, canaries=200, guesses=100)
        assert not result.passed, result.report
        with ONE_SUM["noise of another size"]():
            assert audit_site(*one_sum, canaries=100, guesses=20).canaries == 100


def test_the_command_audits_a_site(rounds: Made) -> None:
    site = Path(rounds[0].identity).parent / "site.toml"
    shown = CliRunner().invoke(app, ["audit", "--site", str(site), "--canaries", "60", "--guesses", "20"])
    assert shown.exit_code == 0, shown.exception
    assert "every integer is what the ledger says was paid for" in shown.stdout
    assert "no estimate of epsilon" in shown.stdout
    with an_extra_step_without_noise():
        failed = CliRunner().invoke(app, ["audit", "--site", str(site), "--json"])
    assert isinstance(failed.exception, GuardError)
    both = CliRunner().invoke(app, ["audit", "--site", str(site), "--epsilon", "2"])
    assert both.exit_code == 2
