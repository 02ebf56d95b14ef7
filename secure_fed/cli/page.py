"""``secfacmic page``: where a server or a site stands, in a browser on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from secure_fed.cli.output import out


def page(
    state: Annotated[
        Path, typer.Argument(metavar="STATE", help="State folder of a server or a site; or a site's folder.")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0 takes a free one.")] = 0,
) -> None:
    """Show where a server or a site stands on a page that follows it, for a browser on this machine.

    Prints a link that works until Ctrl-C. The study goes on whether the page is open or not.
    """
    from secure_fed.operate.live_page import LivePage

    live = LivePage(state, port)
    out.print(live.url, highlight=False, soft_wrap=True)
    out.print("for a browser on this machine; who has the link sees all. Ctrl-C ends it", highlight=False)
    if live.nothing_yet:
        out.print(f"nothing to show yet: {live.nothing_yet}", highlight=False, soft_wrap=True)
    os.nice(19)  # a study on this machine goes first
    live.serve()
