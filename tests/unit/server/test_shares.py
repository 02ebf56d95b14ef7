"""What the server does with shares that it cannot open: hands them on, combines them, and says whose doing it is."""

from __future__ import annotations

import pytest

from secure_fed.core.errors import EnvelopeError, ProtocolError
from secure_fed.protocol.envelope import RoundPosition
from secure_fed.protocol.pads import PadPlace, SitePads, new_private, public_of
from secure_fed.protocol.round_frames import SignedWord
from secure_fed.protocol.share_frames import (
    CheckedHeader,
    Dealt,
    Handed,
    Witness,
    deal,
    open_handed,
    share_digest,
    take_handed,
)
from secure_fed.protocol.signing import payload_fields
from secure_fed.server.shares import Shares, StandIn

NAMES, NEEDED = ("ash", "birch", "cedar", "dogwood", "elm"), 3
PLACE = PadPlace("5" * 64, RoundPosition("1" * 64, "2" * 64, "3" * 64, 0, 1), 1, "4" * 64)
CHECK, WORD = (7, 8), "9" * 128


class Attempt:
    """Five sites that have dealt to each other, and the server between them."""

    def __init__(self, names: tuple[str, ...] = NAMES) -> None:
        private = {name: new_private() for name in names}
        keys = {name: public_of(one) for name, one in private.items()}
        self.pads = {name: SitePads(PLACE, keys, name, private[name]) for name in names}
        self.seeds = {name: bytes([place]) * 32 for place, name in enumerate(names)}
        self.dealt = {name: deal(self.pads[name], self.seeds[name], NEEDED) for name in names}
        self.server = Shares(names, NEEDED)
        for name in names:
            self.take(name, self.dealt[name])

    def take(self, maker: str, dealt: Dealt) -> None:
        self.server.take(maker, dealt.entries, dealt.hidden.shares)

    def share(self, gone: str, helper: str) -> bytes:
        """What a helper finds in the share that was dealt to it."""
        roots = {gone: self.dealt[gone].hidden.shares}
        found, rest = take_handed(self.server.handed(gone, helper), NAMES, [gone], helper, roots)
        assert not rest
        return open_handed(self.pads[helper], gone, found[gone])

    def miss(self, gone: str) -> StandIn:
        self.server.gone[gone] = StandIn(gone, self.dealt[gone].hidden.mask, CHECK)
        return self.server.gone[gone]

    def say(self, helper: str, gone: str, word: str = WORD) -> None:
        """One word for all that the helper has spoken for, and this one."""
        before, _ = self.server.words.get(helper, ((), ""))
        self.server.witness(helper, tuple(sorted({*before, gone})), word, self.share(gone, helper))


def checked(site: str, *complaints: str) -> CheckedHeader:
    return CheckedHeader(
        version=2, study="5" * 64, check="6" * 64, site=site, complaints=complaints, **payload_fields(b"")
    )


def test_each_site_is_handed_what_all_others_dealt_to_it() -> None:
    attempt = Attempt()
    roots = {name: one.hidden.shares for name, one in attempt.dealt.items()}
    for name in NAMES:
        makers = [other for other in NAMES if other != name]
        found, rest = take_handed(attempt.server.for_site(name), NAMES, makers, name, roots)
        assert (list(found), rest) == (makers, b"")
        for maker, handed in found.items():
            open_handed(attempt.pads[name], maker, handed)


def test_what_a_maker_has_not_signed_is_refused_by_its_name_and_nothing_of_it_is_kept() -> None:
    attempt = Attempt()
    good = attempt.dealt["birch"]
    for entries in (b"", good.entries[:-1], good.entries + b"x", bytes([good.entries[0] ^ 1]) + good.entries[1:]):
        with pytest.raises(EnvelopeError, match="envelope of birch: "):
            attempt.server.take("birch", entries, good.hidden.shares)
    assert attempt.share("birch", "ash")


def test_a_share_that_is_handed_on_otherwise_than_it_was_dealt_is_the_carriers_doing() -> None:
    attempt = Attempt()
    handed, roots = attempt.server.handed("elm", "ash"), {"elm": attempt.dealt["elm"].hidden.shares}
    for place in (0, 47, 48, 79, 80, len(handed) - 1):  # sealed, digest, path
        data = handed[:place] + bytes([handed[place] ^ 1]) + handed[place + 1 :]
        with pytest.raises(ProtocolError, match="the share of elm was handed on otherwise"):
            take_handed(data, NAMES, ["elm"], "ash", roots)
    for data in (b"", handed[:-1], attempt.server.handed("elm", "birch"), attempt.server.handed("dogwood", "ash")):
        with pytest.raises(ProtocolError, match="the share of elm was handed on otherwise"):
            take_handed(data, NAMES, ["elm"], "ash", roots)


