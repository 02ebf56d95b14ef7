"""Runs of a study: a key opens one for ever, each has its own draws, and the second asks for each site's word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from typer.testing import CliRunner

from secure_fed.cli import app
from secure_fed.clients.keyring import KeyRing
from secure_fed.clients.private_round import ledger_folder
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.errors import KeyFileError, NotAcceptedError, RecordError, StudyError
from secure_fed.lab.simulation import accept_another_run, run_id
from secure_fed.privacy.ledger import Ledger
from secure_fed.protocol.rounds import ReplyCode
from secure_fed.server.coordinator import Coordinator
from secure_fed.server.supervisor import ServerFolders, _begin_if_asked
from tests.conftest import TRAINING, Federation, exchange
from tests.integration.test_dp_site import make_private
from tests.integration.test_rotation import drive, rotate


def another(federation: Federation, key: str, number: int = 7) -> Coordinator:
    """A run that the server opens alone, under any key it has seen."""
    run = run_id(federation.agreed.study, number)
    return Coordinator.begin(federation.agreed, federation.folder / "server", federation.signing, key, run=run)


def stored_integers(site: Site) -> np.ndarray:
    path = site.replica.files.folder.all_integers()[-1]  # before them those of the round before
    return safetensors.numpy.load(path.read_bytes())["integers"]


def test_a_key_that_came_by_rotation_opens_no_second_run(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    rotate(federation, coordinator)
    drive(coordinator, sites)
    key = coordinator.journal.chain.key
    accept_another_run(federation.agreed, federation.folder)  # their people expect a second run
    second = another(federation, key)
    for site in sites:
        with pytest.raises(RecordError, match="never goes back to an older key"):
            site.respond(second.request(site.name, "", 0))
        assert site.run == coordinator.run


def test_a_key_that_replaces_another_begins_no_run_before_its_amendment_either(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    for site in sites:
        exchange(coordinator, site)
    sealed = rotate(federation, coordinator)
    key = sites[0].replica.keys.accept(sealed).key  # by hand
    accept_another_run(federation.agreed, federation.folder)
    second = another(federation, key)
    with pytest.raises(RecordError, match="never goes back to an older key"):
        sites[0].respond(second.request(sites[0].name, "", 0))


def test_the_server_begins_no_run_with_a_key_that_replaces_another(federation: Federation, tmp_path: Path) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    (tmp_path / "rotated.key").write_bytes(rotate(federation, coordinator))
    folders = ServerFolders(federation.folder / "study.toml", federation.folder / "server")
    with pytest.raises(StudyError, match=r"replaces key .* secfacmic keys create"):
        _begin_if_asked(federation.agreed, folders, tmp_path / "rotated.key")


def test_a_second_run_needs_each_sites_word(federation: Federation) -> None:
    sites = federation.sites()
    drive(federation.begin(sites), sites)
    sealed = federation.seal_key(2)
    (key,) = {site.replica.keys.accept(sealed).key for site in sites}
    second = another(federation, key)
    ash = sites[0]
    before = stored_integers(ash)
    with pytest.raises(NotAcceptedError, match=r"taken part in 1 .* and 1 accepted.*--again"):
        ash.respond(second.request(ash.name, ash.run, ash.position))
    assert ash.run != second.run
    assert np.array_equal(stored_integers(ash), before)
    file = federation.folder / "sites" / "ash" / "site.toml"
    command = ["site", "accept", str(federation.folder / "study.toml"), "--site", str(file), "--by", "Dr. Ada"]
    CliRunner().invoke(app, command, catch_exceptions=False)  # the terms once more are no word for another run
    with pytest.raises(NotAcceptedError):
        ash.respond(second.request(ash.name, ash.run, ash.position))
    said = CliRunner().invoke(app, [*command, "--again"], catch_exceptions=False).output
    assert "a further run of a study" in said
    assert "for 2 runs of it in all" in " ".join(said.split())
    assert exchange(second, ash).code == ReplyCode.READY
    assert ash.run == second.run
    assert len(list((file.parent / "state" / "accepted").glob("*.signed"))) == 3
    third_key = ash.replica.keys.accept(federation.seal_key(3)).key
    third = another(federation, third_key, 8)
    with pytest.raises(NotAcceptedError, match="taken part in 2"):
        ash.respond(third.request(ash.name, ash.run, ash.position))


def test_there_is_no_again_before_the_first_run(federation: Federation) -> None:
    file = federation.folder / "sites" / "ash" / "site.toml"
    command = ["site", "accept", str(federation.folder / "study.toml"), "--site", str(file), "--by", "x", "--again"]
    with pytest.raises(NotAcceptedError, match="no run of it yet"):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_a_second_run_repeats_no_update_and_the_same_run_id_does(federation: Federation) -> None:
    """Else the difference of two sums of different sites would be one site's update, bit for bit."""
    sites = federation.sites()
    found = {}
    for number in (7, 8):
        sealed = federation.seal_key(sites[0].replica.keys.newest[0] + 1)
        (key,) = {site.replica.keys.accept(sealed).key for site in sites}
        accept_another_run(federation.agreed, federation.folder)
        coordinator = another(federation, key, number)
        exchange(coordinator, sites[0])
        found[number] = stored_integers(sites[0])
    agreement = np.corrcoef(found[7], found[8])[0, 1]
    assert not np.array_equal(found[7], found[8])
    assert agreement < 0.999  # not in the rounding alone: other mini-batches


def test_who_cannot_seal_reads_no_data_and_spends_no_budget(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A genesis under a key that nobody holds cost a round's budget, since the site sealed last."""
    federation = make_private(tmp_path / "out", images, mode="he", rounds=3)
    sites = [federation.site(name) for name in TRAINING]
    coordinator = federation.begin(sites)
    rotate(federation, coordinator)
    drive(coordinator, sites)
    ash = sites[0]
    ledger = ledger_folder(read_site_file(federation.folder / "sites" / "ash" / "site.toml"))
    spent = Ledger(ledger).summary()["epsilon_spent"]
    assert spent > 0
    accept_another_run(federation.agreed, federation.folder)
    bogus = another(federation, "9" * 64)
    with pytest.raises(RecordError, match=r"is another run's; take this run's sealed key file first"):
        ash.respond(bogus.request("ash", "", 0))
    # Nor would it where the genesis is let in, as for a site that joins late and lacks the first key.
    monkeypatch.setattr(KeyRing, "may_begin", lambda *_: True)
    monkeypatch.setattr(type(ash.replica), "_run_of", lambda *_, **__: None)
    monkeypatch.setattr(Site, "features", lambda *_: pytest.fail("data were read"))
    with pytest.raises(KeyFileError, match="is not here"):
        ash.respond(bogus.request("ash", "", 0))
    assert Ledger(ledger).summary()["epsilon_spent"] == spent
