"""A site agrees to a study before anything leaves it, sees what changed, and destroys its keys at the end."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secure_fed.cli import app, main
from secure_fed.clients.acceptance import (
    HEADER_WORDS,
    REPLY_WORDS,
    check_acceptance,
    record_acceptance,
    require_acceptance,
    terms,
    weaker,
)
from secure_fed.clients.sitefile import SitePrivacy, read_site_file
from secure_fed.core.errors import (
    CertificateError,
    KeyFileError,
    NotAcceptedError,
    StorageError,
    StudyClosedError,
    StudyError,
)
from secure_fed.core.storage import exclusive
from secure_fed.operate.closing import close_site, refuse_closed
from secure_fed.privacy.keys import create_sealed_key, load_identity
from secure_fed.privacy.ledger import Account, Ledger
from secure_fed.protocol.envelope import EnvelopeHeader
from secure_fed.protocol.packing import wire
from secure_fed.protocol.rounds import RoundReply
from secure_fed.protocol.study import load_study, read_study_file
from tests.conftest import Federation, run_round, send_envelopes


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def site_toml(federation: Federation, name: str = "ash") -> Path:
    return federation.folder / "sites" / name / "site.toml"


def forget(federation: Federation, name: str = "ash") -> None:
    shutil.rmtree(site_toml(federation, name).parent / "state" / "accepted")


def test_every_field_that_leaves_has_its_words() -> None:
    """A field added to a reply or an update's header must be told to those who accept."""
    assert set(REPLY_WORDS) == {field.name for field in fields(RoundReply)}
    assert set(HEADER_WORDS) == set(EnvelopeHeader.model_fields)


def test_it_shows_what_leaves_and_records_who_accepted(federation: Federation) -> None:
    forget(federation)
    study = federation.folder / "study.toml"
    code, text = call("site", "accept", study, "--site", site_toml(federation), "--by", "Dr. Ada")
    assert code == 0
    agreed = federation.agreed
    assert agreed.study.id in text
    for name, words in (HEADER_WORDS | REPLY_WORDS).items():
        # Of pads only where there are some.
        assert (words in text) == (name not in ("hidden", "carried")), name
    assert f"{wire('he', agreed.lanes).payload_bytes} bytes each" in text
    assert "3 updates" in text
    for name in ("ash", "birch", "cedar", "dogwood"):
        assert name in text
    assert "budget: none" in text
    assert "accepted by Dr. Ada" in text
    file = read_site_file(site_toml(federation))
    identity = load_identity(Path(file.identity), "ash")
    note = require_acceptance(file, agreed, identity.keys.signing)
    assert (note.by, note.site, note.study) == ("Dr. Ada", "ash", agreed.study.id)