def test_a_share_that_opens_to_another_than_its_maker_names_is_its_makers_doing() -> None:
    attempt = Attempt()
    sealed = attempt.pads["elm"].seal_share(bytes(32), "ash")
    for digest in (share_digest(bytes(32), "elm", "birch"), share_digest(b"\1" * 32, "elm", "ash")):
        with pytest.raises(EnvelopeError, match="the share of elm is not the one that it names"):
            open_handed(attempt.pads["ash"], "elm", Handed(sealed, digest))
    assert open_handed(attempt.pads["ash"], "elm", Handed(sealed, share_digest(bytes(32), "elm", "ash"))) == bytes(32)


def test_with_just_a_quorum_nobody_deals_and_shares_are_refused() -> None:
    attempt = Attempt(NAMES[:3])
    assert not attempt.server.deals
    assert attempt.dealt["ash"].entries == b""
    with pytest.raises(EnvelopeError, match=r"envelope of ash: .* bytes of shares; expected 0"):
        attempt.server.take("ash", bytes(80), attempt.dealt["ash"].hidden.shares)
    with pytest.raises(EnvelopeError, match="envelope of ash: its header names shares"):
        attempt.server.take("ash", b"", "11" * 32)


def test_a_complaint_stands_until_its_site_says_otherwise() -> None:
    server, word = Shares(NAMES, NEEDED), SignedWord("00" * 8, "0" * 128)
    server.answer(checked("ash", "birch"), word)
    assert (server.answered, server.complaints, server.checked) == ({"ash"}, {"ash": ("birch",)}, {})
    server.answer(checked("ash"), word)
    assert (server.answered, server.complaints, server.checked) == ({"ash"}, {}, {"ash": word})


def test_a_quorum_of_words_and_shares_stand_for_one_who_is_gone_and_no_fewer() -> None:
    attempt = Attempt()
    stand_in = attempt.miss("elm")
    for number, helper in enumerate(("ash", "birch", "cedar")):
        assert attempt.server.stand_ins == {}
        assert attempt.server.lacking(helper) == "elm"
        attempt.say(helper, "elm")
        assert attempt.server.lacking(helper) is None
        assert attempt.server.lacking("elm") is None, "nobody speaks for itself"
        assert len(attempt.server.speakers("elm")) == number + 1
    assert attempt.server.lacking("dogwood") is None, "enough have spoken"
    assert stand_in.seed == attempt.seeds["elm"].hex()
    assert attempt.server.stand_ins == {"elm": stand_in}
    witnessed = attempt.server.witnessed("elm")
    assert (witnessed.site, witnessed.products) == ("elm", CHECK)
    assert attempt.server.witnesses(["elm"]) == [Witness(name, "10", WORD) for name in ("ash", "birch", "cedar")]


def test_words_are_kept_in_order_of_names_and_those_of_any_quorum_do() -> None:
    attempt = Attempt()
    stand_in = attempt.miss("birch")
    for helper in ("elm", "ash", "dogwood"):
        attempt.say(helper, "birch")
    assert stand_in.seed == attempt.seeds["birch"].hex()
    assert [word.site for word in attempt.server.witnesses(["birch"])] == ["ash", "dogwood", "elm"]
    attempt.say("cedar", "birch")  # was on its way
    assert [word.site for word in attempt.server.witnesses(["birch"])] == ["ash", "cedar", "dogwood"]


def test_of_one_whose_mask_is_known_the_words_of_a_quorum_are_needed_all_the_same() -> None:
    """It has revealed the right mask with a wrong check."""
    attempt = Attempt()
    attempt.miss("elm").seed = attempt.seeds["elm"].hex()
    for helper in ("ash", "birch"):
        attempt.say(helper, "elm")
    assert attempt.server.stand_ins == {}
    attempt.say("dogwood", "elm")
    assert list(attempt.server.stand_ins) == ["elm"]


def test_who_does_not_count_itself_speaks_for_nobody_and_another_is_asked() -> None:
    attempt = Attempt()
    stand_in = attempt.miss("elm")
    for helper in ("ash", "birch", "cedar"):
        attempt.say(helper, "elm")
    attempt.server.take_no_word_of("birch")
    assert attempt.server.stand_ins == {}
    assert attempt.server.lacking("birch") == "elm", "once its right REVEAL is in"
    assert attempt.server.lacking("dogwood") == "elm"
    attempt.say("dogwood", "elm")
    assert attempt.server.speakers("elm") == {"ash", "cedar", "dogwood"}
    assert attempt.server.stand_ins == {"elm": stand_in}


