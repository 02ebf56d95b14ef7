"""The study's key is made at one site, and taken by the others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from secure_fed.core.errors import KeyFileError, SiteFileError, StorageError
from secure_fed.operate.study_keys import accept_key, create_key, held_keys, rotate_key
from tests.conftest import Federation, Run, run_round


def site(federation: Federation, name: str) -> Path:
    return federation.folder / "sites" / name / "site.toml"


def test_a_key_is_made_at_the_key_maker_and_taken_elsewhere(federation: Federation, tmp_path: Path) -> None:
    study = federation.folder / "study.toml"
    made = create_key(site(federation, "ash"), study, tmp_path / "key")
    assert held_keys(site(federation, "ash")) == {made.epoch: made}
    assert held_keys(site(federation, "birch")) == {}
    assert accept_key(site(federation, "birch"), tmp_path / "key") == made
    assert held_keys(site(federation, "birch")) == {made.epoch: made}
    with pytest.raises(KeyFileError, match="make the key at ash"):
        create_key(site(federation, "birch"), study, tmp_path / "other")


def test_a_key_that_could_not_be_written_is_not_held_either(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        create_key(site(federation, "ash"), federation.folder / "study.toml", tmp_path / "none" / "key")
    assert held_keys(site(federation, "ash")) == {}


def test_what_is_no_sealed_key_is_refused_by_its_name(federation: Federation, tmp_path: Path, secfacmic: Run) -> None:
    junk = tmp_path / "junk"
    junk.write_text("not a key")
    study, state = federation.folder / "study.toml", federation.folder / "server"
    for words in (
        ("keys", "accept", junk, "--site", site(federation, "birch")),
        ("study", "amend", study, junk, "--state", state),
    ):
        ended = secfacmic(*words)
        assert ended.returncode == KeyFileError.exit_code
        assert f"{junk}: " in ended.stderr


def test_a_key_for_another_study_than_the_sites_is_refused(federation: Federation, tmp_path: Path) -> None:
    other = tmp_path / "other" / "study.toml"
    other.parent.mkdir()
    shutil.copy(federation.folder / "study.safetensors", other.parent)
    text = (federation.folder / "study.toml").read_text()
    other.write_text(text)
    create_key(site(federation, "ash"), other, tmp_path / "key")  # a copy is the same study
    other.write_text(text.replace("round_seconds = 3600.0", "round_seconds = 60.0"))
    with pytest.raises(SiteFileError, match="another than"):
        create_key(site(federation, "ash"), other, tmp_path / "next")


def test_a_rotated_key_follows_the_one_in_force_without_who_leaves(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"no record of a run yet.*rotate then"):
        rotate_key(site(federation, "ash"), federation.folder / "study.toml", tmp_path / "key")
    assert not (tmp_path / "key").exists()
    sites = federation.sites()
    run_round(federation.begin(sites), sites)
    (first,) = held_keys(site(federation, "ash")).values()
    second = rotate_key(site(federation, "ash"), federation.folder / "study.toml", tmp_path / "key", remove=["dogwood"])
    assert (second.epoch, second.previous) == (first.epoch + 1, first.key)
    assert "dogwood" not in second.recipients
