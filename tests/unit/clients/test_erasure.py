"""``data forget``: caches, outboxes and later rounds lose a patient, and the state folder never names one."""

import sqlite3
import sys

import numpy as np
import pytest
from PIL import Image

from secure_fed.cli import main
from secure_fed.clients.erasure import forget
from secure_fed.clients.forgotten import Forgotten
from secure_fed.clients.images import compared_images, present_images, site_images
from secure_fed.clients.patients import by_writing, similar
from secure_fed.clients.reading import identity
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.errors import ForgottenError, ManifestError, UnknownPatientError
from secure_fed.core.tomlfile import write_toml
from secure_fed.privacy.ledger import Ledger
from secure_fed.protocol.rounds import ReplyCode
from tests.conftest import TRAINING, close_round, exchange, pass_step, run_round, send_envelopes

PATIENT = "MRN-4711-mueller"


def picture(seed):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
    return small.resize((32, 32), Image.Resampling.BICUBIC)


def fill(folder, patient=PATIENT, without=()):
    """Eight patients of two images; the first has the id that is to go."""
    folder.mkdir(exist_ok=True)
    rows = ["path,patient,label,split"]
    for number in range(8):
        owner = patient if number == 0 else f"other-{number}"
        if owner in without:
            continue
        for slice_ in range(2):
            picture(10 * number + slice_).save(folder / f"{number}-{slice_}.png")
            rows.append(
                f"{number}-{slice_}.png,{owner},{('dark', 'light')[number % 2]},{'train' if number < 6 else 'val'}"
            )
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture
def hospital(federation, tmp_path):
    """Site ash with patients, in a run; the path of its site.toml and its data folder."""
    path, folder = federation.folder / "sites" / "ash" / "site.toml", tmp_path / "hospital"
    fill(folder)
    file = read_site_file(path)
    data = file.data.model_copy(update={"folder": str(folder), "unit": "patient"})
    write_toml(path, file.model_copy(update={"data": data}))
    return path, folder


def state_bytes(federation):
    state = federation.folder / "sites" / "ash" / "state"
    return {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}


def forget_now(federation, path):
    return forget(read_site_file(path), federation.agreed, PATIENT)


def cached(federation):
    cache = federation.folder / "sites" / "ash" / "state" / "features.sqlite"
    return {row[0] for row in sqlite3.connect(cache).execute("SELECT image FROM features")}