def test_each_is_asked_for_one_who_is_gone_after_the_other() -> None:
    attempt = Attempt()
    attempt.miss("dogwood")
    attempt.miss("elm")
    assert attempt.server.lacking("ash") == "dogwood"
    attempt.say("ash", "dogwood")
    assert attempt.server.lacking("ash") == "elm"
    attempt.say("ash", "elm", "8" * 128)
    assert attempt.server.lacking("ash") is None
    assert attempt.server.words == {"ash": (("dogwood", "elm"), "8" * 128)}, "one word, for both"


def test_a_server_that_was_started_again_asks_for_each_share_anew_though_a_word_speaks_for_all() -> None:
    attempt = Attempt()
    attempt.miss("dogwood")
    attempt.miss("elm")
    for helper in ("ash", "birch", "cedar"):
        share = attempt.share("elm", helper)
        attempt.server.witness(helper, ("dogwood", "elm"), WORD, share)  # asked for elm, had spoken for dogwood before
        assert attempt.server.lacking(helper) == "dogwood"
    assert list(attempt.server.stand_ins) == ["elm"]
    for helper in ("ash", "birch", "cedar"):
        attempt.say(helper, "dogwood")
    assert list(attempt.server.stand_ins) == ["dogwood", "elm"]


def test_an_older_word_that_comes_again_takes_no_newer_ones_place_and_one_that_leaves_somebody_out_is_refused() -> None:
    attempt = Attempt()
    for gone in ("birch", "dogwood", "elm"):
        attempt.miss(gone)
    attempt.say("ash", "dogwood", "7" * 128)
    attempt.say("ash", "elm", "8" * 128)
    attempt.server.witness("ash", ("dogwood",), "7" * 128, attempt.share("dogwood", "ash"))
    assert attempt.server.words == {"ash": (("dogwood", "elm"), "8" * 128)}
    with pytest.raises(EnvelopeError, match="WITNESS of ash for birch, elm: leaves out dogwood, for whom it has"):
        attempt.server.witness("ash", ("birch", "elm"), WORD, attempt.share("birch", "ash"))
    assert attempt.server.words == {"ash": (("dogwood", "elm"), "8" * 128)}
    assert not attempt.server.gone["birch"].points


def test_a_record_keeps_no_more_words_than_those_who_are_gone_need() -> None:
    """Those of all for whom others spoke, but for who came back; a word of which each has enough is left out."""
    names = (*NAMES, "fir", "gorse")
    server = Shares(names, NEEDED)
    said = {"ash": "fg", "birch": "f", "cedar": "fg", "dogwood": "g", "elm": "fg"}
    for site, letters in said.items():
        server.words[site] = tuple(name for name in ("fir", "gorse") if name[0] in letters), WORD
    assert [(word.site, word.gone) for word in server.witnesses(["fir", "gorse"])] == [
        *(("ash", "60"), ("birch", "20"), ("cedar", "60"), ("dogwood", "40"))
    ]
    assert [word.site for word in server.witnesses(["fir"])] == ["ash", "birch", "cedar"]
    assert server.witnesses([]) == []


def test_a_word_or_share_that_does_not_fit_names_its_sender_and_counts_for_nothing() -> None:
    attempt = Attempt()
    stand_in = attempt.miss("elm")
    share = attempt.share("elm", "ash")
    for wrong in (attempt.share("elm", "birch"), attempt.share("dogwood", "ash"), share[:-1], bytes(32)):
        with pytest.raises(EnvelopeError, match="WITNESS of ash for elm: its share is another"):
            attempt.server.witness("ash", ("elm",), WORD, wrong)
    assert (attempt.server.words, stand_in.points) == ({}, {})


def test_shares_that_fit_and_do_not_rebuild_name_their_maker_and_nobody_is_asked_any_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    attempt = Attempt()
    other = deal(attempt.pads["elm"], bytes(32), NEEDED)  # of another secret than the one that its header names
    attempt.dealt["elm"] = Dealt(attempt.dealt["elm"].hidden._replace(shares=other.hidden.shares), other.entries)
    attempt.take("elm", attempt.dealt["elm"])
    stand_in = attempt.miss("elm")
    for helper in ("ash", "birch", "cedar"):
        assert not caplog.text
        attempt.say(helper, "elm")
    assert stand_in.broken
    assert "elm: the shares it dealt fit and do not give the mask it committed to" in caplog.text
    assert attempt.server.stand_ins == {}
    assert attempt.server.lacking("dogwood") is None
