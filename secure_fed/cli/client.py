"""``secfacmic client``: one site of a study."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secure_fed.cli.output import Delta, Device, Epsilon, Pace
from secure_fed.core.errors import RoundFailedError, SecfacmicError, StorageError

if TYPE_CHECKING:
    from secure_fed.clients.site import Site
    from secure_fed.clients.sitefile import SiteFile
    from secure_fed.core.status import StatusFile
    from secure_fed.protocol.study import AgreedStudy

log = logging.getLogger(__name__)


LOG_SECONDS = 10
"""Least time between two lines about progress in the log."""


def client(
    site: Annotated[Path, typer.Option(help="The site's site.toml.")],
    epsilon: Epsilon = None,
    delta: Delta = None,
    device: Device = None,
) -> None:
    """Take part in a study until it is over; started again, it goes on.

    After each round STATE has adapter.safetensors and summary.json.
    """
    from secure_fed.core.processes import be_quiet_outside, die_with_parent, end_on_sigterm, log_lines

    die_with_parent()
    end_on_sigterm()
    be_quiet_outside()
    from secure_fed.clients.acceptance import require_acceptance
    from secure_fed.clients.flower_app import SiteApp
    from secure_fed.clients.flower_node import run_site
    from secure_fed.clients.outgoing_log import SentList
    from secure_fed.clients.site import Site
    from secure_fed.clients.sitefile import read_site_file, with_budget, with_device
    from secure_fed.core.errors import SiteFileError
    from secure_fed.core.status import StatusFile, keep_log
    from secure_fed.core.storage import exclusive, make_folder
    from secure_fed.operate.closing import refuse_closed
    from secure_fed.protocol.study import load_study

    log_lines()
    file = with_device(with_budget(read_site_file(site), epsilon, delta), device)
    if file.server is None:
        raise SiteFileError(f"{site}: no [server] table; expected address and authority of the study's server")
    agreed = load_study(Path(file.study))
    state = Path(file.state)
    make_folder(state)
    with exclusive(state):
        refuse_closed(state)
        status = StatusFile(state)
        keep_log(state, "site", status)
        with _reported(file, status):
            facts = agreed.study
            status.begin("site", site=file.site, study=facts.name, study_id=facts.id, rounds=facts.rounds, round=0)
            member = Site(file, agreed)
            require_acceptance(file, agreed, member.signing_key)
            status.tell(round=member.round)
            log.info("%s: study %s, %d rounds, mode %s", file.site, facts.name, facts.rounds, facts.mode)
            log.info("%s: computes on %s", file.site, member.device)
            features = member.features(_logged_progress(file.site))
            log.info("%s: %d images to train on, %d to test", file.site, len(features.train.y), len(features.test.y))
            before = member.evaluate(None)

            def after_round(done: Site) -> None:
                _write_results(file, agreed, done, before)
                status.tell(run=done.run, round=done.round, finished=done.finished)

            app = SiteApp(member, facts.id, after_round, SentList(state).add)
            run_site(app, file.server.address, Path(file.server.authority), len(facts.sites), file.server.proxy)
            log.info("%s: the study is over after %d rounds", file.site, member.round)


def _logged_progress(site: str) -> Callable[[int, int], None]:
    """A line now and then while images are decoded and encoded."""
    pace, told = Pace(), time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        text = pace.text(done, total)
        if time.monotonic() - told >= LOG_SECONDS:
            told = time.monotonic()
            log.info("%s: images: %s", site, text)

    return tell


@contextlib.contextmanager
def _reported(file: SiteFile, status: StatusFile) -> Iterator[None]:
    """Put a refusal into the status; one that may quote patients' data goes to a terminal in full, never to a log.

    Raises:
        SecfacmicError: the refusal.
    """
    try:
        yield
    except Exception as error:
        told = _without_patients(error, file)
        status.error(str(told))
        raise (error if sys.stderr.isatty() and isinstance(error, SecfacmicError) else told) from None


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


def _write_results(file: SiteFile, agreed: AgreedStudy, site: Site, before: dict[str, float | None]) -> None:
    """The adapter after the last round and what it does on this site's test images; both stay here."""
    from secure_fed.clients.calibration import calibrate
    from secure_fed.core.storage import write_durable
    from secure_fed.model.adapter_file import CALIBRATION, save_adapter, save_calibration
    from secure_fed.model.device import describe_device

    if not site.round:
        return
    state = Path(file.state)
    save_adapter(state / "adapter.safetensors", agreed, site.parameters)
    own = calibrate(agreed, [site], site.parameters, personal=True)
    save_calibration(state / CALIBRATION, site.parameters, own)
    counts = site.validation
    share = counts.correct / counts.images if counts is not None and counts.images else None
    summary = {
        "study_id": agreed.study.id,
        "site": site.name,
        "run": site.run,
        "round": site.round,
        "rounds": agreed.study.rounds,
        "device": describe_device(site.device),
        "adapter_digest": site.adapter_digest,
        "validations": _validations(state, site) | {str(site.round): share},
        "metrics": {"zero_shot": before, "federated": site.evaluate(site.personal(site.parameters))},
    }
    write_durable(state / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    log.info("%s: round %d of %d applied", site.name, site.round, agreed.study.rounds)


def _validations(state: Path, site: Site) -> dict[str, float | None]:
    """By round, the shares of correct validation images that earlier rounds of this run have noted."""
    try:
        content = json.loads((state / "summary.json").read_text(encoding="utf-8"))
        return dict(content["validations"]) if content["run"] == site.run else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # there is none yet, or it is another version's: the curve starts here
