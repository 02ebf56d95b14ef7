"""What a site's people see of its privacy ledger, and copies that can be put back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import SiteFile, SitePrivacy, read_site_file
from secure_fed.core.errors import BudgetError, LedgerError, OutputError
from secure_fed.operate.ledger_copies import (
    export_ledger,
    ledger_facts,
    link_patients,
    restore_ledger,
    tell_apart,
    verify_ledger,
)
from tests.conftest import Federation


@pytest.fixture
def file(federation: Federation) -> SiteFile:
    found = read_site_file(federation.folder / "sites/ash/site.toml")
    return found.model_copy(update={"privacy": SitePrivacy(epsilon=3.0)})


def test_a_site_that_never_spent_has_an_empty_ledger_and_nothing_to_export(file: SiteFile, tmp_path: Path) -> None:
    facts = ledger_facts(file)
    assert (facts["epsilon_spent"], facts["epsilon_budget"], facts["events"]) == (0.0, 3.0, [])
    with pytest.raises(LedgerError, match="no ledger; expected one"):
        export_ledger(file, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_ledger_that_is_not_there_is_not_called_sound(file: SiteFile, federation: Federation) -> None:
    with pytest.raises(LedgerError, match="no ledger; expected one"):
        verify_ledger(file)
    Site(file, federation.agreed)  # begins the ledger
    assert verify_ledger(file) == ledger_facts(file)
    shutil.rmtree(Path(file.identity) / "ledger")
    with pytest.raises(LedgerError, match="or the ledger was lost"):
        verify_ledger(file)


def test_an_export_takes_no_other_files_place(file: SiteFile, federation: Federation, tmp_path: Path) -> None:
    Site(file, federation.agreed)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(OutputError, match="this command did not write it"):
        export_ledger(file, tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"
    for _ in range(2):
        export_ledger(file, tmp_path / "export")


def test_an_export_is_secret_and_is_put_back_as_it_was(file: SiteFile, federation: Federation, tmp_path: Path) -> None:
    Site(file, federation.agreed)  # begins the ledger
    before = ledger_facts(file)
    seq = export_ledger(file, tmp_path / "export")
    assert seq == before["head"]["seq"]
    assert (tmp_path / "export").stat().st_mode & 0o777 == 0o600
    shutil.rmtree(Path(file.identity) / "ledger")
    assert restore_ledger(file, tmp_path / "export") == seq
    assert ledger_facts(file) == before
    with pytest.raises(LedgerError, match=r"none: cannot be read .*; expected a ledger's export"):
        restore_ledger(file, tmp_path / "none")


def test_a_start_that_is_refused_for_its_run_leaves_the_budget_as_it_was(
    file: SiteFile, federation: Federation
) -> None:
    ledger = Path(file.identity) / "ledger"
    asked = file.model_copy(update={"privacy": SitePrivacy(epsilon=1.0, run_epsilon=2.0)})
    with pytest.raises(BudgetError, match="run_epsilon = 2"):
        Site(asked, federation.agreed)
    assert not ledger.exists()
    Site(file, federation.agreed)
    with pytest.raises(BudgetError, match="run_epsilon = 2"):
        Site(asked, federation.agreed)
    assert ledger_facts(file)["epsilon_budget"] == 3.0


@pytest.mark.parametrize("public", [True, False])
def test_the_ledger_of_another_identity_is_not_called_sound(
    file: SiteFile, federation: Federation, tmp_path: Path, public: bool
) -> None:
    other = read_site_file(federation.folder / "sites/birch/site.toml")
    Site(other.model_copy(update={"privacy": SitePrivacy(epsilon=3.0)}), federation.agreed)
    shutil.copytree(Path(other.identity) / "ledger", Path(file.identity) / "ledger")
    if not public:
        (Path(file.identity) / "ash.pub").unlink()
    with pytest.raises(LedgerError, match="a ledger belongs to one identity"):
        ledger_facts(file)
    with pytest.raises(LedgerError, match="a ledger belongs to one identity"):
        export_ledger(file, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    with pytest.raises(LedgerError, match="a ledger belongs to one identity"):
        link_patients(file, "a", "b")
    with pytest.raises(LedgerError, match="a ledger belongs to one identity"):
        tell_apart(file, "a", "b")


def test_an_export_of_another_identity_is_not_put_back(file: SiteFile, federation: Federation, tmp_path: Path) -> None:
    other = read_site_file(federation.folder / "sites/birch/site.toml")
    theirs = other.model_copy(update={"privacy": SitePrivacy(epsilon=3.0)})
    Site(theirs, federation.agreed)
    export_ledger(theirs, tmp_path / "export")
    with pytest.raises(LedgerError, match="expected that of this site's identity"):
        restore_ledger(file, tmp_path / "export")
    assert ledger_facts(file)["events"] == []
