"""A memory of normal images under a budget: one paid release a sum, and none of the histogram."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from secure_fed.clients.acceptance import terms
from secure_fed.clients.data import SiteImage
from secure_fed.clients.flower_app import SiteApp
from secure_fed.clients.flower_node import Way
from secure_fed.clients.masks import lesion_of
from secure_fed.clients.rules import Rules
from secure_fed.clients.sitefile import SiteServer, read_site_file
from secure_fed.core.errors import DataError, EnvelopeError
from secure_fed.operate import anomaly_figures, taking_part
from secure_fed.operate.taking_part import take_part
from secure_fed.privacy.accounting import plan_noise
from secure_fed.privacy.memory_sums import sensitivity
from secure_fed.protocol import memory
from secure_fed.protocol.envelope import MAGIC, MAX_HEADER
from secure_fed.protocol.rounds import ReplyCode
from secure_fed.protocol.signing import split_frame
from tests.conftest import TRAINING, Federation, copy_of, exchange, pass_step, prepare_sites, run_round
from tests.integration.test_anomaly import template
from tests.integration.test_dp_site import begin, ledger_of, set_budget


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    made = template(mode="plain", method={"block": "image"})
    folder = prepare_sites(made, tmp_path_factory.mktemp("private-memory"), images)
    set_budget(folder, "ash", 3.0)
    return folder


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Federation:
    return copy_of(made, tmp_path)


def test_each_sum_is_one_release_and_the_histogram_none(study: Federation) -> None:
    sites = [study.site(name) for name in TRAINING]
    coordinator = begin(study)
    for number in (1, 2):
        run_round(coordinator, sites)
        events = ledger_of(study).summary()["events"]
        assert [event["purpose"].partition(": ")[2] for event in events] == ["sums around centroids"] * number
        # Two sums and one more in case of a crash.
        std = plan_noise(3.0, 1e-5, 3) * sensitivity(study.agreed.initial.adapter)
        assert events[-1]["noise_std"] == pytest.approx(std, rel=1e-6)
    pass_step(coordinator, sites)
    reply = sites[0].respond(coordinator.request(sites[0].name, sites[0].run, sites[0].position))
    assert not any(split_frame(MAGIC, reply.envelope, MAX_HEADER, EnvelopeError).payload)
    coordinator.receive(reply)
    run_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    assert len({site.adapter_digest for site in sites}) == 1
    facts = ledger_of(study).summary()
    assert [event["state"] for event in facts["events"]] == ["sent", "sent"]
    assert 2 < facts["epsilon_spent"] < 3
    adapter = sites[1].parameters
    # A noised mean stays where means of unit vectors are; the other two sites, of which each could subtract itself,
    # send no histogram either.
    assert np.linalg.norm(adapter["score_centroids"], axis=1).max() <= 1 + 1e-6
    assert not adapter[memory.HISTOGRAM].any()


def test_asked_again_it_sends_the_same_and_pays_once(study: Federation) -> None:
    found = []
    coordinator = begin(study)
    for _ in range(2):
        site = study.site("ash")
        request = coordinator.request(site.name, site.run, site.position)
        assert site.respond(request).code == ReplyCode.READY
        found.append(next(site.replica.files.folder.outbox.glob("*.noised")).read_bytes())
        coordinator = study.reopen()
    assert found[0] == found[1]
    assert len(ledger_of(study).events) == 1


def test_what_is_accepted_names_what_leaves_with_a_budget_and_without(study: Federation) -> None:
    with_budget, exact = (
        terms(read_site_file(study.folder / "sites" / name / "site.toml"), study.agreed)["leaves"]
        for name in ("ash", "birch")
    )
    assert not with_budget["validation_counts"]
    assert "zeros" in with_budget["statistics"][1]
    assert "histogram of the largest scores" in exact["statistics"][1]
    assert any("stays where it was" in line for line in exact["statistics"])
    assert not any("number of patients" in line for line in with_budget["statistics"])


@pytest.mark.parametrize("name", ["ash", "birch"])
def test_a_mask_that_is_gone_does_not_end_a_run_under_a_budget(
    study: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Whether a site goes on would else tell of one patient."""
    file = read_site_file(study.folder / "sites" / name / "site.toml")
    server = SiteServer(address="127.0.0.1:1", authority="ca.crt")
    masked = []

    def a_round(app: SiteApp, way: Way) -> None:
        coordinator = study.open_run()
        sites = [app.site, *(study.site(other) for other in TRAINING if other != name)]
        run_round(coordinator, sites)
        exchange(coordinator, app.site)
        masked.append(app.site.test_sources()[0].path)
        app.after_reply(taken=True)

    monkeypatch.setattr(taking_part, "run_site", a_round)
    monkeypatch.setattr(taking_part, "reply_seconds", lambda *rest: 0.01)

    def gone(image: SiteImage, rules: Rules) -> NDArray[np.bool_] | None:
        return lesion_of(replace(image, mask=Path("gone.png")) if image.path in masked else image, rules)

    monkeypatch.setattr(anomaly_figures, "lesion_of", gone)
    if name == "birch":
        with pytest.raises(DataError, match="no mask that can be read"):
            take_part(file.model_copy(update={"server": server}), in_full=True)
        return
    with caplog.at_level("INFO"):
        take_part(file.model_copy(update={"server": server}))
    (told,) = [line for line in caplog.messages if "no figures of round 1" in line]
    assert "for its own eyes" in told
    assert (Path(file.state) / "adapter.safetensors").is_file()  # the round's adapter is there all the same
