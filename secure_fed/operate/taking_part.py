"""A site's process: from its ``site.toml`` to the end of the study, with what it says about itself on the way.

Import after :func:`secure_fed.core.processes.be_quiet_outside`: this loads flwr.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Self

from secure_fed.clients.acceptance import require_acceptance
from secure_fed.clients.budget import has_budget, ledger_folder
from secure_fed.clients.features import Progress
from secure_fed.clients.flower_app import SiteApp
from secure_fed.clients.flower_node import Way, run_site
from secure_fed.clients.outgoing_log import SentList
from secure_fed.clients.reply_clock import ReplyClock, reply_seconds
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import SiteFile
from secure_fed.core.errors import RoundFailedError, SecfacmicError, StorageError
from secure_fed.core.status import StatusFile
from secure_fed.operate.metrics import serve_metrics
from secure_fed.operate.running import running
from secure_fed.operate.site_results import write_results
from secure_fed.privacy.ledger import Ledger
from secure_fed.protocol.study import AgreedStudy, load_study

log = logging.getLogger(__name__)


def take_part(
    file: SiteFile,
    progress: Progress | None = None,
    metrics: tuple[str, int] | None = None,
    *,
    in_full: bool = False,
) -> None:
    """Take part in a study until it is over; called again, it goes on.

    Args:
        file: the site's, paths absolute, with the budget and device of this run.
        progress: is told how many images are decoded and encoded, of how many.
        metrics: host and port at which to serve its figures, if they are to be served.
        in_full: whether only people of the site read a refusal, as at a terminal: it may then quote names of images and
            patients. Status and log never do.

    Raises:
        SiteFileError: there is no server in the file, or the site refuses the study.
        NotEnoughSitesError: the study is over for want of sites; the results are there.
        NotAcceptedError: nobody accepted this very study here.
        SecfacmicError: others, for which the site cannot go on.
    """
    server = file.known_server
    agreed = load_study(Path(file.study))
    study, state = agreed.study, Path(file.state)
    file.state_folder.begin()
    with running(state, "site") as status, _reported(file, status, in_full):
        status.begin("site", site=file.site, study=study.name, study_id=study.id, rounds=study.rounds, round=0)
        if metrics is not None:
            serve_metrics(state, metrics)
        began = monotonic()
        site = Site(file, agreed)
        require_acceptance(file, agreed, site.signing_key)
        status.tell(run=site.run, round=site.round, rounds=site.rounds, finished=site.finished)
        log.info("%s: study %s, %d rounds, mode %s", file.site, study.name, site.rounds, study.mode)
        if site.over:
            log.info(
                "%s: the study is over here, with all %d rounds applied; whether the server still asks for anything is "
                "looked for a moment",
                file.site,
                site.round,
            )
        else:
            log.info("%s: computes on %s", file.site, site.device)
            if site.budgeted or not (has_budget(file) and site.run):  # else in a run, of which nothing waits for them
                features = site.features(progress)
                log.info(
                    "%s: %d images to train on, %d to test", file.site, len(features.train.y), len(features.test.y)
                )
        sent = SentList(state)
        clock = None
        if site.budgeted:
            clock = ReplyClock(reply_seconds(file, agreed))
            log.info("%s: what reads data takes %g seconds, or a multiple", file.site, clock.seconds)
            if site.run:
                clock.hold(began)

        def after_round(done: Site) -> None:
            still = done.as_it_is()
            aside.do(lambda: _leave_results(file, agreed, still, sent, status))

        app = SiteApp(site, study.id, after_round, sent.add, clock)
        way = Way(
            server.address,
            Path(server.authority),
            len(study.sites),
            server.proxy,
            server.wait_seconds,
            study.records_url,
        )
        with _Aside(waits=not has_budget(file)) as aside:
            if site.budgeted:
                aside.do(site.as_it_is().tell_changes)
            run_site(app, way)
        chain = site.replica.state.chain
        chain.refuse_short()
        by = ", ended by its coordinator" if chain.ended else ""
        log.info("%s: the study is over after %d rounds%s", file.site, site.round, by)


class _Aside:
    """Does what is of a site's images and need not delay a reply.

    Under a budget in a thread of its own, one thing after the other, behind whatever else runs: when the next message
    is read would else tell how many images there are. It is waited for when the site has left the server.

    Args:
        waits: whether each thing is done at once instead.
    """

    def __init__(self, *, waits: bool) -> None:
        self._thread = None if waits else ThreadPoolExecutor(1, "aside", lambda: os.setpriority(os.PRIO_PROCESS, 0, 19))
        self._done: list[Future[None]] = []

    def do(self, what: Callable[[], None]) -> None:
        """Do it now, or when all before it is done."""
        if self._thread is None:
            what()
        else:
            self._done.append(self._thread.submit(what))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        for one in self._done if error is None else ():
            one.result()


def _leave_results(file: SiteFile, agreed: AgreedStudy, site: Site, sent: SentList, status: StatusFile) -> None:
    """Write a round's results, and say where the site stands; whether one with a budget goes on does not depend on
    what its images are.

    Raises:
        StorageError: a file cannot be written.
        SecfacmicError: others, without a budget.
    """
    _write_results(file, agreed, site)
    if site.round:
        log.info("%s: %s", site.name, _round_in_words(file, site, sent))
    status.tell(run=site.run, round=site.round, rounds=site.rounds, finished=site.finished)


def _write_results(file: SiteFile, agreed: AgreedStudy, site: Site) -> None:
    try:
        write_results(Path(file.state), agreed, site)
    except StorageError:
        raise
    except Exception as error:
        if not has_budget(file):
            raise
        log.warning(
            "%s: for its own eyes: no figures of round %d (%s); the run goes on",
            *(site.name, site.round, _without_patients(error, file)),
        )


def _round_in_words(file: SiteFile, site: Site, sent: SentList) -> str:
    """What the people of the site want to know after a round."""
    words = [f"round {site.round} of {site.rounds} applied"]
    counts = site.replica.state.validation
    if counts is not None and counts.images:
        share = 100 * counts.correct / counts.images
        words.append(f"{share:.1f} % of {counts.images} validation images of all sites were right before it")
    if Ledger.exists(ledger_folder(file)):
        spent = Ledger(ledger_folder(file)).summary()
        left = spent["epsilon_budget"] - spent["epsilon_spent"]
        words.append(f"epsilon {spent['epsilon_spent']:.3f} of {spent['epsilon_budget']:g} spent, {left:.3f} left")
    words.append(f"left this site since its start: {sent.updates} updates, {sent.bytes / 1e6:.2f} MB in all")
    return "; ".join(words)


@contextlib.contextmanager
def _reported(file: SiteFile, status: StatusFile, in_full: bool) -> Iterator[None]:
    """Put a refusal into the status; one that may quote patients' data is only raised in full if asked for.

    Raises:
        SecfacmicError: the refusal.
    """
    try:
        yield
    except Exception as error:
        told = _without_patients(error, file)
        status.error(str(told))
        raise (error if in_full and isinstance(error, SecfacmicError) else told) from None


def _without_patients(error: Exception, file: SiteFile) -> SecfacmicError:
    """A refusal as it may stand in a log: those of images and labels quote names, an unforeseen error anything."""
    see = "see which at a terminal of this site: secfacmic doctor --site site.toml"
    if isinstance(error, OSError):
        return StorageError(f"a file cannot be used ({error.strerror or type(error).__name__}); {see}")
    if not isinstance(error, SecfacmicError):
        return RoundFailedError(
            f"{type(error).__name__}, which nobody foresaw; start the site again, and report it if it comes back"
        )
    if 20 <= error.exit_code < 30 and file.data.kind == "patients":
        return type(error)(
            f"{type(error).__name__}: the site's images, labels or manifest are refused; names are not written to "
            f"logs: {see}"
        )
    return error