def test_a_forgotten_patient_leaves_cache_training_and_every_trace(federation, hospital, monkeypatch, capsys):
    path, folder = hospital
    theirs = {identity((folder / f"0-{slice_}.png").read_bytes(), None) for slice_ in range(2)}
    before = federation.site("ash").features()
    assert PATIENT in before.patients["train"]
    assert theirs <= cached(federation)
    rows = [
        before.train.x[i].astype("<f4").tobytes() for i, one in enumerate(before.patients["train"]) if one == PATIENT
    ]
    monkeypatch.setattr(sys, "argv", ["secfacmic", "data", "forget", PATIENT, "--site", str(path)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert "2 images in the data folder" in capsys.readouterr().out
    assert not theirs & cached(federation)
    after = federation.site("ash").features()
    assert (after.encoded, after.unreadable) == (0, 0)
    kept = [i for i, one in enumerate(before.patients["train"]) if one != PATIENT]
    assert np.array_equal(after.train.x, before.train.x[kept])
    assert after.patients["train"] == tuple(before.patients["train"][i] for i in kept)
    assert after.patients["val"] == before.patients["val"]
    for file, content in state_bytes(federation).items():
        assert PATIENT.encode() not in content, file
        assert not any(row in content for row in rows), file  # overwritten, not only unlinked


def test_no_export_brings_a_forgotten_patient_back(federation, hospital):
    path, folder = hospital
    federation.site("ash").features()
    forget_now(federation, path)
    for renamed in (PATIENT, "new-pseudonym"):
        fill(folder, patient=renamed)
        found = federation.site("ash").features()
        assert renamed not in found.patients["train"]
        assert len(found.train.y) == 10
    (folder / "0-0.png").write_bytes((folder / "1-0.png").read_bytes())  # a picture that another patient has too
    assert len(federation.site("ash").features().train.y) == 11


def test_a_forgotten_patient_does_not_come_back_in_another_writing(federation, hospital):
    path, folder = hospital
    federation.site("ash").features()
    forget_now(federation, path)
    for slice_ in range(2):
        picture(900 + slice_).save(folder / f"0-{slice_}.png")  # other files, so that the id alone can tell
    rows = (folder / "manifest.csv").read_text()
    for writing in (
        *(PATIENT.upper(), PATIENT.replace("4711", "004711"), PATIENT.replace("-", "\u2013")),
        *(PATIENT.replace("-", ""), PATIENT.replace("-", ".")),
    ):
        (folder / "manifest.csv").write_text(rows.replace(PATIENT, writing))
        found, _ = compared_images(read_site_file(path), federation.agreed)
        assert len(found.images) == 14
        assert any("1 ids are left out, as they may be other writings" in line for line in found.notes.told)
        assert len(present_images(read_site_file(path), federation.agreed)) == 14
        assert writing not in str(found.notes.told)
    (folder / "patients.csv").write_text(f"id,same_as\n{writing},\n")  # whom people know to be somebody else
    assert len(site_images(read_site_file(path), federation.agreed)) == 16


def test_all_writings_of_a_patient_that_are_there_are_forgotten_together(federation, hospital):
    path, folder = hospital
    manifest = folder / "manifest.csv"
    rows = manifest.read_text().replace("2-0.png,other-2", f"2-0.png,{PATIENT.upper()}")
    manifest.write_text(rows.replace("2-1.png,other-2", f"2-1.png,{PATIENT.upper()}"))
    (folder / "patients.csv").write_text(f"id,same_as\n{PATIENT.upper()},\n")
    assert forget_now(federation, path).images == 2
    (folder / "patients.csv").unlink()
    assert forget_now(federation, path).images == 4
    assert len(site_images(read_site_file(path), federation.agreed)) == 12


def test_where_an_image_is_a_patient_another_path_is_another_image(tmp_path):
    forgotten = Forgotten(tmp_path)
    forgotten.add("a/1.png", [])
    assert not Forgotten(tmp_path).written_otherwise("A/01.png")
    forgotten.add("p3", [], in_any_writing=True)
    assert Forgotten(tmp_path).written_otherwise("P03")


def test_files_that_are_gone_already_are_forgotten_too(federation, hospital):
    path, folder = hospital
    federation.site("ash").features()
    theirs = {identity((folder / f"0-{slice_}.png").read_bytes(), None) for slice_ in range(2)}
    for slice_ in range(2):
        (folder / f"0-{slice_}.png").unlink()
    done = forget_now(federation, path)  # the manifest names files that are not there: the whole cache goes
    assert "no such file" in done.unread
    assert not cached(federation)
    fill(folder, without=(PATIENT,))
    federation.site("ash").features()
    assert not theirs & cached(federation)
    fill(folder)
    assert PATIENT not in federation.site("ash").features().patients["train"]


def outbox(federation):
    (run,) = (federation.folder / "sites" / "ash" / "state" / "runs").iterdir()
    return run / "outbox"


def test_a_pending_update_is_dropped_and_made_anew_for_another_attempt_only(federation, hospital):
    path, _ = hospital
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    ash, others = federation.site("ash"), [site for site in sites if site.name != "ash"]
    pass_step(coordinator, [ash, *others])
    first = exchange(coordinator, ash)  # sent, taken by the server
    assert first.code == ReplyCode.UPDATE
    stored = (outbox(federation) / "00000002.integers").read_bytes()
    done = forget_now(federation, path)
    assert [text.split(", ")[1] for text in done.rounds] == ["round 1", "round 2"]  # a void may bring the first back
    assert not (outbox(federation) / "00000002.integers").exists()
    assert (outbox(federation) / "00000002.envelope").exists()  # the server has it: until there is another attempt
    # A second, different update for one attempt would let the server subtract the two.
    ash = federation.site("ash")
    assert exchange(coordinator, ash).code == ReplyCode.APPLIED
    assert coordinator.fail([]) is True  # another attempt
    anew = federation.site("ash")
    assert exchange(coordinator, anew).code == ReplyCode.READY
    assert (outbox(federation) / "00000002.integers").read_bytes() != stored
    assert not list(outbox(federation).glob("*.withdrawn"))
    assert not list(outbox(federation).glob("*.envelope"))
    for site in others:
        exchange(coordinator, site)
    close_round(coordinator, [anew, *others])
    run_round(coordinator, [federation.site(name) for name in (*TRAINING, "dogwood")])  # and the study goes on


def test_a_round_that_is_given_up_after_an_update_was_dropped_begins_anew_with_another(federation, hospital):
    """Its attempts begin anew too: the first at the new head is none of those for which the update had been sent."""
    path, _ = hospital
    sites = federation.sites()[:3]
    coordinator = federation.begin(federation.sites())
    pass_step(coordinator, sites)
    exchange(coordinator, sites[0])
    forget_now(federation, path)
    sites = [federation.site(name) for name in TRAINING]
    assert exchange(coordinator, sites[0]).code == ReplyCode.APPLIED
    for site in sites:
        site.void(1)
        assert exchange(coordinator, site).code == ReplyCode.VOID
    assert coordinator.advance().header.kind == "void"
    run_round(coordinator, [federation.site(name) for name in TRAINING])
    assert coordinator.rounds[-1].sites == TRAINING


def test_what_is_dropped_after_the_sum_was_fixed_does_not_hold_the_round_up(federation, hospital):
    path, _ = hospital
    sites = federation.sites()
    coordinator = federation.begin(sites)
    send_envelopes(coordinator, sites)
    coordinator.advance()  # ARRIVED
    forget_now(federation, path)
    assert not list(outbox(federation).glob("*.integers"))
    ash = federation.site("ash")
    assert exchange(coordinator, ash).code == ReplyCode.REVEALED
    assert close_round(coordinator, [ash, *sites[1:]]) is not None


def test_an_update_that_was_never_sealed_is_made_anew_at_once(federation, hospital):
    path, _ = hospital
    sites = federation.sites()
    coordinator = federation.begin(sites)
    assert exchange(coordinator, sites[0]).code == ReplyCode.READY
    stored = (outbox(federation) / "00000001.integers").read_bytes()
    forget_now(federation, path)
    reply = federation.site("ash").respond(federation.reopen().request("ash", sites[0].run, 1))
    assert reply.code == ReplyCode.READY
    assert (outbox(federation) / "00000001.integers").read_bytes() != stored


def test_under_differential_privacy_what_was_spent_stays_spent(federation, hospital):
    path, _ = hospital
    file = read_site_file(path)
    table = file.model_dump(exclude_none=True) | {"privacy": {"epsilon": 8.0, "delta": 1e-5, "n_ref": 10}}
    write_toml(path, type(file).model_validate(table))
    sites = federation.sites()
    coordinator = federation.begin(sites)
    send_envelopes(coordinator, sites)
    coordinator.advance()
    folder = federation.folder / "sites" / "ash" / "identity" / "ledger"
    (event,) = Ledger(folder).events
    (noised,) = outbox(federation).glob("*.noised")
    stored = noised.read_bytes()
    forget_now(federation, path)
    # What it sends is noised and paid for: to send nothing, or something else, would tell that somebody left.
    ash = federation.site("ash")
    assert exchange(coordinator, ash).code == ReplyCode.REVEALED
    assert noised.read_bytes() == stored
    assert [one.seq for one in Ledger(folder).events] == [event.seq]
    assert Ledger(folder).epsilon_spent > 0
    for file_, content in state_bytes(federation).items():
        assert PATIENT.encode() not in content, file_


DAMAGED = [b"", b"[1]", b"{}", b'{"format": 1, "key": "00", "patients": []}', b"\xff", b"[" * 9000]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_list_stops_the_site(tmp_path, content):
    (tmp_path / "forgotten.json").write_bytes(content)
    with pytest.raises(ForgottenError, match=r"forgotten\.json"):
        Forgotten(tmp_path)


def test_the_list_holds_hashes_under_a_key_of_its_own(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Forgotten(tmp_path / name).add(PATIENT, [b"x" * 32])
    first, second = (Forgotten(tmp_path / name) for name in ("a", "b"))
    assert first.patient(PATIENT)
    assert first.image(b"x" * 32)
    assert not first.patient("x" * 32)
    texts = [(tmp_path / name / "forgotten.json") for name in ("a", "b")]
    assert texts[0].stat().st_mode & 0o777 == 0o600
    contents = [Forgotten(path.parent)._content for path in texts]
    assert set(contents[0].patients).isdisjoint(contents[1].patients)
    assert second.patient(PATIENT)


@pytest.mark.parametrize(
    ("forgotten", "also", "others"),
    [
        ("PAT-1", ["PAT1", "pat.01", "PAT_1"], ["PAT-11", "PAT-2"]),
        ("PAT1", ["PAT-1", "PAT/1"], ["PAT-1-1"]),
        ("12-34", ["1234", "12.34", "12/34"], ["1-234", "123-4", "12345", "1-2-3-4-5"]),
        ("1234", ["12-34", "1-234"], ["1-235", "01-2345"]),
        ("1-2", ["1.2"], ["12", "2-1"]),
        ("P1_left", ["P1-R", "patient 1", "1"], ["P2_left", "C1_left"]),
    ],
)
def test_the_list_knows_ids_by_what_separates_their_parts_as_doubts_do(tmp_path, forgotten, also, others):
    listed = Forgotten(tmp_path)
    listed.add(forgotten, [], in_any_writing=True)
    assert [name for name in (*also, *others) if Forgotten(tmp_path).written_otherwise(name)] == also
    for name in also:  # and so those who are asked about who is who
        assert any({forgotten, name} <= set(group) for group in by_writing([forgotten, name]))
        assert forgotten in similar(name, [forgotten])
    exact = Forgotten(tmp_path / "image")
    exact.add(forgotten, [])
    assert not any(exact.written_otherwise(name) for name in also)


def test_an_unknown_id_changes_nothing_and_similar_ones_are_shown(federation, hospital):
    path, _ = hospital
    federation.site("ash").features()
    before = state_bytes(federation)
    for unknown in ("OTHER-1", "other-01", "other-99", ""):
        with pytest.raises(UnknownPatientError):
            forget(read_site_file(path), federation.agreed, unknown)
        after = state_bytes(federation)
        assert {file: content for file, content in after.items() if file.name != "lock"} == before
    with pytest.raises(UnknownPatientError, match="similar ids here: 'other-1'"):
        forget(read_site_file(path), federation.agreed, "OTHER-1")
    assert forget(read_site_file(path), federation.agreed, f" {PATIENT} ").images == 2  # only form


def test_nobody_is_forgotten_while_the_file_of_settled_ids_is_not_where_the_site_says(federation, hospital, tmp_path):
    file = read_site_file(hospital[0])
    data = file.data.model_copy(update={"patients": str(tmp_path / "absent.csv")})
    before = state_bytes(federation)
    with pytest.raises(ManifestError, match=r"absent.csv: cannot be read"):
        forget(file.model_copy(update={"data": data}), federation.agreed, PATIENT)
    assert {path: content for path, content in state_bytes(federation).items() if path.name != "lock"} == before
