"""``secfacmic client``: one site of a study."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secure_fed.cli.output import SITE_HELP, Delta, Device, Epsilon, Metrics, Pace, command_line, console, host_and_port

if TYPE_CHECKING:
    from secure_fed.clients.sitefile import SiteFile

log = logging.getLogger(__name__)

LOG_SECONDS = 10
"""Least time between two lines about progress in the log."""


def client(
    site: Annotated[Path, typer.Option(help=SITE_HELP)],
    epsilon: Epsilon = None,
    delta: Delta = None,
    device: Device = None,
    metrics: Metrics = None,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="One round on phantoms over the true line, with a throw-away key; then end."),
    ] = False,
) -> None:
    """Take part in a study until it is over; started again, it goes on.

    After each round STATE has adapter.safetensors and summary.json.
    """
    from secure_fed.core.processes import be_quiet_outside, die_with_parent, end_on_sigterm, log_lines

    die_with_parent()
    end_on_sigterm()
    be_quiet_outside()
    from secure_fed.clients.sitefile import read_site_file, with_budget, with_device
    from secure_fed.operate.taking_part import take_part

    log_lines()
    if rehearse:
        _rehearse(with_device(read_site_file(site), device))
        return
    figures = None if metrics is None else host_and_port(metrics, "--metrics", "127.0.0.1")
    file = with_device(with_budget(read_site_file(site), epsilon, delta), device)
    at_a_terminal = sys.stderr.isatty()
    take_part(file, _logged_progress(file.site), figures, in_full=at_a_terminal)
    if at_a_terminal:  # logs name no place of this machine
        for line in _next_steps(file, site):
            console.print(line, highlight=False, soft_wrap=True)
    else:
        log.info(
            "%s: the adapter is in the state folder that site.toml names; next: secfacmic report, predict or evidence, "
            "and to end it for good: study close",
            file.site,
        )


def _rehearse(file: SiteFile) -> None:
    from secure_fed.lab.line_rehearsal import rehearse_round

    done = rehearse_round(file, lambda text: log.info("%s: rehearsal: %s", file.site, text))
    megabytes = done.size / 1e6
    console.print(
        f"rehearsed: trained on phantoms in {done.training_seconds:.1f} s; {megabytes:.2f} MB went up in "
        f"{done.up_seconds:.1f} s, came back in {done.down_seconds:.1f} s and opened to what was sent. No image of "
        "this site was read, and no budget or key of the study was used",
        highlight=False,
        soft_wrap=True,
    )


def _next_steps(file: SiteFile, site: Path) -> list[str]:
    """Where the result is, and what can be done with it."""
    state = file.state_folder
    use = command_line("predict", "--adapter", state.adapter, "--images", "DIR", "--out", "FILE")
    return [
        f"the adapter is {state.adapter}, its figures here are in {state.summary}; next:",
        f"  see its figures      {command_line('report', site if site.is_dir() else site.parent)}",
        f"  use it               {use}",
        f"  keep the evidence    {command_line('evidence', site, '--out', 'evidence.zip')}",
        f"  end it for good      {command_line('study', 'close', str(file.study), '--site', site)}",
    ]


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
