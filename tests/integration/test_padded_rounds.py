"""Rounds with pads: no dropout costs an update, no wrong word is taken, and nothing but a cohort's whole sum opens."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from secure_fed.clients.acceptance import terms
from secure_fed.clients.replica import RunFiles
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.errors import (
    AdapterMismatchError,
    AggregateRefused,
    EnvelopeError,
    NotAcceptedError,
    ProtocolError,
    RecordError,
    StorageError,
)
from secure_fed.core.tomlfile import to_toml
from secure_fed.lab.simulation import SERVER, prepare
from secure_fed.operate.closing import close_site
from secure_fed.operate.evidence import in_words, pack_evidence, verify_evidence
from secure_fed.privacy.ckks import Cipher
from secure_fed.protocol import shares
from secure_fed.protocol.packing import Binding
from secure_fed.protocol.pads import PadPlace, SitePads, commitment, pad, public_of, without_masks
from secure_fed.protocol.records import read_header, sign_record
from secure_fed.protocol.residues import pack_residues, unpack_residues
from secure_fed.protocol.round_frames import (
    ARRIVED_MAGIC,
    READY_MAGIC,
    ReadyHeader,
    check_arrived,
    sign_cohort,
    sign_ready,
    sign_reveal,
    split_word,
)
from secure_fed.protocol.rounds import ReplyCode, RoundReply, RoundRequest
from secure_fed.protocol.share_frames import Dealt, at_places, deal, places, sign_checked, sign_gone, sign_witness
from secure_fed.protocol.signing import parse_header, payload_fields, sign_frame
from secure_fed.protocol.study import load_study, with_fields
from secure_fed.report.results import study_facts
from secure_fed.server.coordinator import Coordinator, Step
from secure_fed.server.spool import REVEAL_OF
from tests.conftest import (
    CLASSES,
    TRAINING,
    Federation,
    Run,
    close_round,
    exchange,
    make_template,
    pass_step,
    template_table,
)

NAMES = (*TRAINING, "dogwood", "elm", "fir")

Make = Callable[[int], Federation]


@pytest.fixture(scope="module")
def six_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six sites' images."""
    root, rng = tmp_path_factory.mktemp("six"), np.random.default_rng(0)
    for site in NAMES:
        for index, name in enumerate(CLASSES):
            (root / site / name).mkdir(parents=True)
            for number in range(6):
                picture = rng.normal(60 + 120 * (index == 1), 20, (32, 32))
                Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(root / site / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def prepared_of(tmp_path_factory: pytest.TempPathFactory, six_images: Path) -> Callable[..., Path]:
    """A prepared study of so many training sites, made once each."""
    made: dict[tuple[int, int], Path] = {}

    def make(count: int, collusion: int = 1) -> Path:
        if (count, collusion) not in made:
            folder = tmp_path_factory.mktemp(f"padded{count}{collusion}") / "out"
            sites = [{"name": name} for name in NAMES[:count]]
            played = [{"name": name, "folder": name} for name in NAMES[:count]]
            simulation = template_table()["simulation"] | {"sites": played}
            changes = {"collusion": collusion, "sites": sites, "max_sites": 8, "simulation": simulation}
            prepare(make_template(**changes), folder, six_images)
            for site in Federation(folder).sites():
                site.features()
            made[count, collusion] = folder
        return made[count, collusion]

    return make


@pytest.fixture
def padded(prepared_of: Callable[..., Path], tmp_path: Path) -> Make:
    copies = iter(range(1000))

    def copy(count: int, collusion: int = 1) -> Federation:
        folder = tmp_path / f"{next(copies)}" / "out"
        shutil.copytree(prepared_of(count, collusion), folder, symlinks=True)
        return Federation(folder)

    return copy


def up_to(coordinator: Coordinator, sites: list[Site], step: Step) -> None:
    """Go on with all of these until the round is at a step, of which nobody is asked yet."""
    for _ in range(5):
        if coordinator.step is step:
            return
        pass_step(coordinator, sites)
    raise AssertionError(coordinator.step)


def close(coordinator: Coordinator, sites: list[Site]) -> Any:
    """Close the round with these sites: with pads there are more steps, and more again for who is gone."""
    return close_round(coordinator, sites, 10)


def test_a_round_with_pads_is_that_without_and_its_record_a_quarter_of_a_kilobyte_a_site_larger(padded: Make) -> None:
    digests, sizes = [], []
    for collusion in (1, 0):
        federation = padded(4, collusion)
        sites = federation.sites()
        coordinator = federation.begin(sites)
        codes = []
        for _ in range(5):
            codes.append({exchange(coordinator, site).code for site in sites})
            if (entry := coordinator.advance()) is not None:
                sizes.append(entry.size)
                break
        for site in sites:
            exchange(coordinator, site)
        digests.append({site.adapter_digest for site in sites})
        checked = [{ReplyCode.CHECKED}] if collusion else []
        assert codes == [{ReplyCode.READY}, {ReplyCode.UPDATE}, *checked, {ReplyCode.REVEALED}]
    assert len(digests[0] | digests[1]) == 1
    assert 0 < sizes[0] - sizes[1] < 4 * 250


def bring_up(coordinator: Coordinator, sites: list[Site]) -> None:
    """Everybody takes the record, and holds the same adapter."""
    for site in sites:
        exchange(coordinator, site)
    assert len({site.adapter_digest for site in sites}) == 1


def integers_of(site: Site, round_number: int = 1) -> Any:
    return safetensors.numpy.load(site.replica.files.folder.integers(round_number).read_bytes())["integers"]


def opened(federation: Federation, sites: list[Site], record: bytes) -> Any:
    """What a record's sum opens to, by the chain as it was before it."""
    chain = sites[0].replica.state.chain
    checked = chain.check(record)
    due = chain.due
    binding = Binding(run=due.run, head=due.head, round=due.round)
    return sites[0].replica.sealer.open(checked.ciphertexts(federation.agreed), binding, checked.cohort)


def reveal(coordinator: Coordinator, sites: list[Site]) -> None:
    """Up to the point at which all have revealed, and nothing has followed."""
    up_to(coordinator, sites, Step.REVEAL)
    for site in sites:
        exchange(coordinator, site)


# Dropouts


@pytest.mark.parametrize("count", [4, *(pytest.param(count, marks=pytest.mark.slow) for count in (5, 6))])
def test_whoever_goes_after_the_sum_is_fixed_costs_no_update_while_a_quorum_stays(padded: Make, count: int) -> None:
    """Every set of sites that may go, before its REVEAL, against the same envelopes; the server is a copy each time."""
    federation = padded(count)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    server = federation.folder / SERVER
    kept = federation.folder / "kept"
    shutil.copytree(server, kept)
    reveals = {site.name: exchange(coordinator, site) for site in sites}
    expected, needed = sum(integers_of(site) for site in sites), coordinator.journal.chain.quorum.needed
    tried = 0
    for away in range(1, count - needed + 1):
        for gone in combinations(NAMES[:count], away):
            shutil.rmtree(server)
            shutil.copytree(kept, server)
            again = federation.reopen()
            staying = [site for site in sites if site.name not in gone]
            for site in staying:
                again.receive(reveals[site.name])
            assert again.advance() is None
            assert again.recover(gone)
            assert again.asked == set(NAMES[:count])
            entry = close(again, staying)
            assert [one.site for one in entry.header.witnessed] == list(gone)
            assert np.array_equal(opened(federation, sites, again.journal.read(1)), expected)
            tried += 1
    assert tried == {4: 4, 5: 5, 6: 6 + 15}[count]


def test_who_comes_back_while_others_speak_for_it_reveals_itself(padded: Make) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    for site in sites[1:]:
        exchange(coordinator, site)
    assert coordinator.recover(["ash"])
    exchange(coordinator, sites[1])
    late = sites[2].respond(coordinator.request(sites[2].name, sites[2].run, sites[2].position))
    assert exchange(coordinator, sites[0]).code == ReplyCode.REVEALED
    assert late.code == ReplyCode.WITNESSED
    coordinator.receive(late)  # it was on its way, and is nobody's fault
    entry = coordinator.advance()
    assert entry is not None
    assert entry.header.witnessed == ()


def test_words_that_speak_also_for_one_who_came_back_hold_and_its_wrong_check_does_not(
    padded: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A site signs one word for all that it has spoken for, whatever the server has forgotten since, or been told."""
    federation = padded(4)
    sites = federation.sites()
    ash, birch, cedar, _ = sites
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    for site in sites[1:]:
        exchange(coordinator, site)
    assert coordinator.recover(["ash"])
    exchange(coordinator, birch)
    coordinator._spool.path(REVEAL_OF + "dogwood").unlink()
    coordinator = federation.reopen()
    assert coordinator._arrived is not None
    key, bound = ash.replica.identity.signing, ash.replica.files.bound.padded
    assert bound is not None
    wrong = sign_reveal(federation.agreed, coordinator._arrived.digest, "ash", (1, 2), key, bound.seed)
    coordinator.receive(RoundReply("ash", ReplyCode.REVEALED, ash.run, 1, "", wrong))
    assert coordinator.recover(["dogwood"])
    assert exchange(coordinator, cedar).code == ReplyCode.WITNESSED
    assert not caplog.records
    assert exchange(coordinator, birch).code == ReplyCode.WITNESSED
    assert "ash: its REVEAL of round 1 is wrong" in caplog.text
    assert coordinator.asked >= {"ash"}
    entry = close(coordinator, sites[:3])
    assert [one.site for one in entry.header.witnessed] == ["dogwood"]
    assert {word.site: at_places(word.gone, NAMES[:4]) for word in entry.header.witnesses} == {
        "ash": ("dogwood",), "birch": ("ash", "dogwood"), "cedar": ("dogwood",)
    }  # fmt: skip
    bring_up(coordinator, sites)


def test_a_site_for_which_others_spoke_while_it_was_gone_goes_on_with_the_next_round(
    padded: Make, caplog: pytest.LogCaptureFixture
) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    for site in sites[1:]:
        exchange(coordinator, site)
    assert coordinator.recover(["ash"])
    entry = close(coordinator, sites[1:])
    assert [one.site for one in entry.header.witnessed] == ["ash"]
    state = sites[0].replica.state.digest
    bring_up(coordinator, sites)
    assert "older than what" not in caplog.text
    assert sites[0].replica.files.bound.given == {state: NAMES[:4]}, "its integers were in a sum at that adapter"
    assert close(coordinator, sites).sites == NAMES[:4]


def test_the_others_speak_for_a_site_whose_people_give_the_round_up_after_the_sum_is_fixed(padded: Make) -> None:
    """One word stops no round: its envelope is in the sum. It has the record with the next one, which is upon it."""
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    expected = sum(map(integers_of, sites))
    assert not sites[3].void(1), "it had not revealed"
    assert exchange(coordinator, sites[3]).code == ReplyCode.VOID
    for site in sites[:3]:
        exchange(coordinator, site)
    assert coordinator.leaving == {"dogwood"}
    assert not coordinator.given_up
    assert coordinator.recover(coordinator.leaving)
    entry = close(coordinator, sites[:3])
    assert [one.site for one in entry.header.witnessed] == ["dogwood"]
    data = coordinator.journal.read(1)
    exchange(coordinator, sites[3])
    assert sites[3].round == 0, "a void may still be complete"
    assert np.array_equal(opened(federation, [sites[3]], data), expected)
    bring_up(coordinator, sites[:3])
    assert close(coordinator, sites[:3]).sites == NAMES[:3]
    bring_up(coordinator, sites)
    assert sites[3].round == 2


def test_nobody_speaks_for_another_before_a_quorum_has_revealed(padded: Make) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    for site in sites[2:]:
        exchange(coordinator, site)
    assert not coordinator.recover(["ash"])
    assert not coordinator.recover(["ash", "birch"])


def test_with_just_a_quorum_no_share_leaves_and_the_round_waits(padded: Make) -> None:
    federation = padded(3)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    pass_step(coordinator, sites)
    replies = [exchange(coordinator, site) for site in sites]
    assert [(reply.code, reply.carried) for reply in replies] == [(ReplyCode.UPDATE, b"")] * 3
    coordinator.advance()
    assert coordinator.step is Step.REVEAL
    for site in sites[1:]:
        exchange(coordinator, site)
    assert not coordinator.recover(["ash"])
    assert coordinator.asked == {"ash"}
    arrived, birch = coordinator._arrived, sites[1]
    assert arrived is not None
    checks = {"ash": coordinator._true_check("ash")}
    word = sign_witness(federation.agreed, arrived.digest, "birch", NAMES[:3], checks, birch.replica.identity.signing)
    coordinator.receive(RoundReply("birch", ReplyCode.WITNESSED, birch.run, 1, "", word, bytes(32)))  # of no use
    assert close(coordinator, sites).sites == NAMES[:3]
    bring_up(coordinator, sites)


@pytest.mark.parametrize(
    ("step", "gone"),
    [
        pytest.param(step, gone, marks=() if (step, gone) == (Step.CHECKED, "ash") else pytest.mark.slow)
        for step in (Step.ENVELOPE, Step.CHECKED)
        for gone in NAMES[:4]
    ],
)
def test_whoever_goes_before_the_sum_is_fixed_costs_an_attempt(padded: Make, step: Step, gone: str) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, step)
    staying = [site for site in sites if site.name != gone]
    for site in staying:
        exchange(coordinator, site)
    assert coordinator.advance() is None
    assert coordinator.step is step
    assert coordinator.fail([gone])
    entry = close(coordinator, staying)
    assert entry.sites == tuple(site.name for site in staying)
    found = opened(federation, sites, coordinator.journal.read(1))
    assert np.array_equal(found, sum(integers_of(site) for site in staying))
    bring_up(coordinator, sites)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "step", "gone"),
    [
        (count, step, gone)
        for count, most in ((5, 1), (6, 2))
        for step in (Step.ENVELOPE, Step.CHECKED)
        for away in range(1, most + 1)
        for gone in combinations(NAMES[:count], away)
    ],
)
def test_every_set_that_goes_before_the_sum_is_fixed_costs_an_attempt(
    padded: Make, count: int, step: Step, gone: tuple[str, ...]
) -> None:
    federation = padded(count)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, step)
    staying = [site for site in sites if site.name not in gone]
    assert len(staying) >= coordinator.journal.chain.quorum.needed
    for site in staying:
        exchange(coordinator, site)
    assert coordinator.advance() is None
    assert coordinator.fail(gone)
    entry = close(coordinator, staying)
    assert entry.sites == tuple(site.name for site in staying)
    found = opened(federation, sites, coordinator.journal.read(1))
    assert np.array_equal(found, sum(integers_of(site) for site in staying))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "steps"),
    [
        (*pair, ((Step.ENVELOPE, Step.CHECKED), (Step.ENVELOPE, Step.REVEAL), (Step.CHECKED, Step.REVEAL))[turn % 3])
        for turn, pair in enumerate(permutations(NAMES, 2))
    ],
)
def test_two_of_six_that_go_at_different_steps_cost_nobody_else_an_update(
    padded: Make, first: str, second: str, steps: tuple[Step, Step]
) -> None:
    federation = padded(6)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    for gone, step in zip((first, second), steps, strict=True):
        up_to(coordinator, sites, step)
        sites = [site for site in sites if site.name != gone]
        for site in sites:
            exchange(coordinator, site)
        assert coordinator.advance() is None
        assert coordinator.recover([gone]) if step is Step.REVEAL else coordinator.fail([gone])
    entry = close(coordinator, sites)
    assert entry.sites == tuple(name for name in NAMES if name != first and (name != second or Step.REVEAL in steps))
    everybody = federation.sites()
    found = opened(federation, everybody, coordinator.journal.read(1))
    assert np.array_equal(found, sum(integers_of(site) for site in everybody if site.name in entry.sites))


@pytest.mark.parametrize(
    ("step", "gone"),
    [
        pytest.param(step, gone, marks=() if (step, gone) == (Step.ENVELOPE, "birch") else pytest.mark.slow)
        for step in (Step.ENVELOPE, Step.REVEAL)
        for gone in NAMES[:3]
    ],
)
def test_of_three_whoever_goes_is_waited_for_and_costs_nothing_once_it_is_back(
    padded: Make, step: Step, gone: str
) -> None:
    """Three are a quorum: nobody can be missed, at no step, and no update is lost."""
    federation = padded(3)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, step)
    for site in sites:
        if site.name != gone:
            exchange(coordinator, site)
    assert coordinator.advance() is None
    assert not coordinator.fail([gone])
    assert not coordinator.recover([gone])
    assert coordinator.asked == {gone}
    entry = close(coordinator, [federation.site(gone), *(site for site in sites if site.name != gone)])
    assert entry.sites == NAMES[:3]
    found = opened(federation, sites, coordinator.journal.read(1))
    assert np.array_equal(found, sum(integers_of(site) for site in sites))


def test_a_record_and_a_void_of_one_round_open_no_second_sum(padded: Make) -> None:
    """The server shows one colluder the record and the others its void; then it asks for a cohort without one site."""
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    reveal(coordinator, sites)
    before = federation.folder / "before"
    shutil.copytree(federation.folder / SERVER, before)
    assert coordinator.advance() is not None
    exchange(coordinator, sites[3])  # a colluder has the record
    shutil.rmtree(federation.folder / SERVER)
    shutil.copytree(before, federation.folder / SERVER)
    again = federation.reopen()
    for site in sites[:3]:
        site.void(1)
        assert exchange(again, site).code == ReplyCode.VOID
    assert again.given_up
    again.advance()
    for site in sites[:3]:
        exchange(again, site)
    again.advance()
    assert again.step is Step.ENVELOPE
    for site in sites[:3]:
        with pytest.raises(ProtocolError, match="the difference of the two sums is somebody's update"):
            site.respond(again.request(site.name, site.run, site.position))


def test_sites_that_start_anew_at_every_step_say_the_same(padded: Make) -> None:
    """As after kill -9: nothing but the state folder is left between any two words."""
    federation = padded(4)
    coordinator = federation.begin(federation.sites())
    codes = []
    while coordinator.round == 1:
        for name in NAMES[:4]:
            site = federation.site(name)
            request = coordinator.request(name, site.run, site.position)
            first = site.respond(request)
            again = federation.site(name).respond(request)
            assert (first.code, first.envelope, first.carried) == (again.code, again.envelope, again.carried)
            coordinator.receive(again)
            codes.append(again.code)
        coordinator.advance()
        coordinator = federation.reopen()
        coordinator.advance()
    assert codes == [
        code for code in (ReplyCode.READY, ReplyCode.UPDATE, ReplyCode.CHECKED, ReplyCode.REVEALED) for _ in NAMES[:4]
    ]


class Process:
    """A site in a process of its own, which may be killed at any time."""

    def __init__(self, federation: Federation, name: str, module: str, **environment: str) -> None:
        self.name = name
        self.worker = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(federation.folder / "sites" / name / "site.toml")],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.read()

    def read(self) -> Any:
        assert self.worker.stdout is not None
        line = self.worker.stdout.readline()
        return json.loads(line) if line else None

    def kill(self) -> None:
        self.worker.kill()
        assert self.worker.wait() == -signal.SIGKILL
        for pipe in (self.worker.stdin, self.worker.stdout):
            assert pipe is not None
            pipe.close()

    def respond(self, request: RoundRequest) -> RoundReply | None:
        """Its reply; none if it was killed over it."""
        fields = request.__dict__ | {
            **{name: base64.b64encode(getattr(request, name)).decode() for name in ("question", "past", "carried")},
            "records": [base64.b64encode(data).decode() for data in request.records],
        }
        assert self.worker.stdin is not None
        self.worker.stdin.write(json.dumps(fields) + "\n")
        self.worker.stdin.flush()
        answer = self.read()
        if answer is None:
            return None
        told = answer["reply"]
        data = {name: base64.b64decode(told[name]) for name in ("envelope", "carried")}
        return RoundReply(**told | data | {"code": ReplyCode(told["code"])})


@pytest.mark.slow
@pytest.mark.parametrize("words", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_a_killed_site_goes_on_where_it_was_and_the_round_loses_no_update(padded: Make, count: int, words: int) -> None:
    """Killed with its key, its pin or its REVEAL on disk and unsaid; or between its envelope and its REVEAL."""
    federation = padded(count)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    sites = sites[1:]
    module = "tests.killed_worker" if words else "tests.site_worker"
    ash, killed, position, entry = Process(federation, "ash", module, WORDS=str(words)), 0, ("", 0), None
    for _ in range(12):
        if (words == 0 and killed == 0) and coordinator.step in (Step.CHECKED, Step.REVEAL):
            ash.kill()
            ash, killed = Process(federation, "ash", "tests.site_worker"), 1
        reply = ash.respond(coordinator.request("ash", *position))
        if reply is None:
            ash.kill()
            ash, killed = Process(federation, "ash", "tests.site_worker"), killed + 1
            continue
        position = (reply.run, reply.position)
        coordinator.receive(reply)
        for site in sites:
            exchange(coordinator, site)
        entry = coordinator.advance()
        if entry is not None:
            break
    ash.kill()
    assert killed == 1
    assert entry is not None
    assert (entry.sites, entry.header.witnessed) == (NAMES[:count], ())
    whole = [federation.site("ash"), *sites]
    assert np.array_equal(opened(federation, whole, coordinator.journal.read(1)), sum(map(integers_of, whole)))
    bring_up(coordinator, whole)


def test_a_crash_between_an_envelope_and_its_pin_leaves_no_second_envelope_of_one_attempt(padded: Make) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    pass_step(coordinator, sites)
    request = coordinator.request("ash", sites[0].run, sites[0].position)
    with mock.patch.object(RunFiles, "bind", side_effect=StorageError("full")), pytest.raises(StorageError):
        sites[0].respond(request)
    # Nothing was sent, so another is made; once pinned, it is the only one.
    first = federation.site("ash").respond(request)
    assert federation.site("ash").respond(request).envelope == first.envelope
    path = federation.site("ash").replica.files.folder.envelope(1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ProtocolError, match="never made twice"):
        federation.site("ash").respond(request)


def test_a_reveal_that_is_damaged_at_the_server_is_asked_for_again(
    padded: Make, caplog: pytest.LogCaptureFixture
) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    reveal(coordinator, sites)
    for name, keep in (("birch", 0), ("cedar", -1)):
        path = coordinator._spool.path(f"reveal-{name}")
        path.write_bytes(path.read_bytes()[:keep])
    again = federation.reopen()
    assert again.step is Step.REVEAL
    assert again.asked == {"birch", "cedar"}
    assert caplog.text.count("damaged, and asked for again") == 2
    assert close(again, sites).header.witnessed == ()
    bring_up(again, sites)


def another_digit(data: bytes) -> bytes:
    """The word with one digit of the head at which it was said turned into another one: it seems to be of before."""
    at = data.index(b'"head":"') + len(b'"head":"')
    return data[:at] + (b"0" if data[at : at + 1] != b"0" else b"1") + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:-9], lambda data: b"\xff" + data[1:], another_digit],
    ids=["empty", "cut", "unreadable", "one digit"],
)
def test_a_site_whose_own_word_is_damaged_sits_the_round_out_and_says_so(
    padded: Make, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    path = sites[0].replica.files.folder.bound
    path.write_bytes(damage(path.read_bytes()))
    sites[0] = federation.site("ash")
    for again in (sites[0], federation.site("ash")):
        assert exchange(coordinator, again).code == ReplyCode.SITS_OUT
    assert "damaged, so that nobody knows what this site has said" in caplog.text
    assert caplog.text.count("begins a new file") == 1
    for site in sites[1:]:
        exchange(coordinator, site)
    assert coordinator.recover(["ash"])
    assert [one.site for one in close(coordinator, sites[1:]).header.witnessed] == ["ash"]
    bring_up(coordinator, sites)
    assert close(coordinator, sites).sites == NAMES[:4], "with the next round it goes on"


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_site_whose_own_envelope_is_damaged_signs_no_check_of_it_and_others_speak_for_it(
    padded: Make, damage: Callable[[bytes], bytes]
) -> None:
    """A check of damaged bytes would name it as one that lies."""
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    path = sites[0].replica.files.folder.envelope(1)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(EnvelopeError, match=r"damaged since it was sent .* others speak for it"):
        exchange(coordinator, sites[0])
    for site in sites[1:]:
        exchange(coordinator, site)
    assert coordinator.recover(["ash"])
    assert [one.site for one in close(coordinator, sites[1:]).header.witnessed] == ["ash"]
    bring_up(coordinator, sites)


def turned_over(data: bytes) -> bytes:
    """Stored integers of which one is another, within the bounds."""
    tensors = safetensors.numpy.load(data)
    tensors["integers"][5] ^= 8
    return bytes(safetensors.numpy.save(tensors))


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:-9], lambda data: data[:9] + b"}" + data[10:], turned_over],
    ids=["empty", "cut", "header", "one bit of a value"],
)
def test_integers_that_are_damaged_are_made_again_while_nobody_was_given_them_and_not_after(
    padded: Make, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    pass_step(coordinator, sites)
    path = sites[0].replica.files.folder.integers(1)
    before = integers_of(sites[0])
    path.write_bytes(damage(path.read_bytes()))
    assert exchange(coordinator, federation.site("ash")).code == ReplyCode.UPDATE
    assert f"{path}: damaged" in caplog.text
    assert np.array_equal(integers_of(sites[0]), before)
    sites[0] = federation.site("ash")
    reveal(coordinator, sites)
    path.write_bytes(damage(path.read_bytes()))
    for site in sites:
        site.void(1)
        exchange(coordinator, site)
    assert coordinator.advance().header.kind == "void"  # type: ignore[union-attr]
    assert exchange(coordinator, federation.site("ash")).code == ReplyCode.APPLIED, "others would show what is new"


# What a server that lies is told


def questions(coordinator: Coordinator) -> Any:
    return coordinator._cohort, coordinator._check, coordinator._arrived


def ask(coordinator: Coordinator, site: Site, question: bytes, carried: bytes = b"") -> RoundReply:
    request = coordinator.request(site.name, site.run, site.position)
    return site.respond(replace(request, records=(), question=question, carried=carried, attempt=1, past=b""))


def gone_frame(federation: Federation, coordinator: Coordinator, gone: str, arrived: str | None = None) -> bytes:
    digest = arrived or coordinator._arrived.digest  # type: ignore[union-attr]
    due = coordinator.journal.chain.due
    return sign_gone(federation.agreed, due, coordinator.attempt, digest, gone, federation.signing)


def test_a_site_gives_no_share_before_it_has_revealed_after_a_void_or_for_another_sum(padded: Make) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    question = gone_frame(federation, coordinator, "birch")
    carried = coordinator._shares.handed("birch", "ash") + coordinator._payload("birch")
    with pytest.raises(ProtocolError, match="not revealed, and gives none"):
        ask(coordinator, sites[0], question, carried)
    exchange(coordinator, sites[0])
    other = gone_frame(federation, coordinator, "birch", "5" * 64)
    with pytest.raises(ProtocolError, match="revealed for another ARRIVED"):
        ask(coordinator, sites[0], other, carried)
    due, digest = coordinator.journal.chain.due, coordinator._arrived.digest  # type: ignore[union-attr]
    elsewhere = sign_gone(federation.agreed, replace(due, round=2), 1, digest, "birch", federation.signing)
    with pytest.raises(ProtocolError, match="not of this round"):
        ask(coordinator, sites[0], elsewhere, carried)
    kept = sites[0].replica.files.folder.question("arrived")
    whole = kept.read_bytes()
    header, _, _ = check_arrived(whole, federation.agreed, coordinator.journal.chain.members, due)
    kept.write_bytes(sign_frame(ARRIVED_MAGIC, header.model_copy(update={"sum": "5" * 64}), federation.signing, b""))
    with pytest.raises(ProtocolError, match="not the one it has revealed for"):
        ask(coordinator, sites[0], question, carried)
    kept.write_bytes(whole)
    for who in ("ash", "zelkova"):
        with pytest.raises(ProtocolError, match="expected another site of the cohort"):
            ask(coordinator, sites[0], gone_frame(federation, coordinator, who), carried)
    with pytest.raises(ProtocolError, match="not the one it signed"):
        ask(coordinator, sites[0], question, carried[:-1] + bytes([carried[-1] ^ 1]))
    with pytest.raises(ProtocolError, match="handed on otherwise"):
        ask(coordinator, sites[0], question, bytes([carried[0] ^ 1]) + carried[1:])
    wrong = coordinator._shares.handed("birch", "cedar") + coordinator._payload("birch")
    with pytest.raises(ProtocolError, match="handed on otherwise"):  # sealed to somebody else
        ask(coordinator, sites[0], question, wrong)
    assert not sites[0].replica.files.bound.padded.shared  # type: ignore[union-attr]
    assert ask(coordinator, sites[0], question, carried).code == ReplyCode.WITNESSED
    assert list(sites[0].replica.files.bound.padded.shared) == ["birch"]  # type: ignore[union-attr]
    sites[0].void(1)
    assert ask(coordinator, sites[0], question, carried).code == ReplyCode.VOID


def test_a_site_reveals_only_when_everybody_has_said_checked(padded: Make) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    arrived = coordinator._arrived
    assert arrived is not None
    swapped = arrived.carried[64:128] + arrived.carried[:64] + arrived.carried[128:]
    flipped = arrived.carried[:-1] + bytes([arrived.carried[-1] ^ 1])
    for carried in (b"", arrived.carried[:-64], arrived.carried + bytes(64), flipped, swapped):
        with pytest.raises(ProtocolError, match="CHECKED of"):
            ask(coordinator, sites[0], arrived.data, carried)
    assert not sites[0].replica.files.bound.arrived
    assert ask(coordinator, sites[0], arrived.data, arrived.carried).code == ReplyCode.REVEALED


def test_nothing_of_an_earlier_attempt_is_revealed_or_shared_once_a_later_one_is_answered(padded: Make) -> None:
    """Nested cohorts: the server keeps all envelopes of both attempts, and gets masks of the later one only."""
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    arrived = coordinator._arrived
    assert arrived is not None
    # A server that lies forgets that the sum was fixed.
    coordinator._arrived = None
    first = {site.name: coordinator._payload(site.name) for site in sites}
    assert coordinator.fail(["dogwood"])
    up_to(coordinator, sites[:3], Step.REVEAL)
    for site in sites[:3]:
        with pytest.raises(ProtocolError, match="the newest here is attempt 2"):
            ask(coordinator, site, arrived.data, arrived.carried)
    assert exchange(coordinator, sites[0]).code == ReplyCode.REVEALED
    with pytest.raises(ProtocolError, match="the newest here is attempt 2"):
        ask(coordinator, sites[0], arrived.data, arrived.carried)
    # And the same ciphertexts' bytes never come twice: each attempt is under its own pads and encryption.
    for name in NAMES[:3]:
        assert first[name] != coordinator._payload(name)


def cohort_of(federation: Federation, coordinator: Coordinator, **fresh: str) -> bytes:
    """A COHORT whose named sites have other fresh keys, each signed by that site itself: colluders, with the server."""
    due, words = coordinator.journal.chain.due, []
    for name, word in sorted(coordinator._readies.items()):
        if name in fresh:
            key = federation.site(name).replica.identity.signing
            data = sign_ready(federation.agreed, due, coordinator.attempt, name, False, key, fresh[name])
            word = split_word(READY_MAGIC, data)
        words.append(word)
    return sign_cohort(federation.agreed, due, coordinator.attempt, words, federation.signing)


def fresh_key(coordinator: Coordinator, name: str) -> str:
    key = parse_header(coordinator._readies[name].signed[0], ReadyHeader, EnvelopeError).fresh
    assert key is not None
    return key


def test_copied_replaced_and_weak_fresh_keys_are_refused_by_sites_and_server(padded: Make) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    for site in sites:
        exchange(coordinator, site)
    ash = sites[0]
    copied = cohort_of(federation, coordinator, birch=fresh_key(coordinator, "ash"))
    with pytest.raises(ProtocolError, match="ash and birch sent the same fresh key"):
        ask(coordinator, ash, copied)
    with pytest.raises(ProtocolError, match="small order"):
        ask(coordinator, ash, cohort_of(federation, coordinator, birch="00" * 32))
    with pytest.raises(ProtocolError, match="one encoding"):
        ask(coordinator, ash, cohort_of(federation, coordinator, birch="ff" * 32))
    # Its own key replaced: only the site itself can sign that, as a copied identity could.
    with pytest.raises(EnvelopeError, match="another fresh key for ash"):
        ask(coordinator, ash, cohort_of(federation, coordinator, ash=public_of(bytes(31) + b"1")))
    assert ash.replica.files.bound.attempt == 0
    due, birch = coordinator.journal.chain.due, sites[1].replica.identity.signing
    for key, text in ((fresh_key(coordinator, "ash"), "ash and birch sent"), ("00" * 32, "small order")):
        ready = sign_ready(federation.agreed, due, 1, "birch", False, birch, key)
        with pytest.raises(EnvelopeError, match=text):
            coordinator.receive(RoundReply("birch", ReplyCode.READY, sites[1].run, 1, "", ready))
    bare = sign_ready(federation.agreed, due, 1, "birch", False, birch)
    with pytest.raises(EnvelopeError, match="no fresh key"):
        coordinator.receive(RoundReply("birch", ReplyCode.READY, sites[1].run, 1, "", bare))


def test_each_attempt_has_a_fresh_key_of_its_own_which_goes_where_its_envelope_is_made(padded: Make) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    ash, keys = sites[0], []
    for attempt in (1, 2):
        for site in sites:
            request = coordinator.request(site.name, site.run, site.position)
            site.respond(replace(request, attempt=attempt))
        fresh = ash.replica.files.bound.fresh
        assert fresh is not None
        keys.append((fresh.attempt, fresh.private))
    assert [attempt for attempt, _ in keys] == [1, 2]
    assert keys[0][1] != keys[1][1]
    # A COHORT of the attempt before, whose key is gone, is no reason to stop.
    first = replace(coordinator.request("ash", ash.run, ash.position), attempt=1)
    for site in sites:
        exchange(coordinator, site)
    coordinator.advance()
    again = replace(first, attempt=2)
    ash.respond(again)
    cohort = coordinator._cohort
    assert cohort is not None
    with pytest.raises(ProtocolError, match="no fresh key any more"):
        ask(coordinator, ash, cohort.data)
    assert ash.replica.files.bound.attempt == 0
    coordinator.fail([])
    up_to(coordinator, sites, Step.ENVELOPE)
    exchange(coordinator, ash)
    bound = ash.replica.files.bound
    assert (bound.attempt, bound.fresh) == (2, None)
    assert bound.padded is not None


def test_an_envelope_under_pads_that_does_not_open_to_what_was_stored_does_not_leave(padded: Make) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    pass_step(coordinator, sites)
    masked = SitePads.masked

    def broken(self: SitePads, residues: Any, seed: bytes, modulus: int) -> Any:
        wrong = masked(self, residues, seed, modulus)
        wrong[7] = (int(wrong[7]) + modulus // 3) % modulus  # one bit would be noise
        return wrong

    with mock.patch.object(SitePads, "masked", broken), pytest.raises(EnvelopeError, match="does not open to the"):
        exchange(coordinator, sites[0])
    assert sites[0].replica.files.bound.attempt == 0
    assert not sites[0].replica.files.folder.envelope(1).exists()


# What sites that lie gain


def spoil(entries: bytes, at: int) -> bytes:
    return entries[: 80 * at] + bytes([entries[80 * at] ^ 1]) + entries[80 * at + 1 :]


def deal_badly(maker: str, receiver_place: int) -> Any:
    """A site deals one share that does not open, and signs the root over it."""

    def dealing(mine: Any, seed: bytes, needed: int) -> Any:
        dealt = deal(mine, seed, needed)
        if mine.site != maker:
            return dealt
        entries = spoil(dealt.entries, receiver_place)
        leaves = [shares.leaf(entries[at : at + 48], entries[at + 48 : at + 80]) for at in range(0, len(entries), 80)]
        return Dealt(dealt.hidden._replace(shares=shares.tree(leaves)[0].hex()), entries)

    return mock.patch("secure_fed.clients.envelopes.deal", dealing)


def test_who_deals_a_bad_share_is_left_out_by_the_complaint(padded: Make) -> None:
    federation = padded(5)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    pass_step(coordinator, sites)
    with deal_badly("birch", 2):
        for site in sites:
            exchange(coordinator, site)
    coordinator.advance()
    assert coordinator.step is Step.CHECKED
    for site in sites:
        exchange(coordinator, site)
    coordinator.advance()
    assert (coordinator.attempt, coordinator.left_out) == (2, {"birch"})
    honest = [site for site in sites if site.name != "birch"]
    assert close(coordinator, honest).sites == ("ash", "cedar", "dogwood", "elm")


def test_who_complains_falsely_again_is_left_out_itself(padded: Make) -> None:
    federation = padded(6)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    liar = next(site for site in sites if site.name == "fir")
    for victim in ("ash", "birch"):
        asked = [site for site in sites if site.name not in coordinator.left_out]
        up_to(coordinator, asked, Step.CHECKED)
        for site in asked:
            if site is liar:
                check = coordinator._check
                assert check is not None
                word = sign_checked(federation.agreed, check.digest, "fir", [victim], liar.replica.identity.signing)
                coordinator.receive(RoundReply("fir", ReplyCode.CHECKED, liar.run, liar.position, "", word))
            else:
                exchange(coordinator, site)
        coordinator.advance()
    assert coordinator.left_out == {"ash", "fir"}
    assert close(coordinator, sites[1:5]).sites == ("birch", "cedar", "dogwood", "elm")


def test_who_complains_of_itself_or_of_one_who_is_not_there_is_refused(padded: Make) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.CHECKED)
    check, birch = coordinator._check, sites[1]
    assert check is not None
    for whom in ("birch", "zelkova"):
        word = sign_checked(federation.agreed, check.digest, "birch", [whom], birch.replica.identity.signing)
        with pytest.raises(EnvelopeError, match=f"CHECKED of birch over {whom}"):
            coordinator.receive(RoundReply("birch", ReplyCode.CHECKED, birch.run, birch.position, "", word))
    assert close(coordinator, sites).sites == NAMES[:4]


def test_a_wrong_check_is_named_and_others_speak_for_it(padded: Make, caplog: pytest.LogCaptureFixture) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    arrived = coordinator._arrived
    assert arrived is not None
    for site in sites:
        reply = site.respond(coordinator.request(site.name, site.run, site.position))
        if site.name == "birch":
            seed = site.replica.files.bound.padded.seed  # type: ignore[union-attr]
            word = sign_reveal(federation.agreed, arrived.digest, "birch", (1, 2), site.replica.identity.signing, seed)
            reply = replace(reply, envelope=word)
        coordinator.receive(reply)
    assert coordinator.advance() is None
    assert "birch: its REVEAL of round 1 is wrong" in caplog.text
    with pytest.raises(EnvelopeError, match="check does not fit its envelope"):
        coordinator.receive(reply.__class__("birch", ReplyCode.REVEALED, sites[1].run, 1, "", word))
    entry = close(coordinator, [sites[0], *sites[2:]])
    assert [one.site for one in entry.header.witnessed] == ["birch"]
    bring_up(coordinator, sites)


def test_who_speaks_for_another_and_sends_a_wrong_check_itself_does_not_count_in_the_record(padded: Make) -> None:
    """fir is gone; elm stands for it in truth, and lies over its own envelope: those who revealed rightly go on."""
    federation = padded(6)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    arrived, elm = coordinator._arrived, sites[4]
    assert arrived is not None
    for site in sites[:4]:
        exchange(coordinator, site)
    honest = exchange(coordinator, elm)
    seed = elm.replica.files.bound.padded.seed  # type: ignore[union-attr]
    word = sign_reveal(federation.agreed, arrived.digest, "elm", (1, 2), elm.replica.identity.signing, seed)
    coordinator.receive(replace(honest, envelope=word))
    assert coordinator.recover(["fir"])
    for site in (elm, *sites[:3]):
        assert exchange(coordinator, site).code == ReplyCode.WITNESSED
    entry = close(coordinator, sites[:4])
    assert [one.site for one in entry.header.witnessed] == ["elm", "fir"]
    assert [(word.site, at_places(word.gone, NAMES)) for word in entry.header.witnesses] == [
        (name, ("elm", "fir")) for name in NAMES[:4]
    ]
    bring_up(coordinator, sites)


def test_a_wrong_check_of_just_a_quorum_is_named_once_and_counts_no_more(
    padded: Make, caplog: pytest.LogCaptureFixture
) -> None:
    federation = padded(3)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    arrived, bound = coordinator._arrived, sites[1].replica.files.bound.padded
    assert arrived is not None
    assert bound is not None
    key = sites[1].replica.identity.signing
    wrong = [sign_reveal(federation.agreed, arrived.digest, "birch", (n, 2), key, bound.seed) for n in (1, 3)]
    for site in (sites[0], sites[2]):
        exchange(coordinator, site)
    coordinator.receive(RoundReply("birch", ReplyCode.REVEALED, sites[1].run, 1, "", wrong[0]))
    assert coordinator.advance() is None
    assert coordinator.asked == {"birch"}
    # It is not taken and named again as often as it is asked, but refused, which makes the server wait a while.
    for word in wrong:
        with pytest.raises(EnvelopeError, match="birch: its check does not fit"):
            coordinator.receive(RoundReply("birch", ReplyCode.REVEALED, sites[1].run, 1, "", word))
    assert coordinator.advance() is None
    assert caplog.text.count("its REVEAL of round 1 is wrong") == 1
    assert close(coordinator, sites).sites == NAMES[:3]
    bring_up(coordinator, sites)


def test_a_wrong_mask_a_wrong_witness_and_a_wrong_share_do_not_count_and_are_named(padded: Make) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    arrived = coordinator._arrived
    assert arrived is not None
    ash = sites[0]
    check = coordinator._wire.check_words(arrived.digest, coordinator._payload("ash"))
    key = ash.replica.identity.signing
    for seed, text in (("11" * 32, "another mask than"), (None, "no mask")):
        word = sign_reveal(federation.agreed, arrived.digest, "ash", check, key, seed)
        with pytest.raises(EnvelopeError, match=f"REVEAL of ash: {text}"):
            coordinator.receive(RoundReply("ash", ReplyCode.REVEALED, ash.run, 1, "", word))
    for site in sites[1:]:
        exchange(coordinator, site)
    assert coordinator.recover(["ash"])
    birch = sites[1]
    good = birch.respond(coordinator.request("birch", birch.run, birch.position))

    def word(arrived: str, **checks: tuple[int, int]) -> RoundReply:
        key = birch.replica.identity.signing
        return replace(good, envelope=sign_witness(federation.agreed, arrived, "birch", NAMES[:4], checks, key))

    own, cedar = (coordinator._true_check(name) for name in ("birch", "cedar"))
    lies = {
        "WITNESS of birch for ash: its checks do not fit": word(arrived.digest, ash=(1, 2)),
        "WITNESS of birch for ash, cedar: its checks do not fit": word(arrived.digest, ash=check, cedar=(1, 2)),
        "WITNESS of birch for ash, cedar: its checks do": word(arrived.digest, ash=cedar, cedar=check),
        "WITNESS of birch for cedar: its share is another": word(arrived.digest, cedar=cedar),
        "a WITNESS of birch for ash, birch in a reply of birch": word(arrived.digest, ash=check, birch=own),
        "WITNESS of birch: for 5555": word("5" * 64, ash=check),
    }
    for told, lie in lies.items():
        with pytest.raises(EnvelopeError, match=told):
            coordinator.receive(lie)
        assert not coordinator._shares.words
    with pytest.raises(EnvelopeError, match="WITNESS of birch for ash: its share is another"):
        coordinator.receive(replace(good, carried=bytes(32)))
    damaged = coordinator._envelopes.pop("ash")
    with pytest.raises(EnvelopeError, match="birch for ash: one's envelope was damaged here, and is awaited"):
        coordinator.receive(good)
    coordinator._envelopes["ash"] = damaged
    with pytest.raises(EnvelopeError, match="in a reply of cedar"):
        coordinator.receive(replace(good, site="cedar"))
    coordinator.receive(good)
    assert close(coordinator, sites[1:]).sites == NAMES[:4]


def test_shares_that_fit_and_do_not_rebuild_name_their_maker(padded: Make, caplog: pytest.LogCaptureFixture) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    pass_step(coordinator, sites)

    def dealing(mine: Any, seed: bytes, needed: int) -> Any:
        dealt = deal(mine, bytes(32) if mine.site == "ash" else seed, needed)
        return replace(dealt, hidden=dealt.hidden._replace(mask=commitment(seed, mine.site)))

    with mock.patch("secure_fed.clients.envelopes.deal", dealing):
        for site in sites:
            exchange(coordinator, site)
    up_to(coordinator, sites, Step.REVEAL)
    for site in sites[1:]:
        exchange(coordinator, site)
    assert coordinator.recover(["ash"])
    for site in sites[1:]:
        exchange(coordinator, site)
    assert "ash: the shares it dealt fit and do not give the mask" in caplog.text
    assert coordinator.advance() is None
    assert coordinator.asked == {"ash"}, "the round waits for it"
    assert close(coordinator, sites).sites == NAMES[:4]


# Records


def test_records_with_other_masks_or_witnesses_are_refused_and_not_decrypted(padded: Make) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    for site in sites[1:]:
        exchange(coordinator, site)
    coordinator.recover(["ash"])
    close(coordinator, sites[1:])
    data = coordinator.journal.read(1)
    frame, header = read_header(data, federation.agreed)
    (whose,), words = header.witnessed, header.witnesses
    arrived = sites[1].replica.state.chain.check(data).arrived

    def word(site: Site, arrived: str, **checks: tuple[int, int]) -> Any:
        frame = sign_witness(federation.agreed, arrived, site.name, NAMES[:4], checks, site.replica.identity.signing)
        return words[0]._replace(site=site.name, gone=places(NAMES[:4], checks), signature=frame[-64:].hex())

    lie = word(sites[1], arrived, ash=whose.products, cedar=(1, 2))
    changes: dict[str, Any] = {
        "another mask": {"masks": ("11" * 32, *header.masks[1:])},
        "masks swapped": {"masks": (header.masks[1], header.masks[0], *header.masks[2:])},
        "no masks": {"masks": ()},
        "one mask less": {"masks": header.masks[:-1]},
        "q - 1 witnesses": {"witnesses": words[:-1]},
        "a witness twice": {"witnesses": (words[0], *words[:-1])},
        "another check": {"witnessed": (whose._replace(first=f"{whose.products[0] ^ 1:016x}"),)},
        "a witness for another ARRIVED": {"witnesses": (word(sites[1], "5" * 64, ash=whose.products), *words[1:])},
        "one who has not revealed": {"witnesses": (word(sites[0], arrived, ash=whose.products), *words[1:])},
        "a word that also says another check than a REVEAL": {"witnesses": (lie, *words[1:])},
        "a word of somebody who revealed alone": {
            "witnesses": (*words, word(sites[3], arrived, birch=header.reveals[0].products))
        },
        "a word for others than its site spoke for": {"witnesses": (words[0]._replace(gone="05"), *words[1:])},
        "nobody witnessed": {"witnessed": ()},
        "no words": {"witnesses": ()},
        "witnessed for two": {"witnessed": (whose, whose._replace(site="birch")), "reveals": header.reveals[1:]},
    }
    payload = bytes(frame.payload)
    for what, changed in changes.items():
        record = sign_record(header.model_copy(update=changed), payload, federation.signing)
        with mock.patch.object(Cipher, "open") as spy, pytest.raises(RecordError):
            sites[1].respond(RoundRequest(2, 0, (record,), more=False))
        assert not spy.called, what
    bent = np.frombuffer(payload, np.uint8).copy()
    bent[0] ^= 1
    fields = payload_fields(bent.tobytes())
    record = sign_record(header.model_copy(update=fields), bent.tobytes(), federation.signing)
    with mock.patch.object(Cipher, "open") as spy, pytest.raises(RecordError):
        sites[1].respond(RoundRequest(2, 0, (record,), more=False))
    assert not spy.called
    bring_up(coordinator, sites)
    assert [site.round for site in sites] == [1] * 4


# What is left


def everything_in(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_keys_and_masks_of_a_closed_round_are_on_no_disk_and_its_envelopes_open_no_more(padded: Make) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    bound = {site.name: site.replica.files.bound for site in sites}
    recorded = {site.name: coordinator._payload(site.name) for site in sites}
    headers = {site.name: coordinator._envelopes[site.name].header for site in sites}
    secrets = [text for one in bound.values() if one.padded for text in (one.padded.private,)]
    state = everything_in(federation.folder / "sites")
    assert all(text.encode() in state for text in secrets), "while the round is open they are there"
    close(coordinator, sites)
    bring_up(coordinator, sites)
    state = everything_in(federation.folder)
    for text in secrets:
        assert text.encode() not in state
        assert bytes.fromhex(text) not in state
    # Whoever steals all disks now has the study's key, the journal with all masks, and recorded envelopes.
    for site in sites:
        header = headers[site.name]
        place = PadPlace(federation.agreed.study.id, header.position, header.attempt, header.cohort)
        lanes = federation.agreed.layout(1).lanes
        seed = {site.name: bytes.fromhex(bound[site.name].padded.seed)}  # type: ignore[union-attr]
        bare = without_masks(unpack_residues(recorded[site.name], lanes.modulus_bits), place, seed, lanes.modulus)
        binding = Binding(run=header.run, head=header.head, round=1)
        with pytest.raises(AggregateRefused):
            site.replica._sealer(header.key, 1).open(
                pack_residues(bare, lanes.modulus_bits), binding, [header.contribution]
            )


def test_integers_go_once_no_void_can_ask_for_them_again(padded: Make) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)

    def of(round_number: int) -> bytes:
        return bytes(integers_of(sites[0], round_number).tobytes())

    def take(position: int) -> bytes:
        """What lies at the site once it has taken a record, and before anything is asked of it."""
        record = coordinator.journal.read(position)
        sites[0].respond(RoundRequest(position + 1, 0, (record,), more=True))
        return everything_in(federation.folder / "sites/ash/state")

    reveal(coordinator, sites)
    close(coordinator, sites)
    first = of(1)
    assert first in take(1), "a void may take this record back"
    reveal(coordinator, sites)
    second = of(2)
    close(coordinator, sites)
    state = take(2)
    assert first not in state
    assert second in state
    reveal(coordinator, sites)
    close(coordinator, sites)
    third = of(3)
    state = take(3)
    assert sites[0].finished
    assert second not in state
    assert third in state
    ash = federation.folder / "sites/ash"
    close_site(ash / "state", ash / "identity", federation.agreed, abandon=False, destroy_identity=False)
    assert third not in everything_in(ash)


def test_keys_and_masks_go_with_the_record_also_where_a_site_stops_over_anothers_adapter(padded: Make) -> None:
    federation = padded(3)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    reveal(coordinator, sites)
    assert coordinator.advance() is not None
    assert sites[0].replica.files.bound.padded is not None
    stop = mock.patch.object(type(sites[0].replica), "compare", side_effect=AdapterMismatchError("another one"))
    with stop, pytest.raises(AdapterMismatchError):
        exchange(coordinator, sites[0])
    assert sites[0].round == 1
    kept = sites[0].replica.files.bound
    assert (kept.padded, kept.fresh) == (None, None)


def test_keys_and_masks_go_with_the_record_also_where_the_one_after_it_stops_the_site(padded: Make) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    reveal(coordinator, sites)
    coordinator.advance()
    coordinator.journal.append_extension(9)
    with pytest.raises(NotAcceptedError):
        exchange(coordinator, sites[0])
    assert sites[0].round == 1
    kept = sites[0].replica.files.bound
    assert (kept.padded, kept.fresh) == (None, None)


def test_keys_and_masks_go_when_a_site_starts_that_was_killed_between_its_record_and_their_end(padded: Make) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    reveal(coordinator, sites)
    coordinator.advance()
    with mock.patch.object(RunFiles, "erase_pads", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        exchange(coordinator, sites[0])
    assert sites[0].replica.files.bound.padded is not None
    again = federation.site("ash")
    assert again.round == 1
    kept = again.replica.files.bound
    assert (kept.padded, kept.fresh) == (None, None)


def test_keys_and_masks_of_a_run_that_was_left_in_a_round_go_when_another_begins(padded: Make) -> None:
    federation = padded(4)
    sites = federation.sites()
    up_to(federation.begin(sites), sites, Step.REVEAL)
    bound = [site.replica.files.bound for site in sites]
    secrets = [text for one in bound if one.padded for text in (one.padded.private, one.padded.seed)]
    coordinator = federation.begin(sites)
    pass_step(coordinator, sites)
    state = everything_in(federation.folder / "sites")
    assert len(secrets) == 8
    assert not any(text.encode() in state for text in secrets)


def test_keys_and_masks_go_when_a_study_is_closed_in_a_round(padded: Make) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    padded_now = sites[0].replica.files.bound.padded
    assert padded_now is not None
    folder = sites[0].replica.files.folder
    left = folder.bound.with_name(".bound.json.x1.part")  # of a process that was killed while it wrote
    left.write_bytes(folder.bound.read_bytes())
    ash = federation.folder / "sites/ash"
    close_site(ash / "state", ash / "identity", federation.agreed, abandon=True, destroy_identity=False)
    state = everything_in(ash)
    assert padded_now.private.encode() not in state
    assert padded_now.seed.encode() not in state


def test_keys_and_masks_go_once_a_sites_people_give_the_round_up_and_not_only_with_the_void(padded: Make) -> None:
    federation = padded(3)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    assert sites[0].replica.files.bound.padded is not None
    sites[0].void(1)
    kept = sites[0].replica.files.bound
    assert (kept.padded, kept.fresh) == (None, None)
    assert exchange(coordinator, sites[0]).code == ReplyCode.VOID


@pytest.mark.parametrize("colluders", [("ash",), ("ash", "dogwood")])
def test_a_server_with_colluding_sites_opens_no_single_update(padded: Make, colluders: tuple[str, ...]) -> None:
    """With the key, all masks and the colluders' own keys: what is left of birch's envelope tells nothing."""
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    victim = sites[1]
    lanes, padded_of = federation.agreed.layout(1).lanes, {}
    for site in sites:
        padded_of[site.name] = site.replica.files.bound.padded
    header = coordinator._envelopes["birch"].header
    place = PadPlace(federation.agreed.study.id, header.position, header.attempt, header.cohort)
    left = unpack_residues(coordinator._payload("birch"), lanes.modulus_bits)
    left = without_masks(left, place, {"birch": bytes.fromhex(padded_of["birch"].seed)}, lanes.modulus)
    for name in colluders:
        own = padded_of[name]
        theirs = SitePads(place, dict(zip(NAMES[:4], own.keys, strict=True)), name, bytes.fromhex(own.private))
        known = pad(theirs.pad_key("birch"), left.size, lanes.modulus)
        left = (left + (known if name < "birch" else lanes.modulus - known)) % np.uint64(lanes.modulus)
    binding = Binding(run=header.run, head=header.head, round=1)
    with pytest.raises(AggregateRefused):
        victim.replica.sealer.open(pack_residues(left, lanes.modulus_bits), binding, [header.contribution])
    cells = np.bincount((left * np.uint64(16) // np.uint64(lanes.modulus)).astype(np.int64), minlength=16)
    statistic = float(((cells - left.size / 16) ** 2 / (left.size / 16)).sum())
    assert statistic < 15 + 5 * 30**0.5, "uniform: 15 degrees of freedom, five standard deviations"


def test_the_claim_stands_in_evidence_and_report(padded: Make, tmp_path: Path) -> None:
    federation = padded(4)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    close(coordinator, sites)
    bring_up(coordinator, sites)
    claim = federation.agreed.study.quorum(federation.agreed.study.sites).claim
    pack_evidence(federation.folder / "sites" / "ash", tmp_path / "evidence.zip")
    found = verify_evidence(tmp_path / "evidence.zip")
    assert (found["rounds"], found["updates_in_sums"]) == (1, 1)
    assert found["together"] == claim
    assert claim in in_words(found)
    assert ("Collusion", claim) in study_facts(federation.agreed, "simulated")


def test_the_claim_stands_in_the_acceptance(padded: Make) -> None:
    federation = padded(4)
    quorum = federation.agreed.study.quorum(federation.agreed.study.sites)
    assert quorum.claim == (
        "the server and any one site together learn, of sites without a budget, one sum for each adapter state over at "
        "least 2 other sites, unless operators released another"
    )
    shown = terms(read_site_file(federation.folder / "sites" / "ash" / "site.toml"), federation.agreed)
    assert "carried" in shown["leaves"]["reply_fields"]
    assert "hidden" in shown["leaves"]["update_fields"]
    bare = terms(read_site_file(padded(4, 0).folder / "sites" / "ash" / "site.toml"), padded(4, 0).agreed)
    assert "carried" not in bare["leaves"]["reply_fields"]
    assert "hidden" not in bare["leaves"]["update_fields"]


@pytest.mark.slow
def test_a_simulation_by_the_command_line_has_pads_and_gives_the_same_adapter(
    secfacmic: Run, six_images: Path, tmp_path: Path
) -> None:
    sites = [{"name": name} for name in NAMES[:4]]
    played = [{"name": name, "folder": name} for name in NAMES[:4]]
    simulation = template_table()["simulation"] | {"sites": played}
    adapters = []
    for name, changes in (("said", {"collusion": None}), ("off", {"collusion": 0}), ("plain", {"mode": "plain"})):
        template = with_fields(make_template(sites=sites, simulation=simulation, rounds=2), **changes)
        (tmp_path / f"{name}.toml").write_text(to_toml(template))
        out = tmp_path / name
        done = secfacmic("simulate", tmp_path / f"{name}.toml", "--data", six_images, "--out", out)
        assert done.returncode == 0, done.stderr
        assert load_study(out / "study.toml").study.colluders == (name == "said")
        adapters.append((out / "adapter.safetensors").read_bytes())
        journal = secfacmic("journal", "verify", out / "server", "--study", out / "study.toml")
        assert journal.returncode == 0, journal.stderr
    first, *others = (safetensors.numpy.load(data) for data in adapters)
    for other in others:
        assert all(np.array_equal(first[key], other[key]) for key in first)
