"""One round at a site: take the journal's new records, apply them, and answer the server's questions.

Knows nothing of Flower. What it makes of its images is in :mod:`secure_fed.clients.learner`; all that must survive a
crash lies in the site's state folder (:mod:`secure_fed.core.layout`).
"""

from __future__ import annotations

import logging
import time
from importlib.metadata import version
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric import ec

from secure_fed.clients import memory, one_sum
from secure_fed.clients.acceptance import acceptance_digest
from secure_fed.clients.bound import Bound, Fresh
from secure_fed.clients.budget import ledger_folder
from secure_fed.clients.envelopes import Envelopes
from secure_fed.clients.erasure import withdrawn
from secure_fed.clients.learner import Learner
from secure_fed.clients.replica import LastSum
from secure_fed.clients.shares import HeldShares
from secure_fed.clients.sitefile import SiteFile, read_site_file
from secure_fed.clients.snapshot import write_snapshot
from secure_fed.core.errors import (
    BudgetError,
    BudgetSpentError,
    EnvelopeError,
    KeyFileError,
    ProtocolError,
    SiteFileError,
)
from secure_fed.core.storage import write_durable
from secure_fed.privacy.ledger import snapshot_key
from secure_fed.protocol import codec
from secure_fed.protocol.envelope import MAGIC as ENVELOPE_MAGIC
from secure_fed.protocol.envelope import MAX_HEADER, EnvelopeHeader, verify_contribution
from secure_fed.protocol.pads import new_private, public_of
from secure_fed.protocol.presence import PresenceQuestion, sign_presence
from secure_fed.protocol.records import Record
from secure_fed.protocol.round_frames import (
    ARRIVED_MAGIC,
    COHORT_MAGIC,
    MAX_WORD,
    REVEAL_MAGIC,
    ArrivedHeader,
    RevealHeader,
    SignedWord,
    check_arrived,
    check_cohort,
    products,
    releasing,
    sign_ready,
    sign_retired,
    sign_reveal,
    sign_void,
    split_word,
)
from secure_fed.protocol.rounds import ReplyCode, RoundReply, RoundRequest
from secure_fed.protocol.share_frames import (
    CHECK_MAGIC,
    GONE_MAGIC,
    GoneHeader,
    check_check,
    check_digest,
    check_gone,
    refuse_unchecked,
    sign_checked,
    sign_witness,
)
from secure_fed.protocol.signing import ZERO_DIGEST, Frame, parse_header, split_frame, verify_member
from secure_fed.protocol.study import AgreedStudy, load_study

log = logging.getLogger(__name__)