def test_the_sizes_shown_are_those_of_what_leaves(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    reply = send_envelopes(coordinator, sites)[0]
    _, shown = CliRunner(), json.loads(
        CliRunner()
        .invoke(
            app,
            ["site", "accept", str(federation.folder / "study.toml"), "--site", str(site_toml(federation)),
             "--by", "x", "--json"],
        )
        .stdout
    )  # fmt: skip
    leaves = shown["leaves"]
    around = len(reply.envelope) - leaves["update_bytes"]
    assert 0 < around <= leaves["update_header_bytes"]


def test_a_budget_is_shown(federation: Federation) -> None:
    study = federation.folder / "study.toml"
    _, text = call("site", "accept", study, "--site", site_toml(federation), "--by", "Ada", "--epsilon", "3")
    assert "(3, 1e-05)-differentially private for each image" in text


def test_nobody_named_nothing_recorded(federation: Federation) -> None:
    forget(federation)
    with pytest.raises(NotAcceptedError, match=r"nothing was recorded.*--by NAME"):
        call("site", "accept", federation.folder / "study.toml", "--site", site_toml(federation))
    assert not (site_toml(federation).parent / "state" / "accepted").exists()


def run_client(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> int:
    """The client's own entry point, up to where it would connect."""
    import secure_fed.operate.taking_part

    def connected(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(secure_fed.operate.taking_part, "run_site", connected)
    monkeypatch.setattr(sys, "argv", ["secfacmic", "client", "--site", str(site_toml(federation))])
    path = site_toml(federation)
    if "[server]" not in path.read_text():
        path.write_text(path.read_text() + '\n[server]\naddress = "127.0.0.1:1"\nauthority = "ca.crt"\n')
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_client_refuses_what_was_not_accepted_and_what_was_changed(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_client(federation, monkeypatch) == 130  # accepted: it gets as far as connecting
    # The coordinator sends a changed study.
    path = federation.folder / "study.toml"
    path.write_text(path.read_text().replace("round_seconds = 3600.0", "round_seconds = 60.0"))
    capfd.readouterr()
    assert run_client(federation, monkeypatch) == NotAcceptedError.exit_code
    said = " ".join(capfd.readouterr().err.split())
    assert f"accepted was {federation.agreed.study.id}" in said
    command = said.split("study diff ")[1].split(";")[0].split()
    code, shown = call("study", "diff", *command)
    assert code == 0
    assert "round_seconds" in shown
    assert "3600.0" in shown
    assert call("site", "accept", path, "--site", site_toml(federation), "--by", "Ada")[0] == 0
    assert run_client(federation, monkeypatch) == 130
    forget(federation)
    assert run_client(federation, monkeypatch) == NotAcceptedError.exit_code
    assert "site accept" in capfd.readouterr().err


def test_a_forged_or_damaged_note_counts_for_nothing(federation: Federation) -> None:
    file = read_site_file(site_toml(federation))
    identity = load_identity(Path(file.identity), "ash")
    (note,) = (Path(file.state) / "accepted").glob("*.signed")
    data = note.read_bytes()
    assert check_acceptance(data, identity.keys.signing)[0].by == "simulation"
    for place in (0, 20, 100, len(data) - 1):
        note.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(NotAcceptedError):
            require_acceptance(file, federation.agreed, identity.keys.signing)
    # Another site's note does not do.
    (other,) = (site_toml(federation, "birch").parent / "state" / "accepted").glob("*.signed")
    note.write_bytes(other.read_bytes())
    with pytest.raises(NotAcceptedError, match="not by the key"):
        require_acceptance(file, federation.agreed, identity.keys.signing)


def test_what_simulates_accepts_by_itself(federation: Federation) -> None:
    for member in federation.agreed.study.sites:
        file = read_site_file(site_toml(federation, member.name))
        assert require_acceptance(file, federation.agreed, member.keys.signing).by == "simulation"


def test_diff_names_every_change_and_no_other(federation: Federation, tmp_path: Path) -> None:
    first = federation.folder / "study.toml"
    second = tmp_path / "second.toml"
    second.write_text(
        first.read_text()
        .replace("rounds = 3", "rounds = 5")
        .replace('"a striped image"', '"an image with stripes"')
        .replace("learning_rate = 0.003", "learning_rate = 0.001")
    )
    shown = json.loads(CliRunner().invoke(app, ["study", "diff", str(first), str(second), "--json"]).stdout)
    assert (shown["before"], shown["after"]) == (read_study_file(first).id, read_study_file(second).id)
    assert {row["field"]: (row["before"], row["after"]) for row in shown["changes"]} == {
        "rounds": (3, 5),
        "training.learning_rate": (0.003, 0.001),
        "classes.striped.prompts": (
            ["a striped image", "a picture that is striped"],
            ["an image with stripes", "a picture that is striped"],
        ),
    }
    same = json.loads(CliRunner().invoke(app, ["study", "diff", str(first), str(first), "--json"]).stdout)
    assert same["same"] is True
    assert same["changes"] == []


# --- the end ---


def finish_study(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    for _ in range(3):
        run_round(coordinator, sites)
    for site in sites:
        site.respond(coordinator.request(site.name, site.run, site.position))


def test_closing_destroys_keys_and_outboxes_and_names_the_rest(federation: Federation) -> None:
    finish_study(federation)
    state = site_toml(federation).parent / "state"
    study = federation.folder / "study.toml"
    (sealed,) = (state / "keys").glob("*.sealed")
    secret, inode = sealed.read_bytes(), os.open(sealed, os.O_RDONLY)
    assert list(state.glob("runs/*/outbox/*"))
    result = CliRunner().invoke(app, ["study", "close", str(study), "--site", str(site_toml(federation)), "--json"])
    done = json.loads(result.stdout)
    assert done["rounds"] == 3
    assert done["destroyed"] == {
        "sealed keys": 1,
        "integers and envelopes in the outbox": 2,  # of the last round, whose record a void may still take back
        "keys and masks of rounds, and words in them": 1,
        "snapshots of the data of its runs": 0,
    }
    assert not list((state / "keys").iterdir())
    assert not list(state.glob("runs/*/outbox/*"))
    # The bytes themselves were overwritten before the name went.
    assert os.pread(inode, len(secret), 0) == bytes(len(secret))
    os.close(inode)
    # Everything that is still there is named, and nothing else.
    left = {path.name for path in state.iterdir()} - {"keys", "closed", "format", "lock", "run"}
    named = {Path(name).name for name in done["remains"]} - {"identity"}
    assert left - {"ledger_heads.json"} == named
    assert "identity" in {Path(name).name for name in done["remains"]}
    with pytest.raises(StudyClosedError, match="keys and outbox are destroyed"):
        refuse_closed(state)
    with pytest.raises(KeyFileError):
        federation.site("ash").replica.keys.secret(federation.site("ash").replica.state.chain.key)
    # Once more, with the identity: a copy of the sealed key that somebody kept opens no more.
    again = CliRunner().invoke(
        app, ["study", "close", str(study), "--site", str(site_toml(federation)), "--identity", "--json"]
    )
    assert json.loads(again.stdout)["destroyed"]["private keys of the site"] == 3
    with pytest.raises(KeyFileError):
        load_identity(state.parent / "identity", "ash")


def test_the_server_closes_and_can_sign_nothing_any_more(federation: Federation) -> None:
    finish_study(federation)
    state = federation.folder / "server"
    code, text = call("study", "close", federation.folder / "study.toml", "--state", state)
    assert code == 0
    assert "destroyed: 1 files, the coordinator's signing key" in text
    assert not (state / "coordinator.key").exists()
    assert list(state.glob("runs/*/journal/*.record"))
    with pytest.raises(StudyClosedError):
        call("server", "--study", federation.folder / "study.toml", "--mode", "he", "--state", state)


def test_a_study_that_is_not_over_is_closed_on_purpose_only(federation: Federation) -> None:
    sites = federation.sites()
    run_round(federation.begin(sites), sites)
    study, site = federation.folder / "study.toml", site_toml(federation)
    with pytest.raises(StudyError, match=r"round 0 of 3.*--abandon"):
        call("study", "close", study, "--site", site)
    assert list((site.parent / "state" / "keys").glob("*.sealed"))
    assert call("study", "close", study, "--site", site, "--abandon")[0] == 0
    assert not list((site.parent / "state" / "keys").glob("*.sealed"))


def test_a_running_study_is_not_closed(federation: Federation) -> None:
    state = site_toml(federation).parent / "state"
    with exclusive(state), pytest.raises(StorageError, match="another process"):
        call("study", "close", federation.folder / "study.toml", "--site", site_toml(federation), "--abandon")


def test_closing_that_was_killed_is_closed_and_goes_on(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = federation.sites()
    federation.begin(sites)
    state = site_toml(federation).parent / "state"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            close_site(state, state.parent / "identity", federation.agreed, abandon=True, destroy_identity=False)
    with pytest.raises(StudyClosedError):
        refuse_closed(state)
    done = close_site(state, state.parent / "identity", federation.agreed, abandon=True, destroy_identity=False)
    assert done.destroyed["sealed keys"] == 1


# --- certificates and site.toml ---


def test_a_hospitals_own_certificate_is_tried_before_it_is_taken(tmp_path: Path) -> None:
    assert call("study", "ca", "--host", "fl.example.org", "--host", "192.0.2.7", "--out", tmp_path / "pki")[0] == 0
    pki = tmp_path / "pki"
    own = ("--cert", pki / "server.crt", "--key", pki / "server.key", "--authority", pki / "ca.crt")
    code, text = call("study", "ca", "--host", "fl.example.org", "--out", tmp_path / "tls", *own)
    assert code == 0
    assert "valid until" in text
    assert {path.name for path in (tmp_path / "tls").iterdir()} == {"ca.crt", "server.crt", "server.key"}
    assert (tmp_path / "tls" / "server.key").stat().st_mode & 0o777 == 0o600
    # All that is wrong at once, and nothing written.
    hosts = ("--host", "other.example.org", "--host", "192.0.2.8", "--host", "192.0.2.7")
    with pytest.raises(CertificateError, match=r"(?s)other\.example\.org.*mismatch.*192\.0\.2\.8") as refused:
        call("study", "ca", *hosts, "--out", tmp_path / "no", *own)
    assert "192.0.2.7" not in str(refused.value)
    call("study", "ca", "--host", "fl.example.org", "--out", tmp_path / "foreign")
    foreign = tmp_path / "foreign"
    with pytest.raises(CertificateError, match=r"(?s)sites would refuse it.*fl\.example\.org"):
        call("study", "ca", "--host", "fl.example.org", "--out", tmp_path / "no", *own[:5], foreign / "ca.crt")
    mixed = ("--cert", pki / "server.crt", "--key", foreign / "server.key", "--authority", pki / "ca.crt")
    with pytest.raises(CertificateError, match="not a certificate and its key"):
        call("study", "ca", "--host", "fl.example.org", "--out", tmp_path / "no", *mixed)
    assert not (tmp_path / "no").exists()


def test_a_new_site_has_a_site_toml_that_fits_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("site", "init", "ash", "--data", "images", "--server", "fl.example.org:8443")
    code, text = call(*arguments)
    assert code == 0
    assert "identity/ash.pub" in text
    file = read_site_file(Path("site.toml"))
    assert (file.site, file.data.kind, file.data.unit) == ("ash", "patients", "patient")
    assert file.server is not None
    assert Path(file.server.authority) == tmp_path / "study" / "ca.crt"
    assert load_identity(Path(file.identity), "ash").name == "ash"
    before = Path("site.toml").read_bytes()
    assert CliRunner().invoke(app, [*arguments]).exit_code != 0
    assert Path("site.toml").read_bytes() == before
    for lost in ("site.toml", "identity/ash.pub"):  # as after a call that was killed
        Path("site.toml").unlink()
        Path(lost).unlink(missing_ok=True)
        code, text = call(*arguments)
        assert (code, "the keys of ash were there, and are kept" in text) == (0, True)
        assert Path("site.toml").read_bytes() == before
        assert Path("identity/ash.pub").exists()


def test_an_amendment_needs_no_new_acceptance(federation: Federation) -> None:
    """Members and keys change by amendments, which have a policy of their own; the study and its digest stay."""
    sites = federation.sites()
    coordinator = federation.begin(sites)
    key = coordinator.journal.chain.key
    identity = load_identity(federation.folder / "sites" / "ash" / "identity", "ash")
    sealed = create_sealed_key(federation.agreed, identity, 2, key, removed=("dogwood",))
    for site in sites:
        site.respond(coordinator.request(site.name, site.run, site.position))
    coordinator.amend(sealed)
    file = read_site_file(site_toml(federation))
    assert require_acceptance(file, load_study(federation.folder / "study.toml"), identity.keys.signing)


# --- what was accepted binds ---


def accept(federation: Federation, *options: object) -> None:
    study, site = federation.folder / "study.toml", site_toml(federation)
    assert call("site", "accept", study, "--site", site, "--by", "Ada", *options)[0] == 0


def check(federation: Federation, **changes: object) -> None:
    file = read_site_file(site_toml(federation)).model_copy(update=changes)
    key = load_identity(Path(file.identity), "ash").keys.signing
    require_acceptance(file, federation.agreed, key)


def test_a_start_under_weaker_terms_is_refused_with_both_values(federation: Federation) -> None:
    file = read_site_file(site_toml(federation))
    strict = {
        "privacy": SitePrivacy(epsilon=1, delta=1e-6),
        "max_epsilon": 2.0,
        "studies": ("small",),
        "amendments": "none",
        "min_sites": 4,
        "data": file.data.model_copy(update={"kind": "patients", "unit": "patient"}),
    }
    strict_file = file.model_copy(update=strict)
    record_acceptance(strict_file, federation.agreed, load_identity(Path(file.identity), "ash"), "Ada")
    check(federation, **strict)
    weaker = {
        "privacy": [
            (None, r'budget: accepted .*"epsilon": 1\.0.*now null'),
            (SitePrivacy(epsilon=8, delta=1e-6), r'budget: accepted .*"epsilon": 1\.0.*now .*"epsilon": 8\.0'),
            (SitePrivacy(epsilon=1, delta=1e-5), "1e-05"),
        ],
        "allow_plain": [(True, r"policy\.allow_plain: accepted false, now true")],
        "max_epsilon": [(None, r"policy\.max_epsilon: accepted 2\.0, now null"), (3.0, "now 3.0")],
        "studies": [((), r'policy\.studies: accepted \["small"\], now \[\]'), (("small", "other"), "other")],
        "amendments": [("removals", "none"), ("all", r'policy\.amendments: accepted "none", now "all"')],
        "min_sites": [(3, r"policy\.min_sites: accepted 4, now 3")],
        "data": [(file.data.model_copy(update={"kind": "public", "unit": "patient"}), r"data\.kind"),
                 (file.data.model_copy(update={"kind": "patients", "unit": "image"}), r"data\.unit")],
    }  # fmt: skip
    for name, values in weaker.items():
        for value, said in values:
            with pytest.raises(NotAcceptedError, match=said) as refused:
                check(federation, **strict | {name: value})
            assert "than Ada accepted at 20" in str(refused.value)
            assert "site accept" in str(refused.value)


def test_stricter_terms_need_no_new_word(federation: Federation) -> None:
    accept(federation, "--epsilon", 3)
    check(federation, privacy=SitePrivacy(epsilon=2, delta=1e-6), max_epsilon=2.5, amendments="none", min_sites=4)
    check(federation, privacy=SitePrivacy(epsilon=3), studies=("small",))


def test_what_was_accepted_with_a_budget_does_not_start_without_one(federation: Federation) -> None:
    """Given on the command line, it is in no file: forgotten at the start, the site would train without any."""
    accept(federation, "--epsilon", 3)
    with pytest.raises(NotAcceptedError, match="now null"):
        check(federation)
    Ledger.create(
        site_toml(federation).parent / "identity" / "ledger", Account("ash", "1" * 64, "image", "simulated", 3.0, 1e-5)
    )
    check(federation)  # a ledger remembers it


def test_a_second_acceptance_is_kept_beside_the_first_and_the_last_holds(federation: Federation) -> None:
    folder = site_toml(federation).parent / "state" / "accepted"
    accept(federation, "--epsilon", 1)
    before = {path: path.read_bytes() for path in folder.glob("*.signed")}
    accept(federation, "--epsilon", 8)
    check(federation, privacy=SitePrivacy(epsilon=8))
    assert all(path.read_bytes() == data for path, data in before.items())
    assert len(list(folder.glob("*.signed"))) == len(before) + 1 == 3
    sorted(folder.glob("*.signed"))[1].unlink()
    with pytest.raises(NotAcceptedError, match="or one is missing"):
        check(federation, privacy=SitePrivacy(epsilon=1))


def test_more_that_leaves_than_was_accepted_asks_for_a_new_word(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = terms(read_site_file(site_toml(federation)), federation.agreed)
    more = json.loads(json.dumps(shown))
    more["leaves"]["reply_fields"]["loss"] = "of its training"
    assert weaker(shown, more)[0].startswith("leaves.reply_fields")
    assert weaker(more, shown) == []
    del shown["quorum"]
    assert weaker(shown, more)[0] == f"quorum.needed: accepted nothing, now {more['quorum']['needed']}"
