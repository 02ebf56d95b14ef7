"""The site's Flower ClientApp: requests in, replies out, and of failures nothing but a code."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from secure_fed.core.errors import BundleError, ProtocolError, RoundFailedError, SecfacmicError, StudyError
from secure_fed.protocol.presence import PresenceQuestion
from secure_fed.protocol.rounds import ReplyCode, RoundReply, RoundRequest
from secure_fed.transport.flower_messages import contract, read_request, reply_content

if TYPE_CHECKING:
    from secure_fed.clients.reply_clock import ReplyClock
    from secure_fed.clients.site import Site

log = logging.getLogger(__name__)

_CODES = {
    1: ReplyCode.FAILED_POLICY,
    2: ReplyCode.FAILED_DATA,
    3: ReplyCode.FAILED_BACKBONE,
    4: ReplyCode.FAILED_PROTOCOL,
    6: ReplyCode.FAILED_STORAGE,
}
"""What a failure is called outside, by the tens of its exit code; a finer one could tell of the images."""


PROBE_BYTES = 32 * 1024
"""By so many the line is measured before the first round: four seconds at 64 kbit/s."""


GIVEN_SECONDS, GIVEN_PAUSE = 60.0, 0.5
"""How long a rehearsal waits until the server gives what it has sent, and between two tries."""


class Interrupted(Exception):
    """The connection was lost in a way that the node goes on from; nothing is wrong at the site."""


class Line(Protocol):
    """What carries the bytes that a message names."""

    def send(self, run: str, data: bytes) -> str:
        """Give bytes to the server; their digest."""

    def fetch(self, digest: str, length: int) -> bytes:
        """Get bytes by their digest."""


class SiteApp:
    """A site as a Flower app that this node has installed; the server's bundle brings none.

    Args:
        site: the site.
        study_id: of its study; the one bundle that is taken is this study's contract.
        after_round: is called after a reply was sent that followed new records.
        note: is called with each reply and its round before it is sent; what it cannot note is not sent.
        clock: holds replies for which a site with a budget worked on its data; None without one.

    Attributes:
        failure: why the site cannot go on; its code was sent, its text stays here.
    """

    def __init__(
        self,
        site: Site,
        study_id: str,
        after_round: Callable[[Site], None],
        note: Callable[[RoundReply, int], None] = lambda reply, round_number: None,
        clock: ReplyClock | None = None,
    ) -> None:
        self.site = site
        self.failure: SecfacmicError | None = None
        self._contract = contract(study_id)
        self._after_round = after_round
        self._note = note
        self._reported = -1
        self._answers_last = self._told_the_end = False
        self._line: Line | None = None
        self._rate = 0.0
        self._app = ClientApp()

        @self._app.train("round")
        def train(message: Message, context: Context) -> Message:
            assert self._line is not None  # of the answer that is being made
            request = read_request(message.content, self._line.fetch)
            began = None if clock is None else clock.begin()
            try:
                reply = self._respond(request)
            finally:  # a refusal too may come after work: whoever asks may ask for what does not fit
                if clock is not None and began is not None and site.read_data:
                    clock.hold(began)
            self._note(reply, request.round)
            self._answers_last = site.finished and not request.more
            return Message(reply_content(reply, self._line.send), reply_to=message)

    @property
    def finished(self) -> bool:
        """Whether the study is over, for this site and by the server's word, and the server knows that it has it."""
        return self._told_the_end

    @property
    def authority(self) -> str | None:
        """SHA-256 of the certificate of the authority that an amendment named, which alone is trusted; else None."""
        return self.site.authority

    def answer(self, message: Message, context: Context, bundle: bytes, line: Line) -> Message:
        """Answer one message; sets :attr:`failure` instead of raising what is wrong at the site.

        Args:
            message: of the server.
            context: Flower's; nothing of it is used.
            bundle: that the server gave for the message's run.
            line: what carries the bytes that message and answer name.

        Raises:
            Interrupted: the line's; the answer is made again when the server asks again.
        """
        self._line = line
        self._answers_last = False
        if bundle != self._contract:
            self.failure = BundleError(
                f"the server's bundle has {len(bundle)} bytes and is not this study's contract; expected the same "
                "study and version of secfacmic at the server: compare study ids (secfacmic study show)"
            )
            return self._fail(message, ReplyCode.REFUSED_BUNDLE)
        try:
            return self._app(message, context)
        except Interrupted:
            raise
        except ProtocolError as error:
            # Asked for what does not fit: nothing is wrong here, and the next message may fit.
            log.warning("%s: a message is refused: %s", self.site.name, error)
            return self._fail(message, ReplyCode.FAILED_PROTOCOL)
        except SecfacmicError as error:
            self.failure = error
            return self._fail(message, _CODES.get(error.exit_code // 10, ReplyCode.FAILED))
        except Exception as error:  # nothing of it may leave but a code
            self.failure = RoundFailedError(
                f"a round failed with {type(error).__name__}, which nobody foresaw; start the site again, and report "
                "it if it comes back; nothing was sent"
            )
            return self._fail(message, ReplyCode.FAILED)

    def _respond(self, request: RoundRequest) -> RoundReply:
        """Of what it lacks before the first round it says neither a word nor a code, as both would be of its data."""
        asked = PresenceQuestion.from_bytes(request.question)
        if asked is None:
            return self.site.respond(request)
        try:
            return self.site.present(asked, self._measured(asked.run))
        except SecfacmicError as error:
            self.failure = error
            return RoundReply(self.site.name, ReplyCode.MORE, "", 0, "", b"")

    def _measured(self, run: str) -> float:
        """Bytes a second that the line takes, measured once, with bytes that mean nothing."""
        if not self._rate:
            assert self._line is not None  # of the answer that is being made
            began = time.monotonic()
            self._line.send(run, os.urandom(PROBE_BYTES))
            self._rate = PROBE_BYTES / max(time.monotonic() - began, 1e-3)
        return self._rate

    def after_reply(self, *, taken: bool) -> None:
        """Do what need not delay the reply: results on the site's own disk.

        Args:
            taken: whether the server has the reply; if not, it asks again, also after the last round.
        """
        self._told_the_end = taken and self._answers_last
        if self.site.position == self._reported:
            return
        self._reported = self.site.position
        self._after_round(self.site)

    def _fail(self, message: Message, code: ReplyCode) -> Message:
        reply = RoundReply(self.site.name, code, run="", position=0, attestation="", envelope=b"")
        # A code from the fixed list is said even on a full disk.
        with contextlib.suppress(SecfacmicError):
            self._note(reply, self.site.round)
        return Message(reply_content(reply, lambda run, data: ""), reply_to=message)  # a code names no bytes


class RehearsalApp(SiteApp):
    """A site that comes before the first round, sends what a round would take, fetches it again and leaves.

    Args:
        site: the site, of which nothing but name, key and identity is used.
        study_id: of its study.
        data: what is sent.

    Attributes:
        returned: what came back.
        up_seconds, down_seconds: how long that took, all waiting included.
    """

    def __init__(self, site: Site, study_id: str, data: bytes) -> None:
        super().__init__(site, study_id, lambda _: None)
        self.returned = b""
        self.up_seconds = self.down_seconds = 0.0
        self._data = data
        self._sent = ""

    @property
    def finished(self) -> bool:
        """Whether what was sent is back."""
        return bool(self.returned)

    def _respond(self, request: RoundRequest) -> RoundReply:
        asked = PresenceQuestion.from_bytes(request.question)
        if asked is None:
            raise StudyError(
                "the server asks for a round already; expected a study before its first round: a rehearsal is of no "
                "use later"
            )
        assert self._line is not None  # of the answer that is being made
        began = time.monotonic()
        self._sent = self._line.send(asked.run, self._data)
        self.up_seconds = time.monotonic() - began
        return self.site.present(asked, len(self._data) / max(self.up_seconds, 1e-3), (self._sent, len(self._data)))

    def after_reply(self, *, taken: bool) -> None:
        """Fetch it, as soon as the server gives it."""
        if not taken or not self._sent:
            return
        assert self._line is not None  # of the answer that was sent
        end = time.monotonic() + GIVEN_SECONDS
        while not self.returned and time.monotonic() < end:
            began = time.monotonic()
            with contextlib.suppress(Interrupted):
                self.returned = self._line.fetch(self._sent, len(self._data))
            self.down_seconds = time.monotonic() - began
            if not self.returned:
                time.sleep(GIVEN_PAUSE)
        self._sent = ""  # else the server asks again