class Site(Learner):
    """One hospital in a study: learns from its images, for and from the adapter of its replica of the journal.

    Made as a :class:`Learner` is; raises as it does.
    """

    def __init__(self, file: SiteFile, agreed: AgreedStudy) -> None:
        super().__init__(file, agreed)
        self._froze = False
        self._envelopes = Envelopes(agreed, self.replica)

    @classmethod
    def open(cls, path: Path) -> Site:
        """A site from its ``site.toml``."""
        file = read_site_file(path)
        return cls(file, load_study(Path(file.study)))

    @property
    def position(self) -> int:
        """How many records of the run the site has, as far as the server's journal is the same."""
        return self.replica.position

    @property
    def round(self) -> int:
        """The last round that is applied here (or was refused here); 0 before the first."""
        return self.replica.state.round

    @property
    def rounds(self) -> int:
        """How many the run has: the study's, or more by an extension."""
        return self.replica.state.chain.rounds

    @property
    def authority(self) -> str | None:
        """SHA-256 of the certificate of the authority that an amendment named, which alone is trusted; else None."""
        return self.replica.state.chain.authority

    @property
    def over(self) -> bool:
        """Whether nothing is left to do here: every round is applied, and no further run was accepted."""
        return self.finished and not self.replica.awaits_run

    @property
    def adapter_digest(self) -> str:
        """SHA-256 of the adapter it holds; for the site's own eyes."""
        return codec.adapter_digest(self.parameters)

    @property
    def connection_key(self) -> ec.EllipticCurvePrivateKey:
        """The private key that opens its connection."""
        return self.replica.identity.flower

    @property
    def signing_key(self) -> str:
        """The public half of the key that signs its envelopes, 64 hex digits."""
        return self.replica.identity.keys.signing

    @property
    def _can_seal(self) -> bool:
        """Whether it holds the key in force; who does not reads no data and spends no budget."""
        return self._agreed.study.mode == "plain" or self.replica.keys.holds(self.replica.state.chain.key)

    @property
    def read_data(self) -> bool:
        """Whether the last reply, or its refusal, took work on the site's data or on the ledger, which knows its
        patients, under a budget: then it leaves at a fixed time."""
        return self._private is not None and (self._private.worked or self._froze)

    def respond(self, request: RoundRequest) -> RoundReply:
        """Take a request: apply its records, compare adapters, and train if a round is due.

        Raises:
            RecordError: a record is refused; the adapter is as it was.
            AdapterMismatchError: another site holds another adapter.
            NonFiniteUpdateError: training diverged; nothing is sent.
            SecfacmicError: others, for the site's own data and disk.
        """
        torch.set_num_threads(self._file.threads)
        if self.run and self.replica.goes_back(request.after):
            return self._reply(ReplyCode.MORE)
        before = self.round
        for data in request.records:
            self.replica.take(data)
        if self._agreed.study.method.sums and before == 0 < self.round:
            what = one_sum if self._agreed.study.method.one_sum else memory
            what.tell(self._agreed, self.replica.state.tensors)
        if self._private is not None:
            self._private.worked = False
        frozen = self._snapshot
        self._froze = frozen is not None and not frozen.exists() and self._can_seal
        if frozen is not None and self._froze:
            # Before the run's first message.
            write_snapshot(frozen, self.features(), snapshot_key(ledger_folder(self._file)))
        self.replica.compare(request.attested_head, request.attestations)
        chain = self.replica.state.chain
        # What it gave up is the round; an amendment that came meanwhile waits for its word for the adapter.
        if self._voided and not chain.awaits_checkpoint:
            return self._reply(ReplyCode.VOID, self._void())
        if request.more:
            return self._reply(ReplyCode.MORE)
        if chain.length and self.name not in chain.members:
            raise SiteFileError(f"site {self.name} left the study with amendment {chain.amendment}; it is over here")
        if chain.awaits_checkpoint and not self.replica.state.blind:
            return self._reply(ReplyCode.ACKNOWLEDGED, self.replica.acknowledgement())
        if chain.awaits_checkpoint:
            return self._reply(ReplyCode.APPLIED)
        if self.replica.state.blind:
            raise KeyFileError(
                f"the adapter of round {chain.round} cannot be opened: its key is not here and no checkpoint "
                "follows; take the key of this run, or wait for the next rotation"
            )
        if not chain.length or request.round != chain.due.round:
            raise ProtocolError(f"asked for round {request.round}; the journal here ends after round {chain.round}")
        if chain.finished and self._private is not None:
            self._private.finish()
        if chain.finished or not self._trains(self.name):
            return self._reply(ReplyCode.APPLIED)
        bound = self.replica.files.bound.at(self.replica.due)
        # Members of an open round stay to its end, also those whose READY is in a COHORT already.
        if bound.retired and not bound.attempt and request.question[:4] != COHORT_MAGIC:
            return self._retired()
        if self.replica.paused:
            return self._reply(ReplyCode.REFUSED_AGGREGATE)
        self._notice_past(request.past)
        if self._sits_out:
            return self._reply(ReplyCode.SITS_OUT)
        if not request.attempt:
            return self._reply(ReplyCode.APPLIED)
        kind = request.question[:4]
        if kind == ARRIVED_MAGIC:
            return self._reply(ReplyCode.REVEALED, self._reveal(request.question, request.carried))
        if kind == CHECK_MAGIC:
            return self._reply(ReplyCode.CHECKED, self._answer_for_shares(request.question, request.carried))
        if kind == GONE_MAGIC:
            return self._reply(ReplyCode.WITNESSED, *self._stand_for(request.question, request.carried))
        if self._private is None and withdrawn(self.replica.files.folder, self.replica.due, request.attempt):
            log.warning("%s: round %d: its update was dropped, so it sends none", self.name, request.round)
            return self._reply(ReplyCode.APPLIED)
        if self._gave_others:
            log.warning(
                "%s: round %d: the update that it revealed at this adapter was dropped or lost, so it sends none until "
                "the adapter has moved; if its people mean it to send another: secfacmic site release",
                *(self.name, request.round),
            )
            return self._reply(ReplyCode.APPLIED)
        try:
            if kind == COHORT_MAGIC:
                return self._reply(ReplyCode.UPDATE, *self._envelope(request.question, request.held))
            return self._reply(ReplyCode.READY, self._ready(request.attempt))
        except BudgetSpentError as error:
            log.warning("%s: %s", self.name, error)
            self.retire()
            return self._reply(ReplyCode.APPLIED) if bound.attempt else self._retired()
        except BudgetError as error:
            log.warning("%s: %s", self.name, error)
            return self._reply(ReplyCode.APPLIED)

    def _retired(self) -> RoundReply:
        key = self.replica.identity.signing
        return self._reply(ReplyCode.RETIRED, sign_retired(self._agreed, self.run, self.name, key))

    def present(self, question: PresenceQuestion, rate: float, rehearsed: tuple[str, int] = ("", 0)) -> RoundReply:
        """Its word, before the first round, that it is there and ready; or that it rehearses.

        Args:
            question: the server's.
            rate: bytes a second that its line takes.
            rehearsed: SHA-256 and length of what it has sent in a rehearsal, to fetch it again.

        Raises:
            SecfacmicError: what its data, ledger, backbone or acceptance lack; nothing of it is said.
        """
        if not rehearsed[0]:
            self.replica.require_word(question.run)
            self.features()
        word = sign_presence(
            self._agreed,
            self.name,
            self.replica.identity.signing,
            run=question.run,
            purpose="rehearsal" if rehearsed[0] else "ready",
            accepted=(ZERO_DIGEST if rehearsed[0] else acceptance_digest(self._file, self._agreed, self.signing_key)),
            keyed=self._agreed.study.mode == "plain" or self.replica.keys.holds(question.key),
            secfacmic=version("secfacmic"),
            clock_ms=time.time_ns() // 1_000_000,
            rate=int(rate),
            rehearsed=rehearsed[0],
            rehearsed_bytes=rehearsed[1],
        )
        position = self.position if self.run == question.run else 0
        return RoundReply(self.name, ReplyCode.PRESENT, question.run, position, "", word)

    def _reply(self, code: ReplyCode, envelope: bytes = b"", carried: bytes = b"") -> RoundReply:
        return RoundReply(self.name, code, self.run, self.position, self.replica.attestation(), envelope, carried)

    # --- a disk that is older than this site's words ---

    def _notice_past(self, past: bytes) -> None:
        """Hold the newest word that the server has of this site in the open round against what its disk knows."""
        if not past:
            return
        due, members = self.replica.due, self.replica.state.chain.members
        bound = self.replica.files.bound.at(due)
        header: RevealHeader | EnvelopeHeader
        if past[:4] == REVEAL_MAGIC:
            word = split_word(REVEAL_MAGIC, past)
            study = self._agreed.study.id
            header = verify_member(REVEAL_MAGIC, *word.signed, RevealHeader, study, members, MAX_WORD, EnvelopeError)
            known = header.arrived == bound.arrived
        else:
            frame = split_frame(ENVELOPE_MAGIC, past, MAX_HEADER, EnvelopeError)
            header = verify_contribution(frame.header, frame.signature, self._agreed, members)
            known = header.run != due.run or bound.knows(header)
        if header.site != self.name:
            raise ProtocolError(f"as this site's own last word, one of {header.site}; expected one of {self.name}")
        if not known:
            self.replica.files.fall_behind()

    @property
    def _sits_out(self) -> bool:
        """Whether this site is behind its own past, and the open round the one in which it may have said anything.

        Nobody knows to whom it revealed at this adapter, so that without a budget it gives nothing there without its
        people's word; with the next adapter it goes on.
        """
        files = self.replica.files
        bound = files.bound.at(self.replica.due)
        if bound.behind:
            bound = bound.giving(self.replica.asked_for, (), self.replica.state.chain.sum)
            bound = bound.model_copy(update={"behind": False, "out": True, "released": ""})
            files.bind(bound)
            log.warning(
                "%s: this state folder is older than what this site has said since: a copy was put back. It sits round "
                "%d out and goes on with the next; if a sum of that round is lost, people give it up: secfacmic site "
                "void. Ask who put a copy back; if nobody did, the server shows an old word of this site as its newest",
                *(self.name, bound.round),
            )
        return bound.out

    # --- the round: READY, then an envelope for one COHORT after the other, then one REVEAL ---

    def _ready(self, attempt: int) -> bytes:
        """Train, unless the round's integers are there, and say so."""
        due = self.replica.due
        bound = self.replica.files.bound.at(due)
        self._refuse_past("asked for", attempt, bound, bound.attempt)
        self.replica.sealer  # noqa: B018 -- who cannot seal reads no data and spends no budget
        self._integers()
        self._refuse_given()
        released = self._may_give_others(bound)
        fresh = public_of(self._fresh_key(attempt)) if self._agreed.study.pads else None
        return sign_ready(self._agreed, due, attempt, self.name, released, self.replica.identity.signing, fresh)

    def _refuse_past(self, what: str, attempt: int, bound: Bound, least: int) -> None:
        """Begin no attempt after a REVEAL, and none before the newest."""
        if bound.arrived or attempt < least:
            raise ProtocolError(
                f"{what} attempt {attempt} of round {bound.round}, but "
                + ("a REVEAL was sent" if bound.arrived else f"attempt {bound.attempt} was answered")
                + " already; expected a later one, and none after a REVEAL"
            )

    def _fresh_key(self, attempt: int) -> bytes:
        """The private key for an attempt; on disk before its public half leaves."""
        bound = self.replica.files.bound.at(self.replica.due)
        if bound.padded is not None and bound.attempt == attempt:
            return bytes.fromhex(bound.padded.private)
        if bound.fresh is None or bound.fresh.attempt != attempt:
            bound = bound.model_copy(update={"fresh": Fresh(attempt=attempt, private=new_private().hex())})
            self.replica.files.bind(bound)
        assert bound.fresh is not None
        return bytes.fromhex(bound.fresh.private)

    def _envelope(self, question: bytes, held: str) -> tuple[bytes, bytes]:
        """The envelope for a COHORT, without its payload if the server has that already, and the shares with it.

        The ciphertext is made once a round, head and key: another attempt signs another header over the same bytes.
        With pads it is made anew for each attempt, since its pads are others.
        """
        due, files = self.replica.due, self.replica.files
        chain = self.replica.state.chain
        header, names, cohort = check_cohort(question, self._agreed, chain.members, due, chain.quorum)
        if self.name not in names:
            raise ProtocolError(f"COHORT of {', '.join(names)}; expected this site in it")
        bound = files.bound.at(due)
        again = (header.attempt, cohort) == (bound.attempt, bound.cohort)
        if not again:
            self._refuse_past("COHORT of", header.attempt, bound, bound.attempt + 1)
        self._refuse_another_cohort(bound, names, releasing(header))
        words = {"attempt": header.attempt, "cohort": cohort, "names": names}
        if self._agreed.study.pads:
            if again:
                return self._envelopes.sent_before(bound)
            data, padded = self._envelopes.padded(bound, header, cohort, self._integers)
            write_durable(files.folder.question("cohort"), question, 0o600)
            files.bind(bound.model_copy(update=words | {"padded": padded, "fresh": None}))
            return data, bytes.fromhex(padded.shares)
        data = self._envelopes.sealed(header.attempt, cohort, self._integers)
        if not again:
            write_durable(files.folder.question("cohort"), question, 0o600)
            files.bind(bound.model_copy(update=words))
        frame = split_frame(ENVELOPE_MAGIC, data, MAX_HEADER, EnvelopeError)
        known = parse_header(frame.header, EnvelopeHeader, EnvelopeError).payload
        return data[: len(data) - len(frame.payload)] if held == known else data, b""

    def _refuse_another_cohort(self, bound: Bound, names: tuple[str, ...], releasing: frozenset[str]) -> None:
        """At one adapter state a site gives its integers to one cohort: of two sums, who is in one and not in the other
        could be computed. For another it needs the word of the people of all that are in either: this cohort's, in its
        READYs; who is only in the one before has retired, or was removed by a quorum.

        A site under a budget sends the same noise again: it hides itself in either sum, and nobody else in the
        difference. So it lacks no word of its own, nor of others that have a budget, but those of all that have none.
        """
        state = self.replica.asked_for
        before = bound.given.get(state)
        if before is None or before == names:
            return
        unheard = sorted(set(names) - releasing)
        if self._agreed.study.mode == "he":  # in plain the server sees each update, and nobody can be removed
            gone = set(before) - set(names) - set(bound.noised.get(state, ()))
            unheard += sorted(name for name in gone if self._trains(name))
        if unheard or not self._may_give_others(bound):
            raise ProtocolError(
                f"a cohort of {', '.join(names)} at an adapter for which this site has revealed to "
                f"{', '.join(before) or 'sites that its disk does not know'}; expected the same one: the difference of "
                "the two sums is somebody's update. If the people of all mean it, each says so at its own site: "
                f"secfacmic site release; still to be heard: {', '.join(unheard) or self.name}; who is in neither any "
                "more must have left the study"
            )

    def _may_give_others(self, bound: Bound) -> bool:
        """Whether as far as this site goes it may be in a sum with others than before: by its budget, or its people's
        word."""
        return self._private is not None or bound.released == self.replica.asked_for

    def _trains(self, name: str) -> bool:
        member = self.replica.state.chain.members.get(name)
        return member is not None and member.role == "train"

    @property
    def _voided(self) -> bool:
        """Whether its people have given the round that is open up."""
        return bool(self.run) and self._trains(self.name) and self.replica.files.bound.at(self.replica.due).void

    def _void(self) -> bytes:
        due = self.replica.due
        revealed = self.replica.files.bound.at(due).may_have_revealed
        return sign_void(self._agreed, due, self.name, revealed, self.replica.identity.signing)

    def void(self, round_number: int) -> bool:
        """Its people's word that it says nothing more for the open round; sent when the server asks next.

        Or for the round of its last record: it takes that back.

        Returns:
            Whether it had revealed: then somebody may hold the round's sum.

        Raises:
            ProtocolError: another round is open here, or none; or it has revealed in a later one.
        """
        last = self.replica.last_sum() if self.run else None
        # Who stands by an amendment has acknowledged, or will, what it has of the round.
        if last is not None and last.record.header.round == round_number and "amendment" not in last.after:
            return self._give_back(last)
        chain = self.replica.state.chain
        due = self.replica.due
        open_here = bool(self.run) and not chain.finished and not chain.awaits_checkpoint
        if not open_here or due.round != round_number or not self._trains(self.name):
            raise ProtocolError(
                f"a void of round {round_number}; the round that is open here is {due.round if open_here else 'none'}, "
                f"of {self.rounds}, and only training sites give one up"
            )
        bound = self.replica.files.bound.at(due)
        self.replica.files.bind(bound.model_copy(update={"void": True, "fresh": None, "padded": None}))
        return bound.may_have_revealed

    def _give_back(self, last: LastSum) -> bool:
        """The same for a round whose record it has applied, and on which it has revealed nothing yet."""
        record = last.record
        member = last.before.members.get(self.name)  # it may have been removed before
        if member is None or member.role != "train":
            raise ProtocolError(f"a void of round {record.header.round}; only training sites give one up")
        self._refuse_taking_back(record)
        self.replica.take_back(record)
        bound = self.replica.files.bound.at(last.before.due)
        contributed = self.name in [entry.site for entry in record.contributors]
        if contributed or self.replica.asked_for in bound.given:
            bound = bound.model_copy(update={"arrived": record.arrived})
        self.replica.files.bind(bound.model_copy(update={"void": True}))
        return bound.may_have_revealed

    def _refuse_taking_back(self, record: Record) -> None:
        """Stand by a sum upon which it has revealed: the sum of the later round may be complete, and others have it.

        Also where what it revealed in was given up since.
        """
        now = self.replica.files.bound.at(self.replica.due)
        if now.may_have_revealed or record.id in now.upon:
            raise ProtocolError(
                f"a void of round {record.header.round}, but this site has revealed in round {now.round}, which builds "
                "on its record; expected none: the record stands"
            )

    @property
    def exact(self) -> bool:
        """Whether what it sends are statistics without noise, whose sums differ by a site's own to the last digit."""
        return self._agreed.study.method.sums and self._private is None

    @property
    def abandoned_words(self) -> tuple[str, ...]:
        """What this study is without the statistics of the round that is open, for people; nothing for updates."""
        study = self._agreed.study
        if not study.method.one_sum:
            return ()
        if self.replica.due.round == 1:
            stays = "the study has no head, predicts as without any training, and claims nothing"
        else:
            stays = f"the declared shrinkage, {study.method.shrinkage:g}, holds, and nothing is claimed of single cases"
        return (
            f"Until it is closed anew its statistics are abandoned: {stays}. With a site that is lost for ever the "
            f"others let it close without that site ({self._leave_word}secfacmic site release at each), or end the "
            "study as it is (secfacmic study close --abandon).",
        )

    @property
    def _leave_word(self) -> str:
        """What comes before a release without a site that was in the cohort: in plain mode nothing, see below."""
        return (
            "" if self._agreed.study.mode == "plain" else "secfacmic keys rotate --remove SITE at the key maker, then "
        )

    @property
    def revealed_to(self) -> tuple[str, ...] | None:
        """The cohort to which it has revealed at the adapter it holds, empty if nobody here knows which; None if it has
        not, or has a budget."""
        if self._private is not None or not self.run:
            return None
        return self.replica.files.bound.given.get(self.replica.asked_for)

    @property
    def _gave_others(self) -> bool:
        """Whether it has revealed integers at this adapter that are not here any more: others would, by difference,
        show what is new in them (a patient that was to be forgotten, say)."""
        released = self.run and self.replica.files.bound.released == self.replica.asked_for
        return self.revealed_to is not None and not released and self._stored() is None

    def release(self) -> None:
        """Its people's word: at this adapter it may reveal once more, to another cohort."""
        files = self.replica.files
        files.bind(files.bound.model_copy(update={"released": self.replica.asked_for}))

    def retire(self) -> None:
        """The word that it trains no more in this run, once the open round is closed: its people's, or its own where
        all that its budget was planned for is spent. Told to the server when it asks next.

        Raises:
            ProtocolError: it does not train in a run.
        """
        if not self.run or self.finished or not self._trains(self.name):
            raise ProtocolError(f"{self.name} does not train in a run that is open; expected one that does, to retire")
        files = self.replica.files
        files.bind(files.bound.model_copy(update={"retired": True}))

    def _bound_to(
        self, what: str, attempt: int, cohort: str, envelopes: tuple[EnvelopeHeader, ...], words: tuple[SignedWord, ...]
    ) -> tuple[Bound, Frame]:
        """What this site is bound to, which is the attempt that a question names, with all of its cohort; and its own
        envelope, as it sent it."""
        bound = self.replica.files.bound.at(self.replica.due)
        if (attempt, cohort) != (bound.attempt, bound.cohort):
            raise ProtocolError(
                f"{what} of attempt {attempt}; the newest here is attempt {bound.attempt}, of another COHORT"
            )
        if tuple(entry.site for entry in envelopes) != bound.names:
            raise ProtocolError(
                f"{what}: envelopes of {', '.join(entry.site for entry in envelopes)}; expected all of the cohort, "
                f"{', '.join(bound.names)}"
            )
        frame = self._envelopes.sent()
        if frame is None:
            raise ProtocolError(f"{what} of attempt {attempt}, whose envelope is not here any more")
        if words[bound.names.index(self.name)] != SignedWord.of(frame.header, frame.signature):
            raise ProtocolError(f"{what}: names another envelope of this site than it sent")
        return bound, frame

    def _answer_for_shares(self, question: bytes, carried: bytes) -> bytes:
        """CHECKED: whether each share that was dealt to this site opens to what its maker's header says."""
        members = self.replica.state.chain.members
        header, envelopes, digest = check_check(question, self._agreed, members, self.replica.due)
        bound, _ = self._bound_to("CHECK", header.attempt, header.cohort, envelopes, header.envelopes)
        complaints = self._held(bound, envelopes).complaints(carried)
        self._note_given()  # from here on others' shares open what this site sent, also if it reveals nothing
        return sign_checked(self._agreed, digest, self.name, complaints, self.replica.identity.signing)

    def _held(self, bound: Bound, envelopes: tuple[EnvelopeHeader, ...]) -> HeldShares:
        return HeldShares(self._agreed, self.replica.due, self.name, bound, envelopes)

    def _stand_for(self, question: bytes, carried: bytes) -> tuple[bytes, bytes]:
        """WITNESS for a site that is gone after this one has revealed, and for those asked for before, in one word, and
        the share of its mask that was dealt here.

        It binds as the REVEAL does, which was given before: what the two open is that one sum.
        """
        due, files = self.replica.due, self.replica.files
        bound = files.bound.at(due)
        asked = check_gone(question, self._agreed, due)
        self._refuse_share(bound, asked)
        assert bound.padded is not None  # of a study with pads
        path = files.folder.question("arrived")
        kept = path.read_bytes() if path.is_file() else b""
        _, envelopes, digest = check_arrived(kept, self._agreed, self.replica.state.chain.members, due)
        if digest != bound.arrived:
            raise ProtocolError("the ARRIVED that this site keeps is not the one it has revealed for")
        payload, share = self._held(bound, envelopes).of_gone(asked.gone, carried)
        check = self.replica.state.chain.wire.check_words(digest, payload)
        shared = bound.padded.shared | {asked.gone: products(check)}
        if shared != bound.padded.shared:
            files.bind(bound.model_copy(update={"padded": bound.padded.model_copy(update={"shared": shared})}))
        checks = {name: (int(first, 16), int(second, 16)) for name, (first, second) in shared.items()}
        word = sign_witness(self._agreed, digest, self.name, bound.names, checks, self.replica.identity.signing)
        return word, share

    def _refuse_share(self, bound: Bound, asked: GoneHeader) -> None:
        """Give a share away only after the REVEAL, for what was revealed: what it opens is that one sum then."""
        if not bound.arrived or asked.arrived != bound.arrived:
            raise ProtocolError(
                f"asked for a share of {asked.gone} in attempt {asked.attempt}; this site has "
                + ("revealed for another ARRIVED" if bound.arrived else "not revealed, and gives none before it has")
            )
        if asked.gone not in bound.names or asked.gone == self.name:
            raise ProtocolError(f"asked for a share of {asked.gone}; expected another site of the cohort")

    def _reveal(self, question: bytes, carried: bytes) -> bytes:
        """The REVEAL for an ARRIVED: the point from which the round waits for its members, or for who stands for them.

        At most one a round, whatever the server asks; the answer to the same question is the same.
        """
        due, files = self.replica.due, self.replica.files
        arrived, envelopes, digest = check_arrived(question, self._agreed, self.replica.state.chain.members, due)
        bound, sent = self._bound_to("ARRIVED", arrived.attempt, arrived.cohort, envelopes, arrived.envelopes)
        self._refuse_second_sum(bound, digest)
        if self._agreed.study.pads and not bound.arrived:
            self._refuse_unchecked(bound, arrived, carried)
        payload = bytes(sent.payload)
        check = self.replica.state.chain.wire.check_words(digest, payload)
        write_durable(files.folder.question("arrived"), question, 0o600)
        self._note_given()
        if not bound.arrived:
            given = bound.giving(self.replica.asked_for, envelopes, self.replica.state.chain.sum)
            files.bind(given.model_copy(update={"arrived": digest}))
        mask = None if bound.padded is None else bound.padded.seed
        return sign_reveal(self._agreed, digest, self.name, check, self.replica.identity.signing, mask)

    def _refuse_second_sum(self, bound: Bound, arrived: str) -> None:
        """Reveal for one ARRIVED a round."""
        if bound.arrived not in ("", arrived):
            raise ProtocolError(f"a second ARRIVED of round {bound.round}; this site has revealed for another")

    def _refuse_unchecked(self, bound: Bound, arrived: ArrivedHeader, carried: bytes) -> None:
        """Reveal only when everybody has a good share of everybody, if there are shares; kept for a server that lost
        them."""
        chain, due = self.replica.state.chain, self.replica.due
        if len(bound.names) > chain.quorum.needed:
            digest = check_digest(self._agreed, due, arrived.attempt, arrived.cohort, arrived.envelopes)
            refuse_unchecked(carried, self._agreed, chain.members, digest, bound.names)
            write_durable(self.replica.files.folder.question("checked"), carried, 0o600)
