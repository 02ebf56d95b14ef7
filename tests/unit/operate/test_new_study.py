"""Sites get their keys into a study until its first run begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from secure_fed.core.errors import StudyError
from secure_fed.core.tomlfile import write_toml
from secure_fed.operate.new_study import add_site, check_study, update_size
from secure_fed.privacy.keys import PublicIdentity, create_identity, read_public_identity
from secure_fed.protocol.study import read_study_file, with_fields
from tests.conftest import Federation, make_template


@pytest.fixture
def study(tmp_path: Path) -> Path:
    write_toml(tmp_path / "study.toml", with_fields(make_template(), simulation=None))
    return tmp_path / "study.toml"


def public(folder: Path, name: str) -> PublicIdentity:
    create_identity(folder / name, name)
    return read_public_identity(folder / name / f"{name}.pub")


def test_a_listed_site_keeps_its_role_and_weight(study: Path, tmp_path: Path) -> None:
    before = {site.name: site for site in read_study_file(study).sites}
    identity = public(tmp_path, "dogwood")
    changed = add_site(study, identity, "train", 0.5)
    assert changed == read_study_file(study)
    after = {site.name: site for site in changed.sites}
    assert list(after) == list(before)
    assert after["dogwood"] == before["dogwood"].model_copy(update={"keys": identity.keys})


def test_another_site_is_listed_last_as_told(study: Path, tmp_path: Path) -> None:
    last = add_site(study, public(tmp_path, "elm"), "observer", 0.5).sites[-1]
    assert (last.name, last.role, last.weight) == ("elm", "observer", 0.5)
    content = study.read_bytes()
    with pytest.raises(StudyError, match="elm has keys already"):
        add_site(study, public(tmp_path / "again", "elm"), "observer", 0.5)
    assert study.read_bytes() == content


def test_no_site_is_added_once_a_run_has_begun(federation: Federation, tmp_path: Path) -> None:
    federation.begin(federation.sites())
    path = federation.folder / "study.toml"
    content = path.read_bytes()
    with pytest.raises(StudyError, match=r"a run has begun.*keys rotate --add"):
        add_site(path, public(tmp_path, "elm"), "train", 1.0)
    assert path.read_bytes() == content


def test_a_complete_study_is_checked_with_its_initial_state(federation: Federation) -> None:
    path = federation.folder / "study.toml"
    assert check_study(path).id == federation.agreed.study.id
    tensors = path.with_suffix(".safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(StudyError):
        check_study(path)
    tensors.unlink()
    assert check_study(path).missing() == []


def test_what_an_update_takes_is_told_of_templates_and_studies(federation: Federation, study: Path) -> None:
    small = {"bits": 9, "value_bound": 0.1}
    template = make_template(encoding=small)
    assert update_size(study, template) == (
        "4 values of 9 bits in each coefficient of 51 bits, for 4 sites: 0.40 of float32's bytes"
    )
    assert "without encryption" in update_size(study, make_template(mode="plain"))
    lanes = federation.agreed.lanes
    told = update_size(federation.folder / "study.toml", federation.agreed.study)
    assert told.startswith(f"2 values of 16 bits in each coefficient of {lanes.modulus_bits} bits, for 4 sites: 0.69")
    assert told.endswith(f"; {lanes.payload_bytes:,} bytes for {lanes.values:,} values")


def test_a_study_of_version_0_1_is_refused_with_both_formats(federation: Federation) -> None:
    path = federation.folder / "study.toml"
    path.write_text(path.read_text().replace("format = 2", "format = 1", 1))
    with pytest.raises(StudyError, match=r"a study of format 1.*expected format 2.*secfacmic study new"):
        check_study(path)
