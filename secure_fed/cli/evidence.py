"""``secfacmic evidence``: a site's part in a study as one archive that a reviewer checks without network or keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from secure_fed.cli.output import SITE_HELP, Json, out, print_json


class _PackByDefault(TyperGroup):
    """``evidence DIR`` is ``evidence pack DIR``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["pack", *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            args = ["pack", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    help="A site's part in a study as one archive: evidence DIR --out FILE, evidence verify FILE.",
    no_args_is_help=True,
    cls=_PackByDefault,
)


@app.command()
def pack(
    site: Annotated[Path, typer.Argument(metavar="SITE", help=SITE_HELP)],
    into: Annotated[Path, typer.Option("--out", help="The archive, a zip file.")],
    json_: Json = False,
) -> None:
    """Pack study, journal, ledger, policy, acceptance, what was sent, versions and a bill of materials, signed.

    The command's name can be left out: secfacmic evidence DIR --out FILE.
    """
    from secure_fed.operate.evidence import pack_evidence
    from secure_fed.report.document_page import evidence_page

    manifest = pack_evidence(site, into, evidence_page)
    if json_:
        print_json(manifest)
        return
    _say(f"{into}: {len(manifest['files'])} files of site {manifest['site']}, study {manifest['study']}")
    _say("no private key, image, feature or patient id is in it; index.html in it is for people to read")


@app.command()
def verify(
    archive: Annotated[Path, typer.Argument(metavar="FILE", help="The archive.")],
    json_: Json = False,
) -> None:
    """Check an archive offline: digests, signature, journal, ledger, acceptance, what was sent, and its page."""
    from secure_fed.operate.evidence import in_words, verify_evidence
    from secure_fed.report.document_page import evidence_page

    found: dict[str, Any] = verify_evidence(archive, evidence_page)
    if json_:
        print_json({"verified": True, **found})
        return
    for line in in_words(found):
        _say(line)
    _say("all of it verifies; compare the study id with the one that you know")


def _say(text: str) -> None:
    out.print(text, highlight=False, soft_wrap=True)
