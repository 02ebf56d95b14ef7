"""``secfacmic client``: one site of a study."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secure_fed.cli.output import Delta, Epsilon

if TYPE_CHECKING:
    from clients.site import Site
    from clients.sitefile import SiteFile
    from secure_fed.study import AgreedStudy

log = logging.getLogger(__name__)


def client(
    site: Annotated[Path, typer.Option(help="The site's site.toml.")],
    epsilon: Epsilon = None,
    delta: Delta = None,
) -> None:
    """Take part in a study until it is over; started again, it goes on.

    After each round STATE has adapter.safetensors and summary.json.
    """
    from secure_fed.processes import be_quiet_outside, die_with_parent, end_on_sigterm, log_lines

    die_with_parent()
    end_on_sigterm()
    be_quiet_outside()
    from clients.app import SiteApp
    from clients.site import Site
    from clients.sitefile import read_site_file, with_budget
    from clients.supernode import run_site
    from secure_fed.errors import SiteFileError
    from secure_fed.storage import exclusive, make_folder
    from secure_fed.study import load_study

    log_lines()
    file = with_budget(read_site_file(site), epsilon, delta)
    if file.server is None:
        raise SiteFileError(f"{site}: no [server] table; expected address and authority of the study's server")
    agreed = load_study(Path(file.study))
    make_folder(Path(file.state))
    with exclusive(Path(file.state)):
        member = Site(file, agreed)
        facts = agreed.study
        log.info("%s: study %s, %d rounds, mode %s", file.site, facts.name, facts.rounds, facts.mode)
        features = member.features()
        log.info("%s: %d images to train on, %d to test", file.site, len(features.train.y), len(features.test.y))
        before = member.evaluate(None)
        app = SiteApp(member, facts.id, lambda done: _write_results(file, agreed, done, before))
        run_site(app, file.server.address, Path(file.server.authority))
        log.info("%s: the study is over after %d rounds", file.site, member.round)


def _write_results(file: SiteFile, agreed: AgreedStudy, site: Site, before: dict[str, float | None]) -> None:
    """The adapter after the last round and what it does on this site's test images; both stay here."""
    from secure_fed.adapter_file import save_adapter
    from secure_fed.storage import write_durable

    if not site.round:
        return
    state = Path(file.state)
    save_adapter(state / "adapter.safetensors", agreed, site.parameters)
    counts = site.validation
    summary = {
        "study_id": agreed.study.id,
        "site": site.name,
        "run": site.run,
        "round": site.round,
        "rounds": agreed.study.rounds,
        "adapter_digest": site.adapter_digest,
        "validation": counts.correct / counts.images if counts is not None and counts.images else None,
        "metrics": {"zero_shot": before, "federated": site.evaluate(site.parameters)},
    }
    write_durable(state / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    log.info("%s: round %d of %d applied", site.name, site.round, agreed.study.rounds)
